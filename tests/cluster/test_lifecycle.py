"""From `kubectl apply` to `kubectl delete`."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from support.cluster import SYSTEM, Group, eventually, kubectl, listed, manifest, operator_ready

CHILDREN = (
    "statefulsets,deployments,services,secrets,configmaps,serviceaccounts,"
    "poddisruptionbudgets,networkpolicies"
)


def children(group: Group) -> list[str]:
    """Kinds and names of what belongs to a group."""
    labels = f"elasticmoe.io/deployment={group.name}"
    items = listed("-n", group.namespace, CHILDREN, "-l", labels)
    return sorted(f"{one['kind']}/{one['metadata']['name']}" for one in items)


def gone(group: Group) -> bool:
    labels = f"elasticmoe.io/deployment={group.name}"
    return not listed("-n", group.namespace, f"pods,emoe,{CHILDREN}", "-l", labels) and not listed(
        "-n", group.namespace, "emoe"
    )


def test_apply_makes_a_group_and_delete_takes_all_of_it(group: Callable[..., Group]) -> None:
    moe = group()
    assert children(moe) == [
        "ConfigMap/moe-command",
        "Deployment/moe-coordinator",
        "NetworkPolicy/moe-coordinator",
        "NetworkPolicy/moe-ranks",
        "PodDisruptionBudget/moe",
        "Secret/moe-keys",
        "Service/moe",
        "Service/moe-coordinator",
        "Service/moe-ranks",
        "ServiceAccount/moe-coordinator",
        "ServiceAccount/moe-ranks",
        "StatefulSet/moe",
    ]
    assert moe.reason("Available") == "True/MinimumRanksReady"
    assert moe.reason("Degraded") == "False/Healthy"
    moe.kubectl("delete", "emoe", "moe", "--timeout=60s", limit=70)
    eventually(lambda: gone(moe), 60, "everything of the group is gone")


def test_the_scale_subresource_works_from_the_first_second(namespace: str) -> None:
    moe = Group(namespace, "moe")
    moe.apply(manifest("moe"))

    def scale() -> dict[str, object]:
        path = (
            f"/apis/elasticmoe.io/v1alpha1/namespaces/{namespace}/elasticmoedeployments/moe/scale"
        )
        found: dict[str, object] = json.loads(kubectl("get", "--raw", path))
        return found

    def known() -> bool:
        status = scale()["status"]
        assert isinstance(status, dict)
        return "selector" in status

    eventually(known, 1.0, "a selector")
    assert scale()["spec"] == {"replicas": 2}
    assert scale()["status"] == {
        "replicas": 0,
        "selector": "elasticmoe.io/deployment=moe,elasticmoe.io/active=true",
    }


@pytest.mark.parametrize("phase", ["CreatePods", "prepare"])
def test_deleted_in_the_middle_of_a_resize(group: Callable[..., Group], phase: str) -> None:
    moe = group(env={"SIM_PREPARE_S": "6"})
    moe.scale(3)
    moe.phase(phase)
    moe.kubectl("delete", "emoe", "moe", "--timeout=90s", limit=100)
    eventually(lambda: gone(moe), 60, "everything of the group is gone")


def test_deleted_while_the_operator_is_away(group: Callable[..., Group]) -> None:
    moe = group()
    labels = ("-l", "app.kubernetes.io/name=elasticmoe-operator")
    kubectl("-n", SYSTEM, "scale", "deployment", *labels, "--replicas=0")
    try:
        moe.kubectl("delete", "emoe", "moe", "--wait=false")
        assert moe.body()["metadata"]["deletionTimestamp"]
        assert moe.status()["readyReplicas"] == 2
    finally:
        kubectl("-n", SYSTEM, "scale", "deployment", *labels, "--replicas=1")
        operator_ready()
    eventually(lambda: gone(moe), 90, "everything of the group is gone")


def test_other_arguments_restart_the_group_in_place(group: Callable[..., Group]) -> None:
    moe = group()
    before, revision = moe.uids(), moe.status()["revision"]["hash"]
    with moe.traffic() as users:
        moe.with_engine(args=["/opt/sim-model", "--max-num-seqs", "64"])
        moe.phase("Update", "Restart")
        moe.settled(2)
        users.progress(10)
        result = users.stop()
    assert result.failed == 0, result.errors
    assert moe.uids() == before
    assert moe.restarts() == 0
    assert moe.status()["revision"]["hash"] != revision
    assert moe.history()[-1] == "Restart 2->2 Succeeded"


def test_another_pod_template_restarts_the_group_with_new_pods(group: Callable[..., Group]) -> None:
    moe = group()
    before = moe.uids()
    moe.with_engine(env=[{"name": "SIM_TOKEN_S", "value": "0.005"}])
    moe.phase("Drain")
    assert moe.reason("Progressing") == "True/Restarting"
    moe.settled(2, limit=120)
    after = moe.uids()
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    assert moe.history()[-1] == "Restart 2->2 Succeeded"


def test_a_lost_child_is_made_again(group: Callable[..., Group]) -> None:
    moe = group()
    moe.kubectl("delete", "deployment", "moe-coordinator")
    eventually(lambda: "Deployment/moe-coordinator" in children(moe), 30, "a coordinator again")
    moe.settled(2)
    moe.scale(3)
    moe.settled(3)
    assert moe.status()["engineGeneration"] == 1


def test_two_groups_side_by_side(group: Callable[..., Group]) -> None:
    one, other = group("one"), group("other")
    uids = other.uids()
    one.scale(3)
    one.settled(3)
    one.kubectl("delete", "emoe", "one", "--timeout=60s", limit=70)
    other.settled(2)
    assert other.uids() == uids
    assert other.status()["engineGeneration"] == 1


def test_keys_rotate_when_the_annotation_says_so(group: Callable[..., Group]) -> None:
    moe = group()
    before = moe.get("secret", "moe-keys")["data"]
    moe.kubectl("annotate", "emoe", "moe", "elasticmoe.io/rotate-keys=once")
    eventually(lambda: moe.get("secret", "moe-keys")["data"] != before, 30, "new keys")
    moe.scale(3)
    moe.settled(3)
    assert moe.status()["engineGeneration"] == 1
