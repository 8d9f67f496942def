"""What a group says of itself, for the HTTP API, the command line and metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

GroupState = Literal[
    "Learning", "Waiting", "Starting", "Serving", "Resizing", "Restarting", "Recovering", "Failed"
]
"""Learning: a new coordinator asks who is there. Waiting: too few instances (`message` says more).
Starting, Resizing, Restarting, Recovering: an operation runs. Failed: a person has to look."""

Reason = Literal[
    "AsDesired",
    "BelowMinReplicas",
    "DrainTimeout",
    "Learning",
    "NoTarget",
    "NotElastic",
    "Postponed",
    "RankLost",
    "RanksSuspect",
    "Recover",
    "ResizeFailed",
    "Restart",
    "RestartsExhausted",
    "ScaleDown",
    "ScaleUp",
    "Start",
    "TooFewInstances",
]
"""Why the group is as it is; docs/operations.md says what to do about each. Five name the kind of
the operation that runs."""

InstanceState = Literal[
    "standby", "starting", "joining", "active", "leaving", "retired", "stopping", "exited", "lost"
]


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """Seconds that one phase of an operation took (so far, if it is the running one)."""

    phase: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class OperationStatus:
    """One operation. Times are Unix seconds; fields as in `OperationRecord`."""

    id: str
    kind: str
    from_size: int
    to_size: int
    phase: str
    state: str
    started: float
    ended: float | None
    attempt: int
    reason: str
    error: str
    phases: tuple[PhaseTime, ...]


@dataclass(frozen=True, kw_only=True)
class InstanceStatus:
    """One instance and the rank that it runs.

    incarnation: the pod's UID, or what stands for this life of the instance elsewhere.
    rank: its place in the layout that serves or is being made, None for a standby.
    desired: the group wants it to serve. registered: its sidecar has said hello and reports.
    safe_to_delete: ending it takes nothing from the group.
    waiting, running, kv_cache: the engine's own load.
    command: revision of the command in force, "" for one that did not come in a file. next_command:
    of the one that its next engine starts with, unless next_command_problem says why it can't.
    reason: why it isn't what is desired, one line.
    """

    instance: str
    incarnation: str
    ordinal: int | None
    address: str
    rank: int | None
    state: InstanceState
    desired: bool
    registered: bool
    suspect: bool
    standby: bool
    active: bool
    ready: bool
    fenced: bool
    fence: str
    retired: bool
    safe_to_delete: bool
    leaving: bool
    warm: bool
    in_flight: int
    held: int
    open_connections: int
    late_refused: int
    hold_refused: int
    waiting: float
    running: float
    kv_cache: float
    serving_port: int
    probe_port: int
    engine_version: str
    model: str
    command: str
    next_command: str
    next_command_problem: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class GroupStatus:
    """The whole group.

    size: DP size that serves now, 0 for none. desired: the size it should have.
    reason, message: a word and one line on what keeps the group from its desired size.
    elastic: False after a failed resize: the next one is done as a planned warm restart.
    pause_mode: what the engines do with running requests in a commit ("keep", "wait", "abort").
    """

    deployment: str
    state: GroupState
    reason: Reason
    message: str
    term: int
    generation: int
    policy: str
    size: int
    desired: int
    min_size: int
    max_size: int
    num_experts: int
    slots_per_rank: int
    redundant_experts: int
    elastic: bool
    inelastic_reason: str
    engine_epoch: str
    pause_mode: str
    model: str
    operation: OperationStatus | None
    history: tuple[OperationStatus, ...]
    instances: tuple[InstanceStatus, ...]


def mark(status: GroupStatus) -> str:
    """The same for the same group, whatever its load is and however long its operation takes."""
    loads: dict[str, Any] = dict.fromkeys(_LOADS, 0)
    operation = status.operation and replace(status.operation, phases=())
    instances = tuple(replace(one, **loads) for one in status.instances)
    same = replace(status, operation=operation, instances=instances)
    return f"{hash(same) & 0xFFFFFFFFFFFFFFFF:016x}"


_LOADS = (
    *("in_flight", "held", "open_connections", "late_refused", "hold_refused"),
    *("waiting", "running", "kv_cache"),
)


def plain_fields(source: type) -> dict[str, object]:
    """Fields of one of the classes above that are no class of this file, with their types."""
    hints = get_type_hints(source)
    ours = (OperationStatus, InstanceStatus, PhaseTime)
    return {
        key: hint
        for key, hint in hints.items()
        if not any(one is hint or one in get_args(hint) for one in ours)
    }
