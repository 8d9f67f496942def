"""Parts that are killed or stand still: the group ends right, by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.cluster import (
    Group,
    eventually,
    operator_pod,
    signal_processes,
)

SLOW = {"SIM_PREPARE_S": "4", "SIM_COMMIT_S": "1"}
FROZEN_S = 10.0
KILL_ENGINE = """
import json, os, signal, urllib.request
state = json.load(urllib.request.urlopen("http://127.0.0.1:7412/state"))
os.kill(state["engine"]["pid"], signal.SIGKILL)
"""


@contextmanager
def frozen(*what: tuple[dict[str, object], str, str]) -> Iterator[None]:
    """Processes stand still for 10 s, and go on also when a test fails."""
    for one in what:
        signal_processes(*one, "STOP")
    timer = threading.Timer(FROZEN_S, lambda: None)
    timer.start()
    try:
        yield
        timer.join()
    finally:
        for one in what:
            signal_processes(*one, "CONT")


def test_frozen_control_plane_cuts_no_stream(group: Callable[..., Group]) -> None:
    moe = group(env=SLOW)
    with moe.traffic() as users:
        moe.scale(3)
        moe.phase("prepare")
        coordinator = (moe.coordinator_pod(), "coordinator", "elasticmoe")
        with frozen((operator_pod(), "operator", "elasticmoe"), coordinator):
            users.progress(20)
        moe.settled(3, limit=120)
        result = users.stop()
    assert result.failed == 0, result.errors
    assert moe.restarts() == 0
    assert moe.status()["engineGeneration"] == 1


def test_nobody_notices_when_all_beside_the_engines_stands_still(
    group: Callable[..., Group],
) -> None:
    moe = group()
    sidecars = [(one, "elasticmoe-sidecar", "sidecar") for one in moe.pods().values()]
    coordinator = (moe.coordinator_pod(), "coordinator", "elasticmoe")
    with moe.traffic() as users:
        with frozen((operator_pod(), "operator", "elasticmoe"), coordinator, *sidecars):
            users.progress(20)
        moe.scale(3)
        moe.settled(3, limit=120)
        result = users.stop()
    assert result.failed == 0, result.errors
    assert moe.restarts() == 0
    assert moe.status()["engineGeneration"] == 1


def test_a_rank_whose_sidecar_is_silent_stays_active(group: Callable[..., Group]) -> None:
    moe = group()
    with moe.traffic() as users:
        with frozen((moe.pods()["moe-1"], "elasticmoe-sidecar", "sidecar")):
            eventually(lambda: moe.coordinated()["reason"] == "RanksSuspect", 6, "RanksSuspect")
            moe.kubectl("annotate", "emoe", "moe", "test=look-now")
            eventually(lambda: moe.reason("Degraded") == "True/RanksSuspect", 5, "Degraded")
            users.progress(5)
            labels = [one["metadata"]["labels"] for one in moe.pods().values()]
            assert [one.get("elasticmoe.io/active") for one in labels] == ["true", "true"]
            assert moe.status()["readyReplicas"] == 2
        moe.settled(2)
        result = users.stop()
    assert result.failed == 0, result.errors
    assert moe.reason("Degraded") == "False/Healthy"
    assert moe.status()["engineGeneration"] == 1


def test_each_sidecar_killed(group: Callable[..., Group]) -> None:
    moe = group()
    with moe.traffic() as users:
        for pod in moe.pods().values():
            signal_processes(pod, "elasticmoe-sidecar", "sidecar", "KILL")
            users.progress(5)
        eventually(
            lambda: moe.coordinated()["reason"] == "AsDesired", 60, "all sidecars heard again"
        )
        moe.scale(3)
        moe.settled(3)
        result = users.stop()
    assert result.failed == 0, result.errors
    assert moe.restarts() == 0
    assert moe.status()["engineGeneration"] == 1


@pytest.mark.parametrize("ordinal", [0, 2])
def test_a_rank_that_is_gone_at_once_is_recovered(
    group: Callable[..., Group], ordinal: int
) -> None:
    moe = group(replicas=3)
    before = moe.uids()
    name = f"moe-{ordinal}"
    moe.kubectl("delete", "pod", name, "--force", "--grace-period=0")
    eventually(lambda: moe.uids().get(name) not in (None, before[name]), 60, "another pod")
    eventually(lambda: moe.status()["engineGeneration"] > 1, 60, "a recovery")
    moe.settled(3, limit=120)
    with moe.traffic() as users:
        users.progress(10)
        assert users.stop().failed == 0


def test_a_joiner_deleted_while_it_joins(group: Callable[..., Group]) -> None:
    moe = group(env=SLOW)
    moe.scale(3)
    moe.phase("prepare")
    moe.kubectl("delete", "pod", "moe-2", "--force", "--grace-period=0")
    moe.settled(3, limit=150)


def test_an_engine_that_dies_is_recovered_in_its_pod(group: Callable[..., Group]) -> None:
    moe = group()
    before = moe.uids()
    moe.kubectl("exec", "moe-1", "-c", "engine", "--", "python3", "-c", KILL_ENGINE)
    eventually(lambda: moe.coordinated()["generation"] > 1, 60, "a recovery")
    moe.settled(2)
    assert moe.uids() == before
    assert moe.restarts() == 0
