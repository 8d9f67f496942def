"""Parts of a group are killed and frozen under streaming load.

Coordinator and sidecars: nobody notices. Engines: the group is back by itself, at its size.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from support.contract import is_gone
from support.local import QUICK, Local, Status, local_group

FROZEN_S = QUICK["stall_s"] + 0.5


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTICMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Each loss counts for a short while only: the tests lose more engines than a group may.
        limits = {"restart_window_s": 3.0, "prepare_limit_s": 7.0}
        with local_group(tmp_path_factory.mktemp("g"), 2, 1, **limits) as local:
            yield local


@pytest.fixture
async def group(shared: Local) -> AsyncIterator[Local]:
    """Two ranks serve, a third instance stands by; without faults."""
    shared.faults.unlink(missing_ok=True)
    await shared.until(
        "the third stands by or serves",
        lambda s: any(one["standby"] or one["rank"] == 2 for one in s["instances"]),
    )
    operation = await shared.target(2)
    if operation is not None:
        await shared.ended(operation)
    await shared.serves(2)
    yield shared
    shared.faults.unlink(missing_ok=True)


# --- coordinator and sidecars: promise 5 ---------------------------------------------------------


async def kill_coordinator(group: Local) -> None:
    pid = group.group.pid("coordinator")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    await asyncio.to_thread(group.group.start_coordinator)
    await group.until("it has learnt", lambda s: s["state"] != "Learning")


async def freeze_coordinator(group: Local) -> None:
    """For longer than what it would call a stall of the engines."""
    pid = group.group.pid("coordinator")
    assert pid is not None
    group.freeze(pid)
    await asyncio.sleep(FROZEN_S)
    group.thaw(pid)


async def kill_sidecar(group: Local) -> None:
    pid = group.sidecar("r1")
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    await group.until("another one answers", lambda s: bool(sidecars(group, "r1") - {pid}))


async def freeze_sidecar(group: Local) -> None:
    pid = group.sidecar("r1")
    group.freeze(pid)
    await group.until("r1 is suspect", lambda s: instance(s, "r1")["suspect"])
    await asyncio.sleep(FROZEN_S)
    assert instance(await asyncio.to_thread(group.status), "r1")["suspect"]
    group.thaw(pid)
    await group.until("r1 is heard again", lambda s: not instance(s, "r1")["suspect"])


Fault = Callable[[Local], Awaitable[None]]
FAULTS = [kill_coordinator, freeze_coordinator, kill_sidecar, freeze_sidecar]


@pytest.mark.parametrize("fault", FAULTS)
async def test_nobody_notices_while_the_group_serves(group: Local, fault: Fault) -> None:
    before, launches = await group.serves(2), group.launches()
    async with group.users() as load:
        await fault(group)
        await load.progress(8)
        after = await group.serves(2)
    assert group.launches() == launches
    assert after["generation"] == before["generation"]
    assert after["history"] == before["history"], "nothing was done about it"


@pytest.mark.parametrize("fault", FAULTS)
async def test_nobody_notices_in_the_middle_of_a_resize(group: Local, fault: Fault) -> None:
    """Up with the fault in `prepare`, down with the fault in `lame_duck`: both end right."""
    before, launches = await group.serves(2), group.launches()
    async with group.users() as load:
        group.faults.write_text("slow=3")
        up = await group.target(3)
        await group.phase("prepare")
        await fault(group)
        assert outcome(await group.ended(up)) == "scale_up succeeded"
        group.faults.write_text("")
        await group.serves(3)
        grown = group.launches()
        assert {name: grown[name] for name in launches} == launches
        await load.progress(8)

        down = await group.target(2)
        # From here on an instance remembers what is done; before, only the coordinator did.
        await group.until("r2 is fenced", lambda s: instance(s, "r2")["fence"] == "lame_duck")
        await fault(group)
        assert outcome(await group.ended(down)) == "scale_down succeeded"
        after = await group.serves(2)
    assert group.launches() == launches
    assert after["generation"] == before["generation"]


# --- engines: a loss is noticed and mended -------------------------------------------------------


async def test_a_killed_engine_core_is_noticed_and_all_start_again(group: Local) -> None:
    before, launches = await group.serves(2), group.launches()
    async with group.users(may_fail=True):
        clock = asyncio.get_running_loop().time
        killed = clock()
        os.kill(group.core("r1"), signal.SIGKILL)
        await group.until(
            "a recovery begins",
            lambda s: (
                s["generation"] == before["generation"]
                and s["operation"]
                and s["operation"]["kind"] == "recover"
            ),
        )
        assert clock() - killed < 2.0
        await back(group, before, launches, 2)
    await unharmed(group)


async def test_a_hung_engine_is_noticed_and_all_start_again(group: Local) -> None:
    """Its core is frozen: requests run, nothing moves, `/health` says 200."""
    before, launches = await group.serves(2), group.launches()
    async with group.users(may_fail=True):
        core = group.core("r1")
        group.freeze(core)
        status = await back(group, before, launches, 2)
    assert "no rank made progress for 3 s" in status["history"][-1]["reason"]
    assert is_gone(core)
    await unharmed(group)


async def test_a_failed_prepare_leaves_the_old_size_and_the_next_resize_restarts(
    group: Local,
) -> None:
    before = await group.serves(2)
    async with group.users() as load:
        group.faults.write_text("1:fail_prepare")
        failed = await group.ended(await group.target(3))
        assert failed["state"] == "failed"
        status = await group.until("not elastic", lambda s: not s["elastic"])
        assert "failed in prepare" in status["inelasticReason"]
        assert (status["size"], status["generation"]) == (2, before["generation"])
        group.faults.write_text("")
        await load.progress(8)

        again = await group.ended(await group.target(3))
        assert outcome(again) == "restart succeeded"
        after = await group.serves(3)
        assert after["elastic"]
        assert after["generation"] == before["generation"] + 1


async def test_a_loss_in_the_middle_of_a_commit_is_recovered_from(group: Local) -> None:
    """Nobody knows the topology then: all engines start again, at the size that was asked for."""
    before, launches = await group.serves(2), group.launches()
    async with group.users(may_fail=True):
        core = group.core("r0")
        group.faults.write_text("slow=10")
        up = await group.target(3)
        await group.phase("commit")
        os.kill(core, signal.SIGKILL)
        assert (await group.ended(up))["state"] == "failed"
        group.faults.write_text("")
        await back(group, before, launches, 3)
    await unharmed(group)


@pytest.mark.parametrize("fault", ["hang_joiner", "crash_core"])
async def test_a_joiner_that_fails_costs_no_request(group: Local, fault: str) -> None:
    """The old size serves on, if need be after a planned restart, and can grow later."""
    await group.serves(2)
    async with group.users() as load:
        group.faults.write_text(f"2:{fault}")
        failed = await group.ended(await group.target(3))
        assert failed["state"] in ("failed", "withdrawn")
        assert failed["error"]
        group.faults.write_text("")
        await load.progress(8)
        if failed["state"] == "failed":
            await group.serves(2)
        grown = await group.target(3)
        assert grown is None or (await group.ended(grown))["state"] == "succeeded"
        await group.serves(3)


async def test_a_failed_commit_is_recovered_from(group: Local) -> None:
    """Also one that fails before any sidecar saw it begin."""
    before, launches = await group.serves(2), group.launches()
    async with group.users(may_fail=True):
        group.faults.write_text("0:fail_commit")
        failed = await group.ended(await group.target(3))
        assert failed["state"] == "failed"
        assert "commit" in failed["error"]
        group.faults.write_text("")
        await back(group, before, launches, 3)
    await unharmed(group)


# --- helpers -------------------------------------------------------------------------------------


async def back(group: Local, before: Status, launches: dict[str, str], size: int) -> Status:
    """Await the next generation at this size; nothing of the one before is left."""
    status = await group.serves(size, before["generation"] + 1, 20)
    assert not set(group.launches().values()) & set(launches.values())
    assert status["history"][-1]["kind"] == "recover"
    return status


async def unharmed(group: Local) -> None:
    """Requests that begin now are all answered."""
    async with group.users():
        pass


async def gone(pid: int) -> None:
    while not is_gone(pid):  # noqa: ASYNC110  the kernel does not call us
        await asyncio.sleep(0.01)


def sidecars(group: Local, name: str) -> set[int]:
    try:
        return {group.sidecar(name)}
    except ValueError:
        return set()


def outcome(operation: Status) -> str:
    return f"{operation['kind']} {operation['state']} {operation['error']}".strip()


def instance(status: Status, name: str) -> Status:
    found: Status = next(one for one in status["instances"] if one["instance"] == name)
    return found
