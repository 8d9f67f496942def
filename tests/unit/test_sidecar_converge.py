"""What a sidecar does next, against a model of launcher and gate."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from elasticmoe_protocol.messages import Goal, LaunchSpec, PreflightSpec, Record, ScaleOrder
from elasticmoe_sidecar.converge import (
    Observed,
    RunPreflight,
    SetFence,
    SetReady,
    StartEngine,
    StartScale,
    Step,
    StopEngine,
    next_step,
)
from elasticmoe_sidecar.journal import Started
from elasticmoe_sidecar.states import EngineState, GateState, LauncherState, OperationState
from hypothesis import given
from hypothesis import strategies as st

FENCES = ("open", "lame_duck", "closed", "paused")


def launch(name: str = "L1", rank: int = 0) -> LaunchSpec:
    return LaunchSpec(
        launch=name,
        rank=rank,
        size=2,
        joiner=False,
        master_address="127.0.0.1",
        rpc_port=1,
        redundant_experts=0,
        max_size=4,
    )


def preflight(check: str) -> PreflightSpec:
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


def goal(**fields: object) -> Goal:
    base = Goal(
        deployment="d", instance="i", term=1, seq=1, generation=1, record=Record(generation=1)
    )
    return msgspec.structs.replace(base, **fields)


def order(operation: str = "op1", target: int = 3) -> ScaleOrder:
    return ScaleOrder(operation=operation, target=target, drain_timeout_s=60)


def launcher(phase: str = "absent", name: str = "", **fields: object) -> LauncherState:
    state = LauncherState(boot="B1", engine=EngineState(phase=phase, launch=name))
    return msgspec.structs.replace(state, **fields)


# --- single rules ------------------------------------------------------------------------------


def test_nothing_is_done_while_the_launcher_is_not_known():
    assert next_step(goal(launch=launch()), Observed()) is None


def test_an_absent_engine_is_started():
    assert next_step(goal(launch=launch()), Observed(launcher=launcher())) == StartEngine(launch())


@pytest.mark.parametrize(("kill", "grace"), [(False, 10), (True, 0)])
def test_another_launch_is_stopped_first_and_killed_without_grace(kill, grace):
    observed = Observed(launcher=launcher("running", "L0"))
    step = next_step(goal(launch=launch(), kill=kill), observed)
    assert step == StopEngine("L0", grace)


def test_a_stop_under_way_becomes_a_kill_but_is_not_repeated():
    stopping = launcher("stopping", "L1")
    graceful = Observed(launcher=stopping, stopped=StopEngine("L1", 10))
    assert next_step(goal(), graceful) is None
    assert next_step(goal(kill=True), graceful) == StopEngine("L1", 0)
    killed = Observed(launcher=stopping, stopped=StopEngine("L1", 0))
    assert next_step(goal(kill=True), killed) is None
    assert next_step(goal(), killed) is None


def test_a_launch_that_exited_is_not_started_again():
    assert next_step(goal(launch=launch()), Observed(launcher=launcher("exited", "L1"))) is None


def test_an_exited_engine_is_cleared_for_the_next_launch():
    step = next_step(goal(launch=launch("L2")), Observed(launcher=launcher("exited", "L1")))
    assert step == StopEngine("L1", 0)


def test_a_launch_that_went_with_its_launcher_is_not_started_again():
    known = Observed(launcher=launcher(), started=Started(launch="L1", boot="B0"))
    assert next_step(goal(launch=launch("L1")), known) is None
    assert next_step(goal(launch=launch("L2")), known) == StartEngine(launch("L2"))


def test_a_start_noted_but_never_sent_is_sent():
    noted = Observed(launcher=launcher(), started=Started(launch="L1", boot="B1"))
    assert next_step(goal(launch=launch("L1")), noted) == StartEngine(launch("L1"))


def test_readiness_goes_first_and_comes_last():
    running = launcher("running", "L1", ready=True)
    gate = GateState(launch="L1")
    leaving = goal(launch=launch(), fence="lame_duck", ready=False)
    assert next_step(leaving, Observed(launcher=running, gate=gate)) == SetReady(False)
    back = goal(launch=launch(), fence="open", ready=True)
    unready = launcher("running", "L1")
    closed = GateState(launch="L1", fence="closed")
    assert next_step(back, Observed(launcher=unready, gate=closed)) == SetFence("open")
    assert next_step(back, Observed(launcher=unready, gate=gate)) == SetReady(True)


def test_the_fence_is_closed_before_the_resize_is_sent():
    leaving = goal(launch=launch(), fence="closed", scale=order(target=2))
    running = launcher("running", "L1")
    assert next_step(leaving, Observed(launcher=running, gate=GateState(launch="L1"))) == SetFence(
        "closed"
    )
    closed = GateState(launch="L1", fence="closed")
    assert next_step(leaving, Observed(launcher=running, gate=closed)) == StartScale(
        order(target=2)
    )


@pytest.mark.parametrize("state", ["running", "succeeded", "failed"])
def test_a_resize_that_the_gate_knows_is_not_sent_again(state):
    gate = GateState(launch="L1", operation=OperationState(operation="op1", target=3, state=state))
    observed = Observed(launcher=launcher("running", "L1"), gate=gate)
    assert next_step(goal(launch=launch(), scale=order("op1")), observed) is None


def test_a_second_resize_waits_for_the_running_one():
    running = OperationState(operation="op1", target=3, state="running")
    observed = Observed(
        launcher=launcher("running", "L1"), gate=GateState(launch="L1", operation=running)
    )
    assert next_step(goal(launch=launch(), scale=order("op2")), observed) is None


@pytest.mark.parametrize(("phase", "name"), [("starting", "L1"), ("running", "L0")])
def test_the_gate_of_another_launch_gets_no_orders(phase, name):
    wanted = goal(launch=launch("L1"), scale=order(), fence="closed")
    observed = Observed(launcher=launcher(phase, "L1"), gate=GateState(launch=name))
    if phase == "starting":
        observed = Observed(launcher=launcher(phase, "L1"), gate=GateState(launch="L1"))
    assert next_step(wanted, observed) is None


def test_a_preflight_runs_once_a_check():
    wanted = goal(preflight=preflight("c1"))
    assert next_step(wanted, Observed(launcher=launcher())) == RunPreflight(preflight("c1"))
    assert next_step(wanted, Observed(launcher=launcher(), preflight="c1")) is None


# --- against a model ---------------------------------------------------------------------------


@dataclass
class Model:
    """A launcher and its engines that keep count of what was done to them."""

    boot: str = "B1"
    phase: str = "absent"
    name: str = ""
    ready: bool = False
    fence: str = "open"
    operation: OperationState | None = None
    started: Started | None = None
    stopped: StopEngine | None = None
    check: str = ""
    starts: list[str] = field(default_factory=list)
    scales: list[tuple[str, str]] = field(default_factory=list)

    def observed(self) -> Observed:
        gate = None
        if self.phase == "running":
            gate = GateState(launch=self.name, fence=self.fence, operation=self.operation)
        return Observed(
            launcher=LauncherState(
                boot=self.boot,
                ready=self.ready,
                engine=EngineState(phase=self.phase, launch=self.name or None),
            ),
            gate=gate,
            started=self.started,
            stopped=self.stopped,
            preflight=self.check,
        )

    def do(self, step: Step, arrives: bool = True) -> None:
        """The step's effect; `arrives` False: the sidecar died before its call was heard."""
        if isinstance(step, StartEngine):
            self.started = Started(launch=step.spec.launch, boot=self.boot)
        if not arrives:
            return
        match step:
            case StartEngine(spec):
                assert self.phase == "absent", "a second engine beside the first"
                self.phase, self.name = "starting", spec.launch
                self.fence, self.operation = "open", None
                self.starts.append(spec.launch)
            case StopEngine(name, _):
                assert name == self.name
                self.phase = "absent" if self.phase == "exited" else "stopping"
                self.stopped = step
            case SetFence(mode):
                assert self.phase == "running"
                self.fence = mode
            case StartScale(wanted):
                known = self.operation
                assert known is None or known.operation != wanted.operation
                assert known is None or known.state != "running"
                self.operation = OperationState(
                    operation=wanted.operation, target=wanted.target, state="running"
                )
                self.scales.append((self.name, wanted.operation))
            case SetReady(ready):
                self.ready = ready
            case RunPreflight(spec):
                self.check = spec.check
        if self.phase == "absent":
            self.name = ""

    def happen(self, event: str) -> None:
        """Something that no sidecar ordered."""
        match event, self.phase:
            case "advance", "starting":
                self.phase = "running"
            case "advance", "stopping":
                self.phase, self.name = "absent", ""
            case "advance", "running" if self.operation and self.operation.state == "running":
                self.operation = msgspec.structs.replace(self.operation, state="succeeded")
            case "crash", "starting" | "running":
                self.phase = "exited"
            case "new launcher", _:
                self.boot += "'"
                self.phase, self.name, self.ready = "absent", "", False
            case "new sidecar", _:
                self.stopped, self.check = None, ""


GOALS = st.builds(
    lambda name, kill, fence, scale, ready, check: goal(
        launch=launch(name) if name else None,
        kill=kill,
        fence=fence,
        scale=order(scale) if scale else None,
        ready=ready,
        preflight=preflight(check) if check else None,
    ),
    name=st.sampled_from(["", "L1", "L2", "L3"]),
    kill=st.booleans(),
    fence=st.sampled_from(FENCES),
    scale=st.sampled_from(["", "op1", "op2"]),
    ready=st.booleans(),
    check=st.sampled_from(["", "c1", "c2"]),
)
EVENTS = st.sampled_from(["advance", "crash", "new launcher", "new sidecar", "step", "lost step"])


@given(history=st.lists(st.tuples(GOALS, st.lists(EVENTS, max_size=8)), max_size=6), last=GOALS)
def test_any_history_ends_where_the_last_goal_says(history, last):
    """Launch and operation ids are used as a coordinator does: never again for something new."""
    model = Model()
    for number, (wanted, events) in enumerate(history):
        wanted = unique(wanted, number)
        for event in events:
            step = next_step(wanted, model.observed())
            if "step" in event and step is not None:
                model.do(step, arrives=event == "step")
            else:
                model.happen(event)
    settle(model, unique(last, len(history)))
    assert len(model.starts) == len(set(model.starts)), "a launch was started twice"
    assert len(model.scales) == len(set(model.scales)), "a resize was sent twice"


def unique(wanted: Goal, number: int) -> Goal:
    """Every second goal repeats the launch before it; every fourth a new one."""
    if wanted.launch is None:
        return wanted
    spec = msgspec.structs.replace(wanted.launch, launch=f"{wanted.launch.launch}-{number // 2}")
    return msgspec.structs.replace(wanted, launch=spec)


def settle(model: Model, wanted: Goal) -> None:
    for _ in range(30):
        step = next_step(wanted, model.observed())
        if step is not None:
            model.do(step)
        elif model.phase in ("starting", "stopping") or (
            model.operation and model.operation.state == "running"
        ):
            model.happen("advance")
        else:
            break
    else:
        raise AssertionError("it never settles")
    assert model.ready == wanted.ready
    if wanted.preflight:
        assert model.check == wanted.preflight.check
    if wanted.launch is None:
        assert model.phase == "absent"
        return
    name = wanted.launch.launch
    dead = model.phase in ("exited", "absent")
    assert (model.phase, model.name) == ("running", name) or (dead and name in started_ids(model))
    if model.phase == "running":
        assert model.fence == wanted.fence
        if wanted.scale:
            assert model.operation is not None
            assert model.operation.operation == wanted.scale.operation


def started_ids(model: Model) -> set[str]:
    """Launches that ran, or were at least ordered from a launcher that died."""
    noted = {model.started.launch} if model.started else set()
    return noted | set(model.starts)
