"""One instance: watches its launcher and gate and does the steps that bring it to the goal."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec
from elasticmoe_protocol.messages import (
    EngineReport,
    Facts,
    GateReport,
    Load,
    PreflightOutcome,
    PreflightSpec,
    Report,
)

from elasticmoe_sidecar import observe
from elasticmoe_sidecar.confirmation import Confirmation
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
from elasticmoe_sidecar.engine import Failure, Gate, Launcher
from elasticmoe_sidecar.journal import Journal
from elasticmoe_sidecar.metrics import Metrics
from elasticmoe_sidecar.observe import TokenCount, Watched
from elasticmoe_sidecar.settings import Settings
from elasticmoe_sidecar.states import GateState, LauncherState, PhaseState

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
METRICS_EVERY_S = 1.0
RETRY_AFTER_S = 0.5
MISSING_AFTER_S = 5.0
"""A launcher may come up after its sidecar; after so long a person may want to know."""
REMIND_EVERY_S = 60.0
_NO_ENGINE = Failure("there is no engine")


class Instance:
    """What is, and the way to what should be. `changed` is called when a report would differ."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        confirmation: Confirmation,
        metrics: Metrics,
        changed: Callable[[], None],
    ) -> None:
        self._settings, self._journal, self._metrics = settings, journal, metrics
        self._confirmation, self._changed = confirmation, changed
        host_ip = settings.host_ip or settings.address
        self._launcher = Launcher(settings.launcher_socket, host_ip)
        self._gate = Gate(settings.gate_socket)
        self._look_launcher = Watched(self._launcher.state, LOOK_EVERY_S, self._on_change)
        self._look_gate = Watched(self._read_gate, LOOK_EVERY_S, self._on_change)
        self._work, self._new_goal = asyncio.Event(), asyncio.Event()
        self._engine = EngineReport()
        self._tokens, self._load = TokenCount(), Load()
        self._phase: PhaseState | Failure | None = None
        self._stopped: StopEngine | None = None
        self._step_failure: Failure | None = None
        self._failed: Step | None = None
        self._preflight: asyncio.Task[None] | None = None
        self._check = ""
        self._outcome: PreflightOutcome | None = None

    async def run(self) -> None:
        """Watch and converge for ever."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._look_launcher.run())
                group.create_task(self._watch_gate())
                group.create_task(self._read_metrics())
                group.create_task(self._read_phase())
                group.create_task(self._remind())
                group.create_task(self._converge())
        finally:
            if self._preflight is not None:
                self._preflight.cancel()
            await self._launcher.close()
            await self._gate.close()

    async def looked(self) -> None:
        """Wait until both sides were asked once: a report before that would say nothing true."""
        await self._look_launcher.looked.wait()
        await self._look_gate.looked.wait()

    def obey(self) -> None:
        """The journal has a new goal, or its goal was confirmed."""
        self._step_failure = None
        self._new_goal.set()
        self._work.set()

    @property
    def has_no_engine(self) -> bool:
        """By the launcher's own word, as it says it now."""
        state = self._look_launcher.value
        return state is not None and state.engine.phase == "absent"

    def facts(self, version: str) -> Facts | None:
        """What a Hello says, None as long as the launcher does not know it."""
        state = self._look_launcher.value
        return None if state is None else observe.facts(self._settings, state, version)

    def fill(self, report: Report) -> Report:
        """The report with what is known of launcher and engine.

        While the launcher does not answer it has `launcher=False` and the engine as last seen.
        """
        state, gate = self._look_launcher.value, self._look_gate.value
        return msgspec.structs.replace(
            report,
            launcher=state is not None,
            warm=state is not None and state.warm,
            engine=self._seen_engine(),
            gate=self._seen_gate(gate),
            load=self._load,
            preflight=self._outcome,
            error=report.error or self._error(state),
        )

    def _seen_engine(self) -> EngineReport:
        state, goal = self._look_launcher.value, self._journal.goal
        if state is not None:
            wanted = goal.launch if goal else None
            self._engine = observe.engine_report(state, wanted, self._journal.started)
        return self._engine

    def _seen_gate(self, gate: GateState | None) -> GateReport | None:
        if gate is None:
            return None
        tokens = self._tokens.total if self._tokens.launch == gate.launch else 0
        return observe.gate_report(gate, tokens, self._phase)

    def _error(self, state: LauncherState | None) -> str:
        if state is None:
            failure = self._look_launcher.failure
            return failure.reason if failure else ""
        return self._step_failure.reason if self._step_failure else (state.error or "")

    def _on_change(self) -> None:
        self._work.set()
        self._changed()

    # --- watching -------------------------------------------------------------------------------

    def _has_engine(self) -> bool:
        state = self._look_launcher.value
        return state is not None and state.engine.phase not in ("absent", "exited")

    async def _watch_gate(self) -> None:
        await self._look_launcher.looked.wait()  # it says whether there is a gate to ask
        await self._look_gate.run()

    async def _read_gate(self) -> GateState | Failure:
        return await self._gate.state() if self._has_engine() else _NO_ENGINE

    async def _read_metrics(self) -> None:
        while True:
            gate = self._look_gate.value
            if gate is None:
                self._load = Load()
            elif (rank := self._seen_engine().rank) >= 0:
                text = await self._gate.metrics()
                read = text if isinstance(text, Failure) else observe.load_of(text, rank)
                if not isinstance(read, Failure):
                    self._load = read.load
                    self._tokens.add(gate.launch, read.tokens)
            await asyncio.sleep(METRICS_EVERY_S)

    async def _read_phase(self) -> None:
        """Ask for the shared phase while the goal says so: each call costs the engine something."""
        while True:
            goal = self._journal.goal
            before = self._phase
            watching = goal is not None and goal.watch and self._look_gate.value is not None
            self._phase = await self._gate.phase() if watching else None
            if self._phase != before:
                self._changed()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _remind(self) -> None:
        await asyncio.sleep(MISSING_AFTER_S)
        while True:
            if self._look_launcher.value is None:
                logger.error(
                    "no launcher answers on %s: start it with the same --run-dir (%s); waiting",
                    self._settings.launcher_socket,
                    self._settings.run_dir,
                )
                await asyncio.sleep(REMIND_EVERY_S)
            await asyncio.sleep(MISSING_AFTER_S)

    # --- converging -----------------------------------------------------------------------------

    def _next_step(self) -> Step | None:
        goal = self._journal.goal
        if goal is None:
            return None
        observed = Observed(
            launcher=self._look_launcher.certain,
            gate=self._look_gate.certain,
            started=self._journal.started,
            stopped=self._stopped,
            preflight=self._check,
            confirmed=self._confirmation.holds(),
        )
        return next_step(goal, observed, self._settings.stop_grace_s)

    async def _converge(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while (step := self._next_step()) is not None:
                await self._carry_out(step)

    async def _carry_out(self, step: Step) -> None:
        """Do one step, or drop it half-way when a newer goal wants another one.

        Dropping is safe: each step may have happened or not, and looking again tells.
        """
        if step != self._failed:
            logger.info("step: %s", step)
        self._new_goal.clear()
        doing = asyncio.create_task(self._do(step))
        try:
            while not doing.done():
                newer = asyncio.create_task(self._new_goal.wait())
                await asyncio.wait({doing, newer}, return_when=asyncio.FIRST_COMPLETED)
                newer.cancel()
                self._new_goal.clear()
                if self._next_step() != step:
                    break
        finally:
            doing.cancel()
        if not doing.done():
            await asyncio.wait({doing})
        failure = None if doing.cancelled() else doing.result()
        self._metrics.step(type(step).__name__, failed=failure is not None)
        if not isinstance(step, RunPreflight):
            touched_gate = isinstance(step, SetFence | StartScale)
            (self._look_gate if touched_gate else self._look_launcher).expire()
        if failure != self._step_failure:
            self._step_failure = failure
            self._changed()
        if failure is not None:
            if step != self._failed:
                logger.warning("%s", failure.reason)
            await self._pause()
        self._failed = step if failure is not None else None

    async def _pause(self) -> None:
        """Wait before another try, but not when a newer goal comes."""
        try:
            async with asyncio.timeout(RETRY_AFTER_S):
                await self._new_goal.wait()
        except TimeoutError:
            self._work.set()

    async def _do(self, step: Step) -> Failure | None:
        match step:
            case StopEngine():
                failure = await self._launcher.stop(step)
                if failure is None:
                    self._stopped = step
                return failure
            case StartEngine(spec):
                return self._note_start(spec.launch) or await self._launcher.start(spec)
            case SetReady(ready):
                return await self._launcher.ready(ready)
            case SetFence():
                return await self._gate.fence(step)
            case StartScale():
                return await self._gate.scale(step)
            case RunPreflight(spec):
                self._begin_preflight(spec)
                return None

    def _note_start(self, launch: str) -> Failure | None:
        state = self._look_launcher.value
        if state is None:
            return Failure("the launcher does not answer any more")
        try:
            self._journal.start(launch, state.boot)
        except OSError as error:
            return Failure(f"cannot write {self._settings.journal_file}: {error.strerror}")
        return None

    def _begin_preflight(self, spec: PreflightSpec) -> None:
        if self._preflight is not None:
            self._preflight.cancel()
        self._check = spec.check
        self._preflight = asyncio.create_task(self._check_instance(spec))

    async def _check_instance(self, spec: PreflightSpec) -> None:
        """Its own task: opening the weights takes long, and nothing else waits for it."""
        while True:
            began = time.monotonic()
            outcome = await self._launcher.preflight(spec)
            if not isinstance(outcome, Failure):
                logger.info("preflight %s after %.1f s", outcome, time.monotonic() - began)
                self._outcome = outcome
                self._changed()
                return
            logger.warning("%s", outcome.reason)
            await asyncio.sleep(RETRY_AFTER_S)
