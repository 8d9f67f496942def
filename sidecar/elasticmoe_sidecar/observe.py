"""Looks at launcher and gate again and again, and puts what is into the parts of a report."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from elasticmoe_protocol.messages import (
    EngineReport,
    Exit,
    Facts,
    GateReport,
    LaunchSpec,
    ScaleOutcome,
)

from elasticmoe_sidecar import metrics_text
from elasticmoe_sidecar.converge import launch_is_lost
from elasticmoe_sidecar.engine import Failure
from elasticmoe_sidecar.journal import Started
from elasticmoe_sidecar.settings import Settings
from elasticmoe_sidecar.states import GateState, LauncherState, OperationState, PhaseState

T = TypeVar("T")


class Watched(Generic[T]):
    """The latest answer of one side, read every `interval` seconds, one call at a time.

    `value` is for reports. `fresh` is for decisions: False from the moment at which a step changed
    that side until an answer comes that was asked for later.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[T | Failure]],
        interval: float,
        changed: Callable[[], None],
    ) -> None:
        self._read, self._interval, self._changed = read, interval, changed
        self._epoch = 0
        self._wake = asyncio.Event()
        self.looked = asyncio.Event()
        self.value: T | None = None
        self.failure: Failure | None = None
        self.fresh = False

    @property
    def certain(self) -> T | None:
        """The value if it is fresh."""
        return self.value if self.fresh else None

    def expire(self) -> None:
        """Something was done to that side: what was read before says nothing any more."""
        self._epoch += 1
        self.fresh = False
        self._wake.set()

    async def run(self) -> None:
        """Read for ever."""
        while True:
            self._wake.clear()
            epoch = self._epoch
            answer = await self._read()
            before = (self.value, self.failure, self.fresh)
            if isinstance(answer, Failure):
                self.value, self.failure = None, answer
            else:
                self.value, self.failure = answer, None
            self.fresh = epoch == self._epoch
            self.looked.set()
            if before != (self.value, self.failure, self.fresh):
                self._changed()
            if self.fresh:
                try:
                    async with asyncio.timeout(self._interval):
                        await self._wake.wait()
                except TimeoutError:
                    pass


@dataclass
class TokenCount:
    """Tokens counted over a launch: grows also when the engine begins its series anew."""

    launch: str = ""
    total: int = 0
    _last: int = 0

    def add(self, launch: str, tokens: int) -> None:
        """Note what the engine of this launch says."""
        if launch != self.launch:
            self.launch, self.total, self._last = launch, 0, 0
        self.total += tokens - self._last if tokens >= self._last else tokens
        self._last = tokens


def facts(settings: Settings, state: LauncherState, version: str) -> Facts | None:
    """What a Hello says of this instance, None as long as the launcher does not know it."""
    known = state.facts
    if known is None:
        return None
    num_experts = -1 if known.num_experts is None else known.num_experts
    # A launcher that has an error to tell may never know: better a Hello without the number.
    if num_experts < 0 and not state.error:
        return None
    return Facts(
        address=settings.address,
        serving_port=state.serving.port,
        probe_port=state.probe_port,
        rpc_port=settings.rpc_port,
        ordinal=settings.ordinal,
        engine=known.engine,
        engine_version=known.engine_version or "",
        model=known.model or "",
        num_experts=num_experts,
        fingerprint=known.fingerprint or "",
        flags=known.flags or "",
        product_version=version,
        command=known.command,
        next_command=known.next_command,
        next_problem=known.next_problem,
    )


def engine_report(
    state: LauncherState, wanted: LaunchSpec | None, started: Started | None
) -> EngineReport:
    """The launcher's engine; a wanted one that went with its launcher counts as exited."""
    engine = state.engine
    if wanted is not None and launch_is_lost(wanted.launch, state, started):
        gone = Exit(
            process="launcher",
            code=None,
            reason="the launcher was started anew, its engine went with the old one",
        )
        return EngineReport(
            phase="exited", launch=wanted.launch, rank=wanted.rank, size=wanted.size, exit=gone
        )
    return EngineReport(
        phase=engine.phase,
        launch=engine.launch or "",
        rank=-1 if engine.rank is None else engine.rank,
        size=engine.size or 0,
        exit=engine.exit,
    )


def gate_report(gate: GateState, tokens: int, phase: PhaseState | Failure | None) -> GateReport:
    """What the gate says, the engine's tokens in its progress, and the phase if it was asked."""
    return GateReport(
        launch=gate.launch,
        fence=gate.fence,
        in_flight=gate.in_flight,
        held=gate.held,
        open_connections=gate.open_connections,
        idle_s=gate.idle_s,
        lag_s=gate.lag_s,
        progress=gate.progress + tokens,
        completed=gate.completed,
        late_refused=gate.late_refused,
        hold_refused=gate.hold_refused,
        scaling=gate.scaling,
        retired=gate.retired,
        dp_size=gate.dp_size or 0,
        pause_mode=gate.pause_mode or "",
        scale=_outcome(gate.operation),
        **_phase(phase),
    )


def _outcome(operation: OperationState | None) -> ScaleOutcome | None:
    if operation is None:
        return None
    return ScaleOutcome(
        operation=operation.operation,
        target=operation.target,
        state=operation.state,
        status=operation.status or 0,
        error=operation.error or "",
    )


def _phase(phase: PhaseState | Failure | None) -> dict[str, str]:
    if phase is None:
        return {}
    if isinstance(phase, Failure):
        return {"phase_error": phase.reason}
    return {
        "phase": phase.phase or "",
        "epoch": "" if phase.epoch is None else str(phase.epoch),
        "phase_error": phase.error or "",
    }


def load_of(text: str, rank: int) -> metrics_text.EngineMetrics | Failure:
    """The engine's own metrics, or why they cannot be read."""
    try:
        return metrics_text.read(text, rank)
    except ValueError as error:
        return Failure(f"the engine's metrics cannot be read: {error}")
