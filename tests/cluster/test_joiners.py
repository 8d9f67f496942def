"""Pods that can't come: the old size serves, the status says why, and it heals by itself."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from support.cluster import Group, eventually

SHORT = {"lameDuckSeconds": 2, "drainTimeoutSeconds": 30, "joinerTimeoutSeconds": 10}


def too_big(group: Callable[..., Group], namespace: str) -> Group:
    """A group of two that asks for a third pod, which the namespace has no room for."""
    moe = group(scaling=SHORT)
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "room"},
        "spec": {"hard": {"pods": "3"}},  # two ranks and a coordinator
    }
    moe.apply(quota)
    moe.scale(3)
    return moe


def test_no_room_for_a_joiner_and_later_there_is(
    group: Callable[..., Group], namespace: str
) -> None:
    moe = too_big(group, namespace)
    eventually(lambda: moe.condition("Degraded").get("status") == "True", 40, "Degraded")
    assert moe.status()["replicas"] == 2
    assert moe.reason("Available") == "True/MinimumRanksReady"
    with moe.traffic() as users:
        users.progress(5)
        assert users.stop().failed == 0
    moe.kubectl("patch", "quota", "room", "-p", json.dumps({"spec": {"hard": {"pods": "9"}}}))
    # The StatefulSet's own controller tries again with pauses that grow.
    moe.settled(3, limit=150)
    assert moe.reason("Degraded") == "False/Healthy"


def test_no_room_for_a_joiner_and_a_lower_target_heals(
    group: Callable[..., Group], namespace: str
) -> None:
    moe = too_big(group, namespace)
    eventually(lambda: moe.condition("Degraded").get("status") == "True", 40, "Degraded")
    moe.scale(2)
    moe.settled(2)
    assert moe.reason("Degraded") == "False/Healthy"
    assert moe.status()["engineGeneration"] == 1


def test_a_joiner_that_no_node_can_take(group: Callable[..., Group]) -> None:
    moe = group(scaling=SHORT)
    nodes = moe.kubectl("get", "nodes", "-o", "name").split()
    workers = [one for one in nodes if "control-plane" not in one]
    try:
        for node in workers:
            moe.kubectl("cordon", node)
        moe.scale(3)
        eventually(lambda: moe.reason("Degraded") == "True/Unschedulable", 40, "Unschedulable")
        assert "moe-2" in moe.condition("Degraded")["message"]
        assert moe.status()["replicas"] == 2
    finally:
        for node in workers:
            moe.kubectl("uncordon", node)
    moe.settled(3, limit=120)


def test_an_image_that_is_not_there_and_then_is(group: Callable[..., Group]) -> None:
    moe = group()
    moe.with_engine(image="elasticmoe-nowhere:0")
    eventually(lambda: moe.reason("Degraded") == "True/ImagePull", 90, "ImagePull")
    assert "elasticmoe-nowhere:0" in moe.condition("Degraded")["message"]
    moe.with_engine(image="elasticmoe-engine-base:dev")
    moe.settled(2, limit=120)
    assert moe.reason("Degraded") == "False/Healthy"


def test_arguments_that_the_engine_refuses_and_then_good_ones(group: Callable[..., Group]) -> None:
    moe = group(wait=False)
    moe.settled(2)
    coordinator = moe.coordinator_pod()["metadata"]["uid"]
    revision = moe.status()["revision"]["hash"]
    moe.with_engine(args=["/opt/sim-model", "--tensor-parallel-size", "many"])
    eventually(lambda: moe.condition("Degraded").get("status") == "True", 60, "Degraded")
    assert "tensor-parallel-size" in moe.condition("Degraded")["message"]
    assert moe.status()["readyReplicas"] == 2
    assert moe.status()["revision"]["hash"] == revision
    moe.with_engine(args=["/opt/sim-model", "--max-num-seqs", "32"])
    # Not after a pause for the arguments before.
    moe.settled(2, limit=20)
    assert moe.history()[-1] == "Restart 2->2 Succeeded"
    assert moe.status()["revision"]["hash"] != revision
    assert moe.reason("Degraded") == "False/Healthy"
    assert moe.coordinator_pod()["metadata"]["uid"] == coordinator


@pytest.mark.parametrize("mended", [[], ["--max-num-seqs", "32"]], ids=["taken back", "mended"])
def test_arguments_that_end_every_start_and_then_good_ones(
    group: Callable[..., Group], mended: list[str]
) -> None:
    """Only the engine knows that they are no good: the group is down until they are mended."""
    moe = group(recovery={"maxRestarts": 1, "stallSeconds": 8, "replacementSeconds": 20})
    moe.with_engine(args=["/opt/sim-model", "--max-num-seqs", "many"])
    eventually(lambda: moe.reason("Degraded") == "True/RestartsExhausted", 90, "no more restarts")
    eventually(lambda: moe.history()[-1] == "Restart 2->2 Failed", 20, "the operation's end")
    moe.with_engine(args=["/opt/sim-model", *mended])
    moe.settled(2, limit=120)
    assert moe.history()[-1] == "Restart 0->2 Succeeded"
    assert moe.reason("Degraded") == "False/Healthy"
