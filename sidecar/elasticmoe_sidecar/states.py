"""What launcher and gate answer, typed. Unknown fields are ignored, missing ones have a default."""

from __future__ import annotations

import msgspec
from elasticmoe_protocol.messages import EnginePhase, Exit, Fence, ScaleState


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """The launcher's engine."""

    phase: EnginePhase = "absent"
    launch: str | None = None
    rank: int | None = None
    size: int | None = None
    exit: Exit | None = None


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """Where the launcher listens for users."""

    host: str = ""
    port: int = 0


class LauncherFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher knows of the engine that it can start. num_experts: None not known yet.

    The last three as in `Facts`.
    """

    engine: str = "vllm"
    engine_version: str | None = None
    model: str | None = None
    num_experts: int | None = None
    fingerprint: str | None = None
    flags: str | None = None
    command: str = ""
    next_command: str = ""
    next_problem: str = ""


class LauncherState(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /state` of the launcher."""

    boot: str
    warm: bool = False
    engine: EngineState = EngineState()
    ready: bool = False
    serving: Serving = Serving()
    probe_port: int = 0
    facts: LauncherFacts | None = None
    error: str | None = None


class OperationState(msgspec.Struct, frozen=True, kw_only=True):
    """A resize in the gate's memory. status: the engine's HTTP status, None while it runs."""

    operation: str
    target: int
    state: ScaleState
    status: int | None = None
    error: str | None = None


class GateState(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /state` of the gate; fields as in `GateReport`."""

    launch: str = ""
    fence: Fence = "open"
    in_flight: int = 0
    held: int = 0
    open_connections: int = 0
    idle_s: float = 0.0
    lag_s: float = 0.0
    progress: int = 0
    completed: int = 0
    late_refused: int = 0
    hold_refused: int = 0
    scaling: bool = False
    retired: bool = False
    dp_size: int | None = None
    pause_mode: str | None = None
    operation: OperationState | None = None


class PhaseState(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /phase` of the gate: the engine's shared view of a resize."""

    phase: str | None = None
    epoch: int | str | None = None
    error: str | None = None


class PreflightState(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `POST /preflight`."""

    check: str
    ok: bool
    reason: str | None = None
