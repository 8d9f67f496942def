"""A sidecar process between a scripted coordinator and a fake launcher and gate."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from elasticmoe_protocol.messages import Goal, LaunchSpec, PreflightSpec, ScaleOrder
from elasticmoe_sidecar import agent
from elasticmoe_sidecar.journal import Journal
from elasticmoe_sidecar.settings import Settings
from support.fake_instance import FakeInstance
from support.sidecar import Coordinator, Sidecar, coordinator, until


def launch(name: str = "L1") -> LaunchSpec:
    return LaunchSpec(
        launch=name,
        rank=1,
        size=2,
        joiner=False,
        master_address="127.0.0.1",
        rpc_port=5000,
        redundant_experts=0,
        max_size=4,
    )


def preflight(check: str = "c1") -> PreflightSpec:
    return PreflightSpec(
        check=check,
        slots=4,
        master_address="127.0.0.1",
        master_probe_port=1,
        engine_version="",
        model="",
        fingerprint="",
        flags="",
    )


ORDER = ScaleOrder(operation="op1", target=3, drain_timeout_s=60)


@dataclass
class Scene:
    coordinator: Coordinator
    instance: FakeInstance
    sidecar: Sidecar

    async def running(self, **fields: object) -> None:
        """Bring engine L1 up."""
        await self.coordinator.goal(launch=launch(), **fields)
        await until(lambda: self.instance.effects["start L1"] == 1, "the engine was started")
        await self.instance.engine_runs()
        await self.coordinator.hears(
            "the engine runs", lambda r: r.engine.phase == "running" and r.gate is not None
        )

    async def restart(self) -> None:
        await self.sidecar.kill()
        await self.sidecar.start()


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with (
        coordinator() as boss,
        FakeInstance(tmp_path) as fake,
        Sidecar(tmp_path, boss.address, ordinal=1) as sidecar,
    ):
        await until(lambda: bool(boss.hellos), "the sidecar said Hello")
        yield Scene(boss, fake, sidecar)


async def test_it_introduces_itself_and_reports(scene: Scene):
    hello = scene.coordinator.hellos[-1]
    assert (hello.deployment, hello.instance, hello.accepted) == ("d", "i0", None)
    assert (hello.facts.num_experts, hello.facts.serving_port) == (8, 8000)
    assert (hello.facts.ordinal, hello.facts.rpc_port) == (1, 5000)
    report = await scene.coordinator.hears("warm", lambda report: report.warm)
    assert (report.term, report.goal, report.launcher, report.gate) == (-1, -1, True, None)
    assert report.engine.phase == "absent"


async def test_it_brings_an_engine_up_resizes_it_and_stops_it(scene: Scene):
    boss, fake = scene.coordinator, scene.instance
    await scene.running(ready=True)
    (body,) = [body for call, body in fake.bodies if call == "launcher PUT /engine"]
    assert (body["launch"], body["rank"], body["host_ip"]) == ("L1", 1, "127.0.0.1")
    await until(lambda: fake.ready, "it is ready")
    await boss.goal(launch=launch(), ready=True, scale=ORDER)
    report = await boss.hears("the resize runs", lambda r: bool(r.gate and r.gate.scale))
    assert report.gate is not None
    assert report.gate.scale is not None
    assert (report.gate.scale.operation, report.gate.scale.state) == ("op1", "running")
    fake.operations["op1"] |= {"state": "succeeded", "status": 200}
    await boss.hears(
        "the resize succeeded",
        lambda r: bool(r.gate and r.gate.scale and r.gate.scale.state == "succeeded"),
    )
    await boss.goal(launch=launch(), fence="closed")
    await boss.hears("closed", lambda r: bool(r.gate and r.gate.fence == "closed"))
    assert fake.ready is False
    await boss.goal(launch=None, kill=True)
    await boss.hears("the engine is gone", lambda r: r.engine.phase == "absent")
    assert fake.effects["stop L1 0"] == 1
    assert fake.effects["start L1"] == fake.effects["scale op1"] == 1


async def test_a_preflight_is_answered_while_a_goal_is_obeyed(scene: Scene):
    boss, fake = scene.coordinator, scene.instance
    held = fake.hold("POST /preflight", "received")
    await boss.goal(preflight=preflight())
    await held.reached.wait()
    await boss.goal(preflight=preflight(), launch=launch())
    await until(lambda: fake.effects["start L1"] == 1, "the launch did not wait")
    held.released.set()
    report = await boss.hears("the outcome", lambda r: r.preflight is not None)
    assert report.preflight is not None
    assert (report.preflight.check, report.preflight.ok) == ("c1", True)


async def test_a_kill_does_not_wait_for_a_gate_that_hangs(scene: Scene):
    boss, fake = scene.coordinator, scene.instance
    await scene.running()
    held = fake.hold("PUT /fence", "received")
    await boss.goal(launch=launch(), fence="closed")
    await held.reached.wait()
    began = asyncio.get_running_loop().time()
    await boss.goal(launch=None, kill=True)
    await until(lambda: fake.effects["stop L1 0"] == 1, "the engine was killed")
    assert asyncio.get_running_loop().time() - began < 1.0


async def test_a_gate_that_does_not_answer_is_no_error(scene: Scene):
    await scene.running()
    scene.instance.hold("gate GET /state", "received")
    report = await scene.coordinator.hears("no gate", lambda r: r.gate is None)
    assert (report.error, report.engine.phase) == ("", "running")


async def test_load_and_progress_are_the_own_ranks(scene: Scene):
    boss, fake = scene.coordinator, scene.instance
    fake.gate_state = {"progress": 5, "lag_s": 0.25}
    await scene.running()
    fake.metrics = (
        'vllm:num_requests_running{engine="0"} 9\nvllm:num_requests_running{engine="1"} 2\n'
        'vllm:generation_tokens_total{engine="1"} 100\n'
    )
    report = await boss.hears("load", lambda r: r.load.running == 2)
    assert report.gate is not None
    assert (report.gate.progress, report.gate.lag_s) == (105, 0.25)


async def test_the_phase_is_polled_only_when_the_goal_says_so(scene: Scene):
    boss, fake = scene.coordinator, scene.instance
    await scene.running()
    assert "gate GET /phase" not in fake.calls
    fake.phase_answer = {"phase": "preparing", "epoch": 2, "error": None}
    await boss.goal(launch=launch(), watch=True)
    report = await boss.hears("the phase", lambda r: bool(r.gate and r.gate.phase))
    assert report.gate is not None
    assert (report.gate.phase, report.gate.epoch) == ("preparing", "2")
    await boss.goal(launch=launch())
    await boss.hears("no phase", lambda r: bool(r.gate and not r.gate.phase))


async def test_an_engine_that_exited_is_reported_and_left_alone(scene: Scene):
    fake = scene.instance
    await scene.running()
    exit_ = {"process": "core", "code": -9, "reason": "killed"}
    await fake.engine_gone(phase="exited", launch="L1", rank=1, exit=exit_)
    report = await scene.coordinator.hears("exited", lambda r: r.engine.phase == "exited")
    assert report.engine.exit is not None
    assert report.engine.exit.code == -9
    await scene.restart()
    await scene.coordinator.hears("exited still", lambda r: r.engine.phase == "exited")
    assert fake.effects["start L1"] == 1


async def test_an_engine_that_went_with_its_launcher_counts_as_exited(scene: Scene):
    fake = scene.instance
    await scene.running()
    await fake.new_launcher()
    report = await scene.coordinator.hears("exited", lambda r: r.engine.phase == "exited")
    assert report.engine.launch == "L1"
    await scene.coordinator.goal(launch=launch("L2"))
    await until(lambda: fake.effects["start L2"] == 1, "the next launch was started")
    assert fake.effects["start L1"] == 1


async def test_stale_and_foreign_goals_are_refused(scene: Scene):
    boss, fake = scene.coordinator, scene.instance
    boss.term = 5
    await boss.accepted(await boss.goal())
    for fields in ({"term": 4, "seq": 99}, {"seq": 0}, {"deployment": "other"}):
        before = len(boss.refusals)
        await boss.goal(**({"launch": launch()} | fields))
        await until(lambda count=before: len(boss.refusals) > count, f"{fields} refused")
        assert boss.refusals[-1].term == 5
        assert boss.refusals[-1].reason
    assert fake.effects["start L1"] == 0


async def test_a_new_coordinator_takes_over_and_the_old_one_is_refused(
    scene: Scene, tmp_path: Path
):
    boss, fake = scene.coordinator, scene.instance
    await scene.running()
    old, boss.term = boss.term, 7
    await boss.accepted(await boss.goal(launch=launch(), fence="closed"))
    await boss.goal(term=old, launch=None, kill=True)
    await until(lambda: bool(boss.refusals), "the old coordinator was refused")
    assert boss.refusals[-1].term == 7
    assert fake.effects["stop L1 0"] == 0
    await scene.restart()
    await until(lambda: len({h.boot for h in boss.hellos}) == 2, "it said Hello again")
    accepted = boss.hellos[-1].accepted
    assert accepted is not None
    assert (accepted.term, accepted.fence) == (7, "closed")


@pytest.mark.parametrize(
    ("folder", "why"),
    [("missing", "there is no run folder"), ("x" * 100, "is too long")],
    ids=["missing", "long"],
)
async def test_a_run_folder_that_cannot_do_is_named(tmp_path: Path, folder: str, why: str):
    if folder != "missing":
        (tmp_path / folder).mkdir()
    sidecar = Sidecar(tmp_path, "tcp://127.0.0.1:1", run_dir=str(tmp_path / folder))
    await sidecar.start()
    assert await sidecar.ended() == 1
    (line,) = sidecar.log.read_text().splitlines()
    assert why in line


async def test_it_waits_for_its_launcher(tmp_path: Path):
    fake = FakeInstance(tmp_path)
    async with coordinator() as boss, Sidecar(tmp_path, boss.address):
        report = await boss.hears("no launcher", lambda r: not r.launcher)
        assert "launcher.sock" in report.error
        assert boss.hellos == []
        async with fake:
            await until(lambda: bool(boss.hellos), "Hello once the launcher is there")


async def test_hello_waits_for_the_facts(tmp_path: Path):
    async with coordinator() as boss, FakeInstance(tmp_path) as fake:
        fake.facts = None
        async with Sidecar(tmp_path, boss.address):
            await boss.hears("the launcher", lambda r: r.launcher)
            assert boss.hellos == []
            fake.facts = {"num_experts": 16}
            await until(lambda: bool(boss.hellos), "Hello")
            assert boss.hellos[-1].facts.num_experts == 16


async def test_changed_facts_are_said_before_the_next_report_and_numbered(scene: Scene):
    boss = scene.coordinator
    first = boss.hellos[-1]
    await boss.hears("its number", lambda r: r.hello == first.number > 0)
    scene.instance.facts = {"num_experts": 8, "command": "a", "next_command": "b"}
    report = await boss.hears("facts that changed", lambda r: r.hello > first.number)
    hello = next(one for one in boss.hellos if one.number == report.hello)
    assert (hello.boot, hello.facts.command, hello.facts.next_command) == (first.boot, "a", "b")
    assert report.engine.phase == "absent"


async def test_frozen_and_continued_nothing_happens(scene: Scene):
    boss, fake = scene.coordinator, scene.instance
    await scene.running(ready=True, scale=ORDER)
    await until(lambda: fake.effects["scale op1"] == 1 and fake.ready, "all is done")
    before = fake.effects.copy()
    scene.sidecar.signal(signal.SIGSTOP)
    await asyncio.sleep(3)  # the freeze itself: there is no condition to wait for
    count = len(boss.reports)
    scene.sidecar.signal(signal.SIGCONT)
    await until(lambda: len(boss.reports) > count + 4, "it reports again")
    assert all(report.launcher and report.gate for report in boss.reports[count:])
    assert fake.effects == before


async def test_health_and_metrics_are_served_and_leave_is_local(scene: Scene):
    port = int(scene.sidecar.log.read_text().split("answers on port ")[1].split()[0])
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        assert (await http.get("/livez")).status_code == 200
        assert "elasticmoe_sidecar_reports_total" in (await http.get("/metrics")).text
        assert (await http.post("/livez")).status_code == 405
        assert (await http.post("/leave")).status_code == 404
    assert not scene.coordinator.last().leaving


async def test_a_second_sidecar_in_the_same_folder_is_refused(scene: Scene, tmp_path: Path):
    second = Sidecar(tmp_path, scene.coordinator.address)
    second.log = tmp_path / "second.log"
    await second.start()
    assert await second.ended() == 1
    assert "another sidecar runs in" in second.log.read_text()


async def test_a_port_in_use_is_named(scene: Scene, tmp_path: Path):
    port = int(scene.sidecar.log.read_text().split("answers on port ")[1].split()[0])
    folder = tmp_path / "second"
    folder.mkdir()
    second = Sidecar(folder, scene.coordinator.address, instance="i1", http_port=port)
    await second.start()
    assert await second.ended() == 1
    (line,) = second.log.read_text().splitlines()
    assert f"port {port} (Address already in use): choose another port" in line


async def test_an_order_that_is_refused_is_said_once_and_tried_again(scene: Scene):
    boss, fake = scene.coordinator, scene.instance
    fake.refuse = 3
    await boss.goal(launch=launch())
    await boss.hears("the refusal", lambda r: "refused PUT /engine: 503" in r.error)
    await until(lambda: fake.effects["start L1"] == 1, "it was tried again")
    await boss.hears("no error any more", lambda r: r.error == "")
    assert scene.sidecar.log.read_text().count("refused PUT /engine") == 1


# --- leaving -----------------------------------------------------------------------------------


async def test_sigterm_ends_at_once_where_membership_is_declared(scene: Scene):
    await scene.running()
    scene.sidecar.signal(signal.SIGTERM)
    assert await scene.sidecar.ended() == 0
    assert scene.instance.effects["stop L1 10"] == 0


async def test_the_prestop_hook_waits_for_the_release(scene: Scene):
    boss = scene.coordinator
    transport = httpx.AsyncHTTPTransport(uds=str(scene.sidecar.run_dir / "sidecar.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://sidecar") as http:
        leaving = asyncio.create_task(http.post("/leave", timeout=30))
        await boss.hears("leaving", lambda r: r.leaving)
        assert not leaving.done()
        await boss.goal(released=True)
        assert (await leaving).json() == {"released": True}
    scene.sidecar.signal(signal.SIGTERM)
    assert await scene.sidecar.ended() == 0


@pytest.mark.parametrize("way", ["released", "second SIGTERM", "grace over"])
async def test_sigterm_leaves_gracefully_where_the_group_follows(tmp_path: Path, way: str):
    grace = 1.0 if way == "grace over" else 600.0
    async with (
        coordinator() as boss,
        FakeInstance(tmp_path),
        Sidecar(tmp_path, boss.address, policy="follow", leave_grace_s=grace) as sidecar,
    ):
        await until(lambda: bool(boss.hellos), "Hello")
        sidecar.signal(signal.SIGTERM)
        await boss.hears("leaving", lambda r: r.leaving)
        if way == "released":
            await boss.goal(released=True)
        elif way == "second SIGTERM":
            sidecar.signal(signal.SIGTERM)
        assert await sidecar.ended() == 0


async def test_leave_is_asked_as_often_as_one_likes(scene: Scene):
    boss = scene.coordinator
    transport = httpx.AsyncHTTPTransport(uds=str(scene.sidecar.run_dir / "sidecar.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://sidecar") as http:
        with pytest.raises(httpx.TimeoutException):
            await http.post("/leave", timeout=0.3)  # one that gave up
        both = [asyncio.create_task(http.post("/leave", timeout=30)) for _ in range(2)]
        await boss.hears("leaving", lambda r: r.leaving)
        await boss.goal(released=True)
        assert [(await one).json() for one in both] == [{"released": True}] * 2
        assert (await http.post("/leave")).json() == {"released": True}


@pytest.mark.parametrize("engine", [False, True])
async def test_without_a_coordinator_only_who_has_no_engine_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: bool
):
    monkeypatch.setattr(agent, "ALONE_S", 0.3)
    settings = Settings(
        deployment="d",
        instance="i0",
        coordinator="tcp://127.0.0.1:1",
        run_dir=tmp_path,
        keys_dir=tmp_path,
        address="127.0.0.1",
        rpc_port=1,
    )

    class Nobody:
        async def send(self, message: object) -> None: ...

        async def receive(self) -> Goal:
            await asyncio.Event().wait()
            raise AssertionError

    async with FakeInstance(tmp_path) as fake:
        if engine:
            fake.engine = {"phase": "running", "launch": "L1", "rank": 0}
        alone = agent.Agent(settings, Journal(settings.journal_file, "d", "i0"), Nobody())
        running = asyncio.create_task(alone.run())
        alone.leave.ask()
        try:
            async with asyncio.timeout(2):
                assert await alone.leave.released()
            assert not engine
        except TimeoutError:
            assert engine
        running.cancel()
        await asyncio.wait({running})


async def test_in_a_shared_run_folder_the_group_may_open_its_socket(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    async with coordinator() as boss, FakeInstance(run_dir):
        for mode, expected in ((0o2777, 0o660), (0o700, 0o600)):
            run_dir.chmod(mode)
            seen = len(boss.hellos)
            async with Sidecar(run_dir, boss.address):
                await until(lambda seen=seen: len(boss.hellos) > seen, "Hello")
                assert (run_dir / "sidecar.sock").stat().st_mode & 0o777 == expected
