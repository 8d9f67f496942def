"""`kubectl scale` on a serving group: no request fails, no staying pod is touched."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from support.cluster import Group, eventually


def test_every_size_without_a_failed_request(shared_group: Group) -> None:
    before = shared_group.uids()
    with shared_group.traffic() as users:
        for size in (3, 4, 3, 2, 4, 2):
            shared_group.scale(size)
            status = shared_group.settled(size)
            assert status["expertSlots"]["redundant"] == 8 * size - 16
            uids = shared_group.uids()
            assert {name: uids[name] for name in before} == before
            users.progress(10)
        result = users.stop()
    assert result.failed == 0, result.errors
    assert shared_group.restarts() == 0
    assert shared_group.status()["engineGeneration"] == 1


@pytest.mark.timeout(240)
def test_quickly_back_and_forth_ends_at_the_last(shared_group: Group) -> None:
    before = shared_group.uids()
    with shared_group.traffic() as users:
        for size in (4, 3, 2, 4):
            shared_group.scale(size)
            users.progress(4)
        shared_group.settled(4, limit=150)
        shared_group.scale(2)
        shared_group.settled(2, limit=150)
        result = users.stop()
    assert result.failed == 0, result.errors
    uids = shared_group.uids()
    assert {name: uids[name] for name in before} == before


def test_every_ready_rank_gets_requests_and_a_standby_none(group: Callable[..., Group]) -> None:
    moe = group(replicas=3, scaling={"lameDuckSeconds": 2, "warmStandby": 1})
    assert len(moe.pods()) == 4
    with moe.traffic(clients=6) as users:
        users.progress(60)
    ranks = {"moe-0", "moe-1", "moe-2"}
    ready = {
        one["metadata"]["name"]
        for one in moe.pods().values()
        if any(c["type"] == "Ready" and c["status"] == "True" for c in one["status"]["conditions"])
    }
    assert ready == ranks
    counts = {name: count for name, count in _engines(moe).items() if count}
    assert set(counts) == ranks
    labelled = {
        name
        for name, one in moe.pods().items()
        if one["metadata"]["labels"].get("elasticmoe.io/active") == "true"
    }
    assert labelled == ranks


def _engines(group: Group) -> dict[str, float]:
    """As `answered`, with 0 for a pod without an engine: nobody answers there."""
    found = {}
    for name, pod in group.pods().items():
        try:
            text = httpx.get(f"http://{pod['status']['podIP']}:8000/metrics", timeout=1).text
        except httpx.HTTPError:
            found[name] = 0.0
            continue
        lines = [line for line in text.splitlines() if line.startswith("vllm:request_success")]
        found[name] = sum(float(line.rpartition(" ")[2]) for line in lines)
    return found


def test_a_warm_standby_joins_without_a_new_pod_being_waited_for(
    group: Callable[..., Group],
) -> None:
    moe = group(scaling={"lameDuckSeconds": 2, "warmStandby": 1})
    eventually(lambda: moe.status().get("standbyReplicas") == 1, 60, "a standby")
    standby = moe.uids()["moe-2"]
    moe.scale(3)
    moe.settled(3)
    assert moe.uids()["moe-2"] == standby
    eventually(lambda: len(moe.pods()) == 4, 30, "another standby")


def test_a_planned_restart_fails_no_request(shared_group: Group) -> None:
    before = shared_group.uids()
    generation = shared_group.status()["engineGeneration"]
    with shared_group.traffic() as users:
        asked = shared_group.restart()

        def ended() -> bool:
            history = shared_group.coordinated()["history"]
            return any(one["id"] == asked and one["state"] == "succeeded" for one in history)

        eventually(ended, 60, "the restart succeeded")
        users.progress(10)
        result = users.stop()
    assert result.failed == 0, result.errors
    assert shared_group.uids() == before
    eventually(
        lambda: shared_group.status()["engineGeneration"] == generation + 1,
        30,
        "told in the status",
    )


def test_a_size_outside_of_the_limits_is_clamped_and_said(shared_group: Group) -> None:
    shared_group.scale(1)
    status = shared_group.settled(2)
    assert status["desiredReplicas"] == 2
    assert shared_group.reason("Progressing") == "False/SizeLimited"
    shared_group.scale(50)
    shared_group.settled(4)
    assert shared_group.reason("Progressing") == "False/SizeLimited"
    shared_group.scale(2)
    shared_group.settled(2)
    assert shared_group.reason("Progressing") == "False/AsDesired"
