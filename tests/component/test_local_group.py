"""A group as processes grows, shrinks and restarts under streaming load; no request fails."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from support.gate import until
from support.local import Local, local_group


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTICMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def group(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """Two ranks; a test leaves as many behind. Two more stand by at the beginning."""
    with local_group(tmp_path_factory.mktemp("g"), spare=2) as local:
        yield local


async def test_a_group_grows_and_shrinks_under_load(group: Local) -> None:
    """2 -> 3 -> 4 -> 2 without a restart."""
    before = await group.serves(2)
    launches = group.launches()
    async with group.users() as load:
        for size, kind in ((3, "scale_up"), (4, "scale_up"), (2, "scale_down")):
            operation = await group.ended(await group.target(size))
            assert (operation["kind"], operation["state"]) == (kind, "succeeded")
            status = await group.serves(size)
            assert status["generation"] == before["generation"]
            load.result.by_rank.clear()
            await load.progress(4 * size)
            assert len(load.result.by_rank) == size, "each rank gets requests, and no other one"
    assert group.launches() == launches, "who stays is not started again"


async def test_a_name_is_used_again_for_a_new_instance(group: Local) -> None:
    """Up right after down: the one that was stopped is not taken for the one that was started."""
    for size in (4, 3, 4, 2):
        operation = await asyncio.to_thread(group.group.scale, size)
        assert operation is not None
        assert operation["state"] == "succeeded", operation
        assert len(group.group.instances()) == size
        status = await asyncio.to_thread(group.group.status)
        assert len(status["instances"]) == size, "who was stopped is not shown"


async def test_the_size_that_it_has_is_no_operation(group: Local) -> None:
    before = await group.serves(2)
    assert await asyncio.to_thread(group.group.scale, 2) is None
    after = await group.serves(2)
    assert after["history"] == before["history"]


async def test_a_planned_restart_under_load(group: Local) -> None:
    before = await group.serves(2)
    launches = group.launches()
    async with group.users():
        operation = await group.ended(await asyncio.to_thread(group.api.restart))
        assert (operation["kind"], operation["state"]) == ("restart", "succeeded")
        after = await group.serves(2)
    assert after["generation"] == before["generation"] + 1
    assert not set(group.launches().values()) & set(launches.values())


@pytest.fixture(scope="module")
def follower(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with local_group(tmp_path_factory.mktemp("f"), policy="follow") as local:
        yield local


async def test_a_group_follows_who_is_there(follower: Local) -> None:
    """Start an instance: scale up. End the highest: scale down. End another one: a restart."""
    group = follower
    before = await group.serves(2)
    async with group.users():
        await asyncio.to_thread(group.group.add)
        grown = await group.serves(3)
        assert [one["kind"] for one in grown["history"]][-1] == "scale_up"

        await leave(group, "r2")
        shrunk = await group.serves(2)
        assert [one["kind"] for one in shrunk["history"]][-1] == "scale_down"
        assert shrunk["generation"] == before["generation"]
        await group.until(
            "r2 is forgotten", lambda s: "r2" not in [i["instance"] for i in s["instances"]]
        )

        await asyncio.to_thread(group.group.add)
        await group.serves(3)
        await leave(group, "r1")
        left = await group.serves(2)
        operations = [one for one in left["history"] if one["id"] not in ids(grown, shrunk)]
        assert [one["kind"] for one in operations] == ["scale_up", "restart"]
        assert "r1 leaves from the middle" in operations[-1]["reason"]
        assert left["generation"] == before["generation"] + 1
        ranks = {one["instance"]: one["rank"] for one in left["instances"] if one["ready"]}
        assert ranks == {"r0": 0, "r2": 1}


def ids(*statuses: dict[str, object]) -> set[str]:
    return {one["id"] for status in statuses for one in status["history"]}  # type: ignore[attr-defined]


async def leave(group: Local, name: str) -> None:
    """SIGTERM to an instance; it ends by itself when it is not needed any more."""
    group.launches()
    await asyncio.to_thread(group.group.stop_instance, name, 30)


async def test_nothing_is_left_after_down(follower: Local) -> None:
    """Every process of every instance is gone, also what a killed `join` had started."""
    group = follower.group
    follower.launches()
    assert len(follower.seen) >= 2 * 5, "launcher, forkserver, sidecar, API server, engine core"
    os.kill(group.pid(group.instances()[-1]) or 0, signal.SIGKILL)
    await asyncio.to_thread(group.down)
    until(follower.gone, 10)
    assert not group.exists
    assert {path.name for path in group.folder.iterdir()} <= {"keys", "faults"}
