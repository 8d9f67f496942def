"""The words of the wire protocol.

The protocol is level-triggered. A sidecar sends what *is* (`Report`), the coordinator sends what
*should be* (`Goal`); a goal is whole, so a lost, repeated or reordered message never matters: the
newest goal wins, and it is sent again until a report says that it was accepted.

Every goal carries deployment, term, generation and operation. A receiver journals the newest one
before it obeys and refuses older ones, so a coordinator that was replaced can do nothing any more.
The goal also carries the group's `Record`: together the sidecars are the memory from which a new
coordinator learns what the group was doing.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Fence = Literal["open", "lame_duck", "closed", "paused"]
"""What the gate does with requests.

open: serves. lame_duck: serves with `Connection: close` (the rank is about to leave and is not
Ready). closed: answers 503 with Retry-After and counts it. paused: accepts no new connections, they
wait in the kernel's backlog (a planned warm restart), and answers with `Connection: close`.
"""

EnginePhase = Literal["absent", "starting", "running", "stopping", "exited"]
"""absent: no engine. starting: ordered, its API server does not answer yet. running: its API server
answers. stopping: an ordered stop is under way. exited: it ended and nobody had ordered that."""

ScaleState = Literal["running", "succeeded", "failed"]
OperationKind = Literal["start", "scale_up", "scale_down", "restart", "recover"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of everything that travels."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is. It changes rarely: then the sidecar says Hello again.

    address: host name or IP at which the other ranks reach this instance's engine.
    ordinal: the place that the platform gave it (StatefulSet ordinal); None: order of registration.
    num_experts: routed experts a layer, 0 for a model that is not MoE, -1 when not known yet.
    fingerprint: hash of the engine's flags that must agree in the group; `flags` spells them out.
    command: revision of the command in force, "" for one that didn't come in a file. An engine that
    runs, runs with it; model, experts and flags are its.
    next_command: revision of another one that lies in the file. The next engine starts with it,
    unless next_problem says, in one line, why it can't.
    """

    address: str
    serving_port: int
    probe_port: int
    rpc_port: int
    ordinal: int | None = None
    engine: str = "vllm"
    engine_version: str = ""
    model: str = ""
    num_experts: int = -1
    fingerprint: str = ""
    flags: str = ""
    product_version: str = ""
    command: str = ""
    next_command: str = ""
    next_problem: str = ""


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The engine that should run: exactly the one with this `launch` id.

    launch: unique for each start of an engine; an engine with another id has to go first.
    rank, size: data-parallel rank and DP size of the layout that it starts into.
    joiner: it joins a running group (VLLM_ELASTIC_EP_SCALE_UP_LAUNCH).
    redundant_experts: `num_redundant_experts` at this size.
    command, fingerprint: what all engines of this start have in common, as in `Facts`. A launcher
    with another command in force refuses. Empty strings are not compared.
    """

    launch: str
    rank: int
    size: int
    joiner: bool
    master_address: str
    rpc_port: int
    redundant_experts: int
    max_size: int
    command: str = ""
    fingerprint: str = ""


class ScaleOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Resize the running engine to `target` ranks; the gate runs each operation id once."""

    operation: str
    target: int
    drain_timeout_s: int


class PreflightSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Check this instance before the old ranks are told anything.

    slots: expert slots a rank. master_*: where rank 0's launcher listens. The rest is what the
    group runs and a joiner must match. An empty string is not compared.
    """

    check: str
    slots: int
    master_address: str
    master_probe_port: int
    engine_version: str
    model: str
    fingerprint: str
    flags: str


class PreflightOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a PreflightSpec; `reason` is one line that says what to do."""

    check: str
    ok: bool
    reason: str = ""


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine ended without an order. code: exit status, minus a signal, None unknown."""

    process: str
    code: int | None
    reason: str


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher says of its engine."""

    phase: EnginePhase = "absent"
    launch: str = ""
    rank: int = -1
    size: int = 0
    exit: Exit | None = None


class ScaleOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a ScaleOrder in the engine's own process. status: the engine's HTTP status."""

    operation: str
    target: int
    state: ScaleState
    status: int = 0
    error: str = ""


class GateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate says from inside the API server.

    idle_s: seconds since a request or connection was last there. lag_s: how long ago the API
    server's event loop last moved. progress: grows with every response chunk sent and every token
    that the engine counts. scaling, retired, dp_size: the engine's own process-local state.
    phase, epoch: the engine's shared view of a resize (only read during an operation).
    """

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
    dp_size: int = 0
    pause_mode: str = ""
    phase: str = ""
    epoch: str = ""
    phase_error: str = ""
    scale: ScaleOutcome | None = None


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's own metrics: requests waiting and running, KV cache used (0 to 1)."""

    waiting: float = 0.0
    running: float = 0.0
    kv_cache: float = 0.0


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that each phase of an operation took, in order."""

    phase: str
    seconds: float


class OperationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One operation, running or ended; times are Unix seconds.

    kind: `restart` when a resize had to be done as a planned warm restart; `reason` says why.
    state: "running", "succeeded", "failed" or "withdrawn" (nothing was sent to the engines).
    """

    id: str
    kind: OperationKind
    from_size: int
    to_size: int
    phase: str
    state: str
    started: float
    ended: float | None = None
    attempt: int = 1
    reason: str = ""
    error: str = ""
    phases: tuple[Timings, ...] = ()
    drain_timeout_s: int = 0
    requested: bool = False
    """Somebody PUT it (its id is theirs), it was not the group's own doing."""
    asked: int = 0
    """The size that somebody asked for; `to_size` is smaller when fewer could be had."""
    urgent: bool = False
    """Past the drain limit requests are cut whatever the policy: the engines would die."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One place in a layout: which instance runs which rank, as which launch."""

    instance: str
    rank: int
    launch: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the group is and is doing, kept by every sidecar for the next coordinator.

    members: the layout that serves (or last served). joining: instance, rank and launch of joiners
    of the running operation. slots: expert slots a rank, fixed for the group's life; 0 unknown.
    elastic: False after a failed prepare, `inelastic_reason` says why.
    """

    generation: int
    members: tuple[Member, ...] = ()
    joining: tuple[Member, ...] = ()
    desired: int = 0
    slots: int = 0
    elastic: bool = True
    inelastic_reason: str = ""
    operation: OperationRecord | None = None
    history: tuple[OperationRecord, ...] = ()
    restarts: tuple[float, ...] = ()
    """Unix seconds of the latest unplanned recoveries: their bound survives a new coordinator."""


# --- sidecar -> coordinator ---------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First word of a connection, and the answer to `Introduce`.

    boot: made anew at each start of the sidecar. incarnation: names the instance's pod or process
    tree (pod UID); of two with one name the newer incarnation wins.
    accepted: the newest goal in the journal, whole, or None.
    number: grows with every Hello of this boot, 0 in one of an older version.
    """

    deployment: str
    instance: str
    incarnation: str
    boot: str
    facts: Facts
    accepted: Goal | None = None
    number: int = 0


class Report(Message, frozen=True, kw_only=True, tag="report"):
    """Heartbeat: sent every interval and at once when something changed.

    seq: grows with every report of this boot. term, leader: of the newest goal accepted. goal: its
    number, -1 when there is none or when it did not come to this boot of the sidecar, but lay in
    its journal: the coordinator has to say it again.
    hello: number of the newest Hello said before: who missed that one asks for another.
    launcher: the launcher answers on its socket. gate: None while the API server does not answer.
    leaving: the instance was told to go (SIGTERM) and waits to be released.
    """

    deployment: str
    instance: str
    boot: str
    seq: int
    term: int = -1
    goal: int = -1
    leader: str = ""
    hello: int = 0
    launcher: bool = True
    warm: bool = False
    engine: EngineReport = EngineReport()
    gate: GateReport | None = None
    load: Load = Load()
    preflight: PreflightOutcome | None = None
    leaving: bool = False
    error: str = ""


# --- coordinator -> sidecar ---------------------------------------------------------------------


class Goal(Message, frozen=True, kw_only=True, tag="goal"):
    """What one instance should be. Whole, so the newest (term, seq) is all a sidecar needs.

    leader: the coordinator process that leads this term. Two that could not know of each other may
    take the same term; the sidecars obey the first of them and the other one learns again.
    launch: the engine that should run, None for none. kill: stop without grace (SIGKILL).
    ready: what the readiness probe answers. released: a leaving instance may end now.
    watch: poll the engine's shared phase (only during an operation: the poll costs the engine).
    """

    deployment: str
    instance: str
    term: int
    seq: int
    leader: str = ""
    generation: int
    operation: str = ""
    launch: LaunchSpec | None = None
    kill: bool = False
    fence: Fence = "open"
    scale: ScaleOrder | None = None
    preflight: PreflightSpec | None = None
    ready: bool = False
    watch: bool = False
    released: bool = False
    record: Record


class Introduce(Message, frozen=True, kw_only=True, tag="introduce"):
    """A report came from an instance that this coordinator has not met: say Hello."""

    deployment: str


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Either side says why it will not do what it was told (stale term, other version, no entry).

    term: the highest term that the refusing side has seen, so that a new coordinator can pass it.
    """

    deployment: str
    reason: str
    term: int = -1


ToCoordinator = Hello | Report | Refused
ToSidecar = Goal | Introduce | Refused
