"""What the API server itself refuses, in words that say what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.cluster import MODEL, Group, KubectlError, kubectl, manifest

Object = dict[str, Any]


def engine(**changes: Any) -> Object:
    """A template whose engine's container has these fields."""
    template: Object = manifest("moe")["spec"]["template"]
    template["spec"]["containers"][0].update(changes)
    return {"template": template}


BAD: dict[str, tuple[Object, str]] = {
    "zero ranks": ({"replicas": 0}, "a group can't be scaled to zero: delete it"),
    "one rank at least": ({"minReplicas": 1}, "vLLM refuses an external load balancer"),
    "limits the wrong way round": ({"minReplicas": 4, "maxReplicas": 3}, "raise maxReplicas"),
    "too many": ({"maxReplicas": 5000}, "should be less than or equal to 1024"),
    "no container named engine": (engine(name="vllm"), "no container named `engine`"),
    "a container of ours": (engine(name="elasticmoe-sidecar"), "choose another one"),
    "a shell": (engine(command=["sh", "-c", "vllm serve x"]), "leave command out"),
    "vllm without serve": (engine(command=["vllm", "bench"]), "`vllm` without `serve`"),
    "no model": (engine(args=[]), "name the model first"),
    "data parallelism": (engine(args=[MODEL, "-dp", "4"]), "the group sets data parallelism"),
    "data parallelism in vLLM's other spelling": (
        engine(args=[MODEL, "--data_parallel_rank=1"]),
        "the group sets data parallelism",
    ),
    "the largest size": (
        engine(args=[MODEL, "--elastic-ep-max-dp-size=8"]),
        "leave out --elastic-ep-max-dp-size",
    ),
    "no API server": (engine(args=[MODEL, "--headless"]), "leave out --headless"),
    "several nodes": (engine(args=[MODEL, "--nnodes", "2"]), "a rank lives on one node"),
    "pipelines": (engine(args=[MODEL, "-pp=2"]), "elastic EP knows no pipeline parallelism"),
    "two API servers": (engine(args=[MODEL, "-asc=2"]), "leave out --api-server-count"),
    "a drain shorter than the lame duck": (
        {"scaling": {"drainTimeoutSeconds": 5, "lameDuckSeconds": 6}},
        "has to be longer than lameDuckSeconds",
    ),
    "a prepare longer than vLLM's own": (
        {"scaling": {"prepareTimeoutSeconds": 299}},
        "less than or equal to 270",
    ),
    "an unknown policy": ({"scaling": {"drainPolicy": "Hope"}}, 'supported values: "Postpone"'),
}


def said(body: Object, *words: str) -> str:
    """Why the API server takes no such object."""
    with pytest.raises(KubectlError) as refused:
        kubectl("apply", "--dry-run=server", *words, "-f", "-", stdin=json.dumps(body))
    return str(refused.value)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_spec_is_refused_with_advice(shared_namespace: str, what: str) -> None:
    spec, advice = BAD[what]
    assert advice in said(manifest("moe", **spec), "-n", shared_namespace)


@pytest.mark.parametrize("name", ["4moe", "moe.two", "m" * 49])
def test_a_name_that_can_be_no_service_is_refused(shared_namespace: str, name: str) -> None:
    assert "Service" in said(manifest(name), "-n", shared_namespace)


def test_what_is_fixed_for_life_can_not_be_changed(shared_namespace: str) -> None:
    moe = Group(shared_namespace, "fixed")
    moe.apply(manifest("fixed", paused=True))
    with pytest.raises(KubectlError, match="minReplicas can't be changed"):
        moe.patch(minReplicas=3)
    with pytest.raises(KubectlError, match="can't be scaled to zero"):
        moe.patch(replicas=0)
    with pytest.raises(KubectlError, match="can't be scaled to zero"):
        moe.scale(0)
    moe.patch(maxReplicas=5)


def test_what_is_left_out_has_a_default(shared_namespace: str) -> None:
    body = manifest("moe")
    body["spec"] = {"template": body["spec"]["template"]}
    words = ("create", "--dry-run=server", "-o", "json", "-f", "-")
    made = json.loads(kubectl("-n", shared_namespace, *words, stdin=json.dumps(body)))["spec"]
    assert {one: made[one] for one in ("replicas", "minReplicas", "maxReplicas")} == {
        "replicas": 2,
        "minReplicas": 2,
        "maxReplicas": 8,
    }
    assert made["scaling"]["drainPolicy"] == "Postpone"


def test_kubectl_explains_a_field(shared_namespace: str) -> None:
    text = kubectl("explain", "emoe.spec.scaling.warmStandby")
    assert "DESCRIPTION" in text
    assert "kept warm" in text or "standby" in text.lower()
