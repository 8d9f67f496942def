"""Pods that are deleted in each phase of an operation: it ends right all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from support.cluster import SYSTEM, Group, eventually, kubectl, manifest, operator_pod

# Up and down in turn, so that each test begins where the one before ended.
RESIZES = [
    (3, "CreatePods"),
    (2, "lame_duck"),
    (3, "prepare"),
    (2, "prepare"),
    (3, "commit"),
    (2, "RemovePods"),
]
SLOW = [
    {"name": "SIM_BOOT_S", "value": "1"},
    {"name": "SIM_PREPARE_S", "value": "3"},
    {"name": "SIM_COMMIT_S", "value": "2"},
]


def slow_template() -> dict[str, Any]:
    """Every phase takes a few seconds; a pod ends slowly because of a container of the user's."""
    template: dict[str, Any] = manifest("moe")["spec"]["template"]
    (engine,) = template["spec"]["containers"]
    engine["env"] = SLOW
    other = copy.deepcopy({one: engine[one] for one in engine if one not in ("args", "env")})
    words = "trap 'sleep 5; exit 0' TERM; sleep 3600 & wait"
    other |= {"name": "other", "command": ["sh", "-c", words]}
    template["spec"]["containers"].append(other)
    return template


@pytest.fixture(scope="module")
def moe(shared: Callable[..., Group]) -> Group:
    """Two ranks; each test brings it to the size that it begins with."""
    scaling = {"lameDuckSeconds": 4, "drainTimeoutSeconds": 30}
    return shared(template=slow_template(), scaling=scaling)


def begun(moe: Group, size: int, phase: str) -> None:
    """A resize to this size, from the other one of 2 and 3, is in this phase."""
    before = 5 - size
    moe.scale(before)
    moe.settled(before)
    eventually(lambda: len(moe.pods()) == before, 30, f"{before} pods")
    moe.scale(size)
    moe.phase(phase)


def delete(moe: Group, what: str) -> None:
    """A pod of the group by its name, or the operator's or the coordinator's."""
    if what == "operator":
        name = operator_pod()["metadata"]["name"]
        kubectl("-n", SYSTEM, "delete", "pod", name, "--wait=false")
        return
    name = moe.coordinator_pod()["metadata"]["name"] if what == "coordinator" else what
    moe.kubectl("delete", "pod", name, "--wait=false")


@pytest.mark.parametrize(("size", "phase"), RESIZES)
@pytest.mark.parametrize("part", ["operator", "coordinator"])
def test_no_request_fails_when_the_control_plane_is_deleted_in(
    moe: Group, size: int, phase: str, part: str
) -> None:
    generation = moe.status()["engineGeneration"]
    staying = ("moe-0", "moe-1")
    before = moe.uids()
    with moe.traffic() as users:
        begun(moe, size, phase)
        delete(moe, part)
        moe.settled(size, limit=120)
        users.progress(5)
        result = users.stop()
    assert result.failed == 0, result.errors
    after = moe.uids()
    assert {one: after[one] for one in staying} == {one: before[one] for one in staying}
    assert moe.restarts() == 0
    assert moe.status()["engineGeneration"] == generation
    assert (
        moe.history()[-1]
        == f"{'ScaleUp' if size == 3 else 'ScaleDown'} {5 - size}->{size} Succeeded"
    )


@pytest.mark.parametrize("part", ["operator", "coordinator"])
def test_a_first_start_goes_on_when_the_control_plane_is_deleted(
    group: Callable[..., Group], part: str
) -> None:
    starting = group(wait=False, env={"SIM_BOOT_S": "6"})
    starting.phase("Start", limit=90)
    before = starting.uids()
    delete(starting, part)
    starting.settled(2, limit=120)
    assert starting.uids() == before
    assert starting.status()["engineGeneration"] == 1
    assert starting.history() == ["Start 0->2 Succeeded"]


@pytest.mark.parametrize(
    ("size", "phase", "rank"),
    [
        (3, "CreatePods", "moe-0"),
        (2, "lame_duck", "moe-1"),
        (3, "prepare", "moe-1"),
        (2, "RemovePods", "moe-0"),
        (3, "prepare", "moe-2"),
        (2, "lame_duck", "moe-2"),
        (3, "commit", "moe-0"),
    ],
)
def test_the_size_is_reached_when_a_rank_is_deleted_in(
    moe: Group, size: int, phase: str, rank: str
) -> None:
    begun(moe, size, phase)
    before = moe.uids()[rank]
    with moe.traffic() as users:
        delete(moe, rank)
        leaves = size == 2 and rank == "moe-2"

        def replaced() -> bool:
            now = moe.uids().get(rank)
            return now is None if leaves else now not in (None, before)

        eventually(replaced, 90, f"another {rank}")
        moe.settled(size, limit=150)
        users.progress(5)
    assert moe.reason("Degraded") == "False/Healthy"
    assert moe.restarts() == 0


def test_a_rank_that_is_deleted_leaves_in_order_and_no_request_fails(moe: Group) -> None:
    moe.scale(3)
    moe.settled(3)
    before = moe.uids()
    with moe.traffic() as users:
        delete(moe, "moe-1")
        eventually(lambda: moe.uids().get("moe-1") not in (None, before["moe-1"]), 60, "another")
        moe.settled(3, limit=120)
        users.progress(5)
        result = users.stop()
    assert result.failed == 0, result.errors
    after = moe.uids()
    assert {one for one in after if after[one] == before[one]} == {"moe-0", "moe-2"}
