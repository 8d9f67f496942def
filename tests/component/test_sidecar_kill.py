"""Promise: a sidecar killed at any instant makes nothing happen twice, and nothing not at all.

Each case kills the sidecar (SIGKILL) around one call and starts it again. The coordinator is silent
meanwhile: what the new sidecar does comes from the journal and from what it sees.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from elasticmoe_protocol.messages import LaunchSpec, PreflightSpec, ScaleOrder
from support.fake_instance import FakeInstance
from support.sidecar import Coordinator, Sidecar, coordinator, until


def launch(name: str = "L1") -> LaunchSpec:
    return LaunchSpec(
        launch=name,
        rank=0,
        size=2,
        joiner=False,
        master_address="127.0.0.1",
        rpc_port=5000,
        redundant_experts=0,
        max_size=4,
    )


PREFLIGHT = PreflightSpec(
    check="c1",
    slots=4,
    master_address="127.0.0.1",
    master_probe_port=1,
    engine_version="",
    model="",
    fingerprint="",
    flags="",
)
ORDER = ScaleOrder(operation="op1", target=3, drain_timeout_s=60)


@dataclass(frozen=True)
class Case:
    """A call, the goal that leads to it, its effect, and whether an engine is there before."""

    call: str
    goal: dict[str, Any]
    effect: str
    engine: bool = True


CASES = [
    Case("PUT /engine", {"launch": launch()}, "start L1", engine=False),
    Case("PUT /operations/op1", {"launch": launch(), "scale": ORDER}, "scale op1"),
    Case("DELETE /engine", {"kill": True}, "stop L1 0"),
    Case("PUT /fence", {"launch": launch(), "fence": "closed"}, "fence closed"),
    Case("PUT /ready", {"launch": launch(), "ready": True}, "ready True"),
]
POINTS = ["journaled", "received", "lost", "done", "answered"]


async def bring_up(boss: Coordinator, fake: FakeInstance) -> None:
    await boss.goal(launch=launch())
    await until(lambda: fake.effects["start L1"] == 1, "the engine was started")
    await fake.engine_runs()
    await boss.hears("the engine runs", lambda r: r.engine.phase == "running" and bool(r.gate))


async def run_until(point: str, case: Case, boss: Coordinator, fake: FakeInstance) -> None:
    """Send the goal and return when the sidecar is to be killed."""
    if point == "journaled":
        # With the launcher and the gate mute it accepts the goal and can do nothing for it.
        mute = [fake.hold(f"{side} GET /state", "received") for side in ("launcher", "gate")]
        await mute[0].reached.wait()
        if case.engine:
            await mute[1].reached.wait()
        journal = fake.run_dir / "journal.msgpack"
        before = journal.read_bytes() if journal.exists() else b""
        await boss.goal(**case.goal)
        await until(lambda: journal.exists() and journal.read_bytes() != before, "journaled")
    elif point == "answered":
        await boss.goal(**case.goal)
        await until(lambda: fake.effects[case.effect] == 1, "it happened")
    else:
        held = fake.hold(case.call, point)  # type: ignore[arg-type]
        await boss.goal(**case.goal)
        await held.reached.wait()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.call.replace(" /", "-"))
async def test_killed_around_a_call_its_effect_comes_exactly_once(
    tmp_path: Path, case: Case, point: str
):
    async with (
        coordinator() as boss,
        FakeInstance(tmp_path) as fake,
        Sidecar(tmp_path, boss.address) as sidecar,
    ):
        await until(lambda: bool(boss.hellos), "Hello")
        if case.engine:
            await bring_up(boss, fake)
        await run_until(point, case, boss, fake)
        await sidecar.kill()
        fake.release()
        first = boss.hellos[-1].boot
        await sidecar.start()
        await until(lambda: boss.hellos[-1].boot != first, "it came back")
        assert boss.hellos[-1].accepted is not None
        await until(lambda: fake.effects[case.effect] == 1, "it happened")
        # Several looks and heartbeats later it has still happened once.
        begin = len(boss.reports)
        await until(lambda: len(boss.reports) > begin + 3, "it goes on reporting")
        assert fake.effects[case.effect] == 1
        # Nor was it sent again to a launcher or gate that knew it.
        sent = sum(case.call in call for call in fake.calls)
        assert sent > 1 if point == "lost" else sent == 1
        assert all(count == 1 for name, count in fake.effects.items() if "ready" not in name)


async def test_killed_in_a_preflight_it_checks_again(tmp_path: Path):
    async with (
        coordinator() as boss,
        FakeInstance(tmp_path) as fake,
        Sidecar(tmp_path, boss.address) as sidecar,
    ):
        await until(lambda: bool(boss.hellos), "Hello")
        held = fake.hold("POST /preflight", "received")
        await boss.goal(preflight=PREFLIGHT)
        await held.reached.wait()
        await sidecar.kill()
        fake.release()
        await sidecar.start()
        await boss.hears("the outcome", lambda r: r.preflight is not None and r.preflight.ok)


async def test_killed_at_random_instants_each_launch_and_resize_happens_once(tmp_path: Path):
    """A whole life (start, resize, replace by another launch), the sidecar killed all the time."""
    chance = random.Random(20)
    async with (
        coordinator() as boss,
        FakeInstance(tmp_path) as fake,
        Sidecar(tmp_path, boss.address) as sidecar,
    ):

        async def keep_killing() -> None:
            while True:
                await asyncio.sleep(chance.uniform(0.2, 1.2))
                await sidecar.kill()
                await sidecar.start()

        async def insist(done: str, **goal: Any) -> None:
            """As a coordinator does: the same goal until it is seen to be done."""
            sent = await boss.goal(**goal)
            async with asyncio.timeout(60):
                while not fake.effects[done]:
                    await asyncio.sleep(0.1)
                    await boss.send("i0", sent)

        killer = asyncio.create_task(keep_killing())
        try:
            for number in range(4):
                spec = launch(f"L{number}")
                await insist(f"start L{number}", launch=spec)
                await fake.engine_runs()
                order = ScaleOrder(operation=f"op{number}", target=3, drain_timeout_s=60)
                await insist(f"scale op{number}", launch=spec, scale=order)
        finally:
            killer.cancel()
            await asyncio.wait({killer})
    starts = {name: count for name, count in fake.effects.items() if name.startswith("start")}
    scales = {name: count for name, count in fake.effects.items() if name.startswith("scale")}
    assert starts == {f"start L{number}": 1 for number in range(4)}
    assert scales == {f"scale op{number}": 1 for number in range(4)}
