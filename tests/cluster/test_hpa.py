"""Autoscalers: what they read and what they write. There is no metrics server in the cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.cluster import Group, eventually

Object = dict[str, Any]


def autoscaler(name: str, **spec: Any) -> Object:
    """One for the group of the same name, with Kubernetes' own least size of 1."""
    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}},
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "elasticmoe.io/v1alpha1",
                "kind": "ElasticMoEDeployment",
                "name": name,
            },
            "maxReplicas": 4,
            "metrics": [metric],
            **spec,
        },
    }


def said(group: Group, kind: str) -> str:
    """`status/reason` of a condition of the autoscaler."""
    every = group.get("hpa", group.name).get("status", {}).get("conditions") or []
    one = next((one for one in every if one["type"] == kind), {})
    return f"{one.get('status')}/{one.get('reason')}"


def test_an_autoscaler_reads_the_scale_and_counts_active_ranks(group: Callable[..., Group]) -> None:
    moe = group(scaling={"lameDuckSeconds": 2, "warmStandby": 1})
    moe.apply(autoscaler("moe"))
    eventually(lambda: said(moe, "AbleToScale").startswith("True/"), 60, "AbleToScale")
    status = moe.get("hpa", "moe")["status"]
    assert status["currentReplicas"] == 2
    # It looked for metrics of the pods that the selector names, and there are none here.
    eventually(
        lambda: said(moe, "ScalingActive") == "False/FailedGetResourceMetric", 60, "ScalingActive"
    )
    assert moe.settled(2)["desiredReplicas"] == 2


def test_an_autoscaler_grows_a_group_to_its_own_least_size(group: Callable[..., Group]) -> None:
    moe = group()
    moe.apply(autoscaler("moe", minReplicas=3))
    moe.settled(3, limit=120)
    assert said(moe, "AbleToScale").startswith("True/")
    # A minimum below that of the group: it writes 1, the group takes its own.
    moe.apply(autoscaler("moe", minReplicas=1, maxReplicas=1))
    eventually(lambda: moe.body()["spec"]["replicas"] == 1, 60, "1 was asked for")
    assert moe.settled(2, limit=120)["desiredReplicas"] == 2
    assert moe.reason("Progressing") == "False/SizeLimited"
    assert "minReplicas is 2" in moe.condition("Progressing")["message"]
