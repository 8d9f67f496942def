"""The group's memory: its record, and the verbs that change it.

The record travels with every goal and is journaled by every sidecar, so what is written here before
something is ordered is known to whoever comes after this coordinator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from elasticmoe_protocol.messages import (
    Member,
    OperationKind,
    OperationRecord,
    Record,
    Timings,
)
from msgspec.structs import replace


class Book:
    """Holds the record.

    told: the resize whose participants all know that it may be sent. prepared: the resize that came
    to its phase `prepare` under this coordinator; another one may have been sent by the one before.
    """

    def __init__(self, record: Record, new_id: Callable[[], str], history: int) -> None:
        self.record = record
        self.new_id = new_id
        self._history = history
        self.told = ""
        self.prepared = ""

    @property
    def not_sent(self) -> bool:
        """The running resize was certainly not sent to any engine."""
        return self.prepared == self.running.id != self.told

    @property
    def operation(self) -> OperationRecord | None:
        """The operation that runs."""
        return self.record.operation

    @property
    def running(self) -> OperationRecord:
        """The operation that runs; only for those who know that one does."""
        assert self.record.operation is not None
        return self.record.operation

    @property
    def size(self) -> int:
        """DP size of the layout that serves or last served."""
        return len(self.record.members)

    @property
    def names(self) -> list[str]:
        """The layout's instances in rank order."""
        return [member.instance for member in self.record.members]

    def find(self, operation_id: str) -> OperationRecord | None:
        """An operation, running or ended lately."""
        known = (*self.record.history, *([self.operation] if self.operation else []))
        return next((one for one in reversed(known) if one.id == operation_id), None)

    def update(self, **changes: object) -> None:
        """Change fields of the record."""
        self.record = replace(self.record, **changes)

    # --- the operation --------------------------------------------------------------------------

    def begin(
        self,
        kind: OperationKind,
        phase: str,
        now: float,
        *,
        to_size: int,
        reason: str = "",
        operation_id: str = "",
        drain_timeout: int = 0,
    ) -> None:
        """Begin an operation. operation_id: of who asked for it."""
        assert self.operation is None
        self.update(
            operation=OperationRecord(
                id=operation_id or self.new_id(),
                kind=kind,
                from_size=self.size,
                to_size=to_size,
                phase=phase,
                state="running",
                started=now,
                reason=reason,
                drain_timeout_s=drain_timeout,
                requested=bool(operation_id),
            )
        )

    def phase_since(self) -> float:
        """Unix seconds at which the running phase began."""
        return self.running.started + sum(timing.seconds for timing in self.running.phases)

    def began(self, phase: str) -> float:
        """Unix seconds at which a phase that runs or ran last began."""
        when = found = self.running.started
        for timing in self.running.phases:
            found = when if timing.phase == phase else found
            when += timing.seconds
        return when if self.running.phase == phase else found

    def enter(self, phase: str, now: float) -> None:
        """Go to another phase, or begin the same one anew."""
        took = Timings(phase=self.running.phase, seconds=max(0.0, now - self.phase_since()))
        phases = (*self.running.phases, took)
        if phase == "prepare":
            self.prepared = self.running.id
        self.amend(phase=phase, phases=phases)

    def amend(self, **changes: object) -> None:
        """Change fields of the running operation."""
        self.update(operation=replace(self.running, **changes))

    def end(self, state: str, now: float, error: str = "") -> None:
        """The operation is over; joiners that were not taken in are not part of anything."""
        self.enter("", now)
        ended = replace(self.running, state=state, ended=now, error=error or self.running.error)
        history = (*self.record.history, ended)[-self._history :]
        self.update(operation=None, joining=(), history=history)
        self.told = ""

    def give_up(self, now: float, reason: str, error: str = "") -> None:
        """The operation failed and left engines of which nobody knows enough: start all anew."""
        self.end("failed", now, error or reason)
        self.begin("recover", "kill", now, to_size=self.record.desired, reason=reason)

    # --- the layout -----------------------------------------------------------------------------

    def seats(self, instances: Iterable[str], first_rank: int = 0) -> tuple[Member, ...]:
        """Places for instances, each with a new launch id."""
        return tuple(
            Member(instance=name, rank=rank, launch=self.new_id())
            for rank, name in enumerate(instances, first_rank)
        )
