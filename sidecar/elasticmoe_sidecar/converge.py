"""What to do next so that the instance becomes what the goal says. Pure.

Each step may be repeated: launcher and gate know a launch and a resize by their ids. The rules:
an engine with another launch id is gone before the next one starts; a launch that ended by itself
is not started again (that is the coordinator's decision, as a new launch); a resize that the gate
knows is not sent again; what the group has to do together (start, resize) waits until the
coordinator is known to want it still; readiness is taken away first and given last.
"""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_protocol.messages import Fence, Goal, LaunchSpec, PreflightSpec, ScaleOrder

from elasticmoe_sidecar.journal import Started
from elasticmoe_sidecar.states import GateState, LauncherState


@dataclass(frozen=True)
class StopEngine:
    """Stop the engine with this launch id; grace in seconds, 0 for SIGKILL at once."""

    launch: str
    grace: int


@dataclass(frozen=True)
class StartEngine:
    """Start this engine."""

    spec: LaunchSpec


@dataclass(frozen=True)
class SetFence:
    """Put the gate into this mode."""

    mode: Fence


@dataclass(frozen=True)
class StartScale:
    """Have the gate run this resize."""

    order: ScaleOrder


@dataclass(frozen=True)
class SetReady:
    """Have the readiness probe say so."""

    ready: bool


@dataclass(frozen=True)
class RunPreflight:
    """Have the launcher check the instance."""

    spec: PreflightSpec


Step = StopEngine | StartEngine | SetFence | StartScale | SetReady | RunPreflight


@dataclass(frozen=True)
class Observed:
    """What is. launcher, gate: None while not known (no answer, or a step made it stale).

    started: the last engine ordered. stopped: the last stop sent by this process. preflight: id of
    the check that runs or ran last. confirmed: the coordinator sent the goal to this very process,
    which did not stand still since; a journal may be older than the layout that serves now.
    """

    launcher: LauncherState | None = None
    gate: GateState | None = None
    started: Started | None = None
    stopped: StopEngine | None = None
    preflight: str = ""
    confirmed: bool = True


def next_step(goal: Goal, observed: Observed, stop_grace_s: int = 10) -> Step | None:
    """The one step to do now, None when there is none (yet)."""
    launcher = observed.launcher
    if launcher is None:
        return None
    if launcher.ready and not goal.ready:
        return SetReady(False)
    step = _engine_step(goal, observed, launcher, stop_grace_s) or _gate_step(goal, observed)
    if isinstance(step, StartEngine | StartScale) and not observed.confirmed:
        step = None
    if step is not None:
        return step
    if goal.preflight is not None and goal.preflight.check != observed.preflight:
        return RunPreflight(goal.preflight)
    if goal.ready and not launcher.ready:
        return SetReady(True)
    return None


def launch_is_lost(launch: str, launcher: LauncherState, started: Started | None) -> bool:
    """Whether `launch` was ordered from a launcher that is no more, and its engine went with it."""
    return (
        launcher.engine.phase == "absent"
        and started is not None
        and started.launch == launch
        and started.boot != launcher.boot
    )


def _engine_step(
    goal: Goal, observed: Observed, launcher: LauncherState, stop_grace_s: int
) -> Step | None:
    engine, wanted = launcher.engine, goal.launch
    if engine.phase == "absent":
        if wanted is None or launch_is_lost(wanted.launch, launcher, observed.started):
            return None
        return StartEngine(wanted)
    launch = engine.launch or ""
    if wanted is not None and launch == wanted.launch and engine.phase != "stopping":
        return None
    # What ended by itself has nothing left to be graceful about.
    grace = 0 if goal.kill or engine.phase == "exited" else stop_grace_s
    sent = observed.stopped
    if engine.phase == "stopping" and sent and sent.launch == launch and sent.grace <= grace:
        return None
    return StopEngine(launch, grace)


def _gate_step(goal: Goal, observed: Observed) -> Step | None:
    launcher, gate, wanted = observed.launcher, observed.gate, goal.launch
    if launcher is None or gate is None or wanted is None:
        return None
    if launcher.engine.phase != "running" or gate.launch != wanted.launch:
        return None
    if gate.fence != goal.fence:
        return SetFence(goal.fence)
    if goal.scale is None:
        return None
    known = gate.operation
    if known is not None and (known.operation == goal.scale.operation or known.state == "running"):
        return None
    return StartScale(goal.scale)
