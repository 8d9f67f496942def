"""One operation of the operator: written to the status before anything is done for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from elasticmoe_operator.core.observed import seconds

Kind = Literal["Start", "ScaleUp", "ScaleDown", "Restart"]
"""Start: from nothing. Restart: new pods for a new template. The others: a resize."""

Result = Literal["Succeeded", "Failed", "Withdrawn", "Superseded"]
"""Withdrawn: no engine was told. Superseded: another size was asked for before it was told."""

Phase = Literal[
    "Update", "Restart", "Drain", "CreatePods", "Resize", "Start", "Ready", "RemovePods"
]
"""Update: until all pods have the new command. Restart: a planned warm restart in place.
Drain: all ranks leave, new connections end. CreatePods: until pods are warm and registered.
Resize, Start: the coordinator's operation runs. Ready: until the pods are Ready.
RemovePods: until the surplus pods are gone."""

HISTORY = 5


@dataclass(frozen=True, kw_only=True)
class Operation:
    """started, since (of the phase): Unix seconds. phases: those that ended, in seconds.

    revision: what the group is brought to, of a Restart.
    """

    id: str
    kind: Kind
    from_size: int
    to_size: int
    phase: Phase
    started: float
    since: float
    attempt: int = 1
    message: str = ""
    revision: str = ""
    phases: tuple[tuple[str, float], ...] = ()

    def enter(self, phase: Phase, now: float) -> Operation:
        """The same operation in its next phase."""
        spent = (self.phase, round(max(0.0, now - self.since), 3))
        return replace(self, phase=phase, since=now, message="", phases=(*self.phases, spent))

    def end(self, result: Result, now: float, message: str = "") -> Ended:
        """How it ended."""
        return Ended(operation=self.enter(self.phase, now), result=result, at=now, message=message)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """An operation that ended, for the history."""

    operation: Operation
    result: Result
    at: float
    message: str = ""


def new_id(kind: Kind, size: int, now: float) -> str:
    """Of an operation; new in each millisecond, which is less than a look takes."""
    return f"{kind.lower()}-{size}-{int(now * 1000):x}"


def begin(
    kind: Kind,
    phase: Phase,
    from_size: int,
    to_size: int,
    now: float,
    *,
    attempt: int = 1,
    revision: str = "",
) -> Operation:
    """A new operation."""
    return Operation(
        id=new_id(kind, to_size, now),
        kind=kind,
        from_size=from_size,
        to_size=to_size,
        phase=phase,
        started=now,
        since=now,
        attempt=attempt,
        revision=revision,
    )


# --- in the status ------------------------------------------------------------------------------


def time_text(at: float) -> str:
    """RFC 3339 with milliseconds."""
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def to_status(operation: Operation) -> dict[str, Any]:
    """`status.operation`."""
    return {
        "id": operation.id,
        "kind": operation.kind,
        "from": operation.from_size,
        "to": operation.to_size,
        "phase": operation.phase,
        "startedAt": time_text(operation.started),
        "phaseStartedAt": time_text(operation.since),
        "attempt": operation.attempt,
        "message": operation.message,
        "revision": operation.revision,
        "phases": _phases(operation.phases),
    }


def from_status(status: Mapping[str, Any]) -> Operation:
    """Read `status.operation`."""
    return Operation(
        id=status["id"],
        kind=status["kind"],
        from_size=status["from"],
        to_size=status["to"],
        phase=status["phase"],
        started=seconds(status["startedAt"]),
        since=seconds(status["phaseStartedAt"]),
        attempt=status.get("attempt", 1),
        message=status.get("message", ""),
        revision=status.get("revision", ""),
        phases=tuple((one["name"], one["seconds"]) for one in status.get("phases") or ()),
    )


def ended_to_status(ended: Ended) -> dict[str, Any]:
    """One entry of `status.history`."""
    operation = ended.operation
    return {
        "id": operation.id,
        "kind": operation.kind,
        "from": operation.from_size,
        "to": operation.to_size,
        "result": ended.result,
        "startedAt": time_text(operation.started),
        "endedAt": time_text(ended.at),
        "attempt": operation.attempt,
        "message": ended.message,
        "revision": operation.revision,
        "phases": _phases(operation.phases),
    }


def ended_from_status(status: Mapping[str, Any]) -> Ended:
    """Read one entry of `status.history`."""
    phases = tuple((one["name"], one["seconds"]) for one in status.get("phases") or ())
    operation = Operation(
        id=status["id"],
        kind=status["kind"],
        from_size=status["from"],
        to_size=status["to"],
        phase=phases[-1][0] if phases else "Ready",
        started=seconds(status["startedAt"]),
        since=seconds(status["endedAt"]),
        attempt=status.get("attempt", 1),
        revision=status.get("revision", ""),
        phases=phases,
    )
    return Ended(
        operation=operation,
        result=status["result"],
        at=seconds(status["endedAt"]),
        message=status.get("message", ""),
    )


def _phases(phases: tuple[tuple[str, float], ...]) -> list[dict[str, Any]]:
    return [{"name": name, "seconds": spent} for name, spent in phases]
