"""A whole group in virtual time: the real rules, sidecars with the real convergence, model engines.

Engines follow what was measured on vLLM 0.33. Each broken promise is noted in `World.broken`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from elasticmoe_coordinator.core.config import GroupConfig
from elasticmoe_coordinator.core.group import Group
from elasticmoe_coordinator.core.learning import Memory
from elasticmoe_coordinator.core.outbox import ProbeAnswer, Rejected, TargetRequest
from elasticmoe_coordinator.core.status import GroupStatus
from elasticmoe_protocol.messages import (
    EngineReport,
    Exit,
    Facts,
    Goal,
    Hello,
    Introduce,
    LaunchSpec,
    PreflightOutcome,
    Refused,
    Report,
    ScaleOrder,
)
from elasticmoe_sidecar import observe
from elasticmoe_sidecar.confirmation import STOOD_STILL_S
from elasticmoe_sidecar.converge import (
    Observed,
    RunPreflight,
    SetFence,
    SetReady,
    StartEngine,
    StartScale,
    StopEngine,
    launch_is_lost,
    next_step,
)
from elasticmoe_sidecar.journal import Started, stale
from elasticmoe_sidecar.states import (
    EngineState,
    GateState,
    LauncherState,
    OperationState,
    PhaseState,
)
from msgspec.structs import replace

STEP = 0.5
BOOT_S = 2.0
PREPARE_S = 2.0
COMMIT_S = 1.0
ENGINE_LIMIT_S = 60.0
"""vLLM's own 300 s, shorter so that histories are."""
STUBBORN_S = 15.0
"""A joiner in its handshake ignores SIGTERM for so long."""


def small_config(**changes: object) -> GroupConfig:
    """Limits that fit `ENGINE_LIMIT_S`."""
    fields: dict[str, object] = {
        "deployment": "moe",
        "min_size": 2,
        "max_size": 4,
        "size": 2,
        "heartbeat": 0.5,
        "stall": 6.0,
        "compile_limit": 12.0,
        "preflight_limit": 20.0,
        "start_limit": 60.0,
        "prepare_limit": 20.0,
        "commit_limit": 15.0,
        "drain_timeout": 20,
        "lame_duck": 2.0,
        "replacement": 10.0,
        "settle": 1.0,
        "learn_limit": 6.0,
        "restart_limit": 50,
        "backoff_max": 4.0,
    } | changes
    return GroupConfig(**fields)  # type: ignore[arg-type]


@dataclass
class Topology:
    """Engines that compute together. broken: a rank died, the others hang."""

    size: int
    engines: dict[int, Engine] = field(default_factory=dict)
    broken: bool = False
    elastic: bool = True
    resize: Resize | None = None

    def alive(self) -> bool:
        return not self.broken and all(e.phase == "running" for e in self.engines.values())


@dataclass
class Resize:
    """A resize inside the engines. told: ranks that got the POST."""

    operation: str
    target: int
    began: float
    told: set[int] = field(default_factory=set)
    committing: float | None = None
    failed: bool = False


@dataclass(eq=False)
class Engine:
    """One engine: API server with gate, and engine core."""

    spec: LaunchSpec
    started: float
    phase: str = "starting"
    topology: Topology | None = None
    rank: int = -1
    fence: str = "open"
    scaling: bool = False
    retired: bool = False
    in_flight: int = 0
    progress: int = 0
    completed: int = 0
    operation: OperationState | None = None
    posted: list[str] = field(default_factory=list)
    stopping: float | None = None
    hangs: bool = False
    command: str = ""
    frozen: bool = False
    exit: Exit | None = None

    @property
    def there(self) -> bool:
        return self.phase != "exited"


@dataclass
class Host:
    """One instance: launcher, engine, sidecar and its journal."""

    name: str
    facts: Facts
    incarnation: str
    launcher_boot: str
    engine: Engine | None = None
    ready: bool = False
    there: bool = True
    frozen_until: float = 0.0
    sidecar_until: float = 0.0
    boot: str = ""
    seq: int = 0
    goal: Goal | None = None
    started: Started | None = None
    stopped: StopEngine | None = None
    preflight: PreflightOutcome | None = None
    unfit: str = ""
    leaving: bool = False
    file: str = ""
    """Revision in the launcher's command file."""
    greeted: bool = False
    hello: int = 0
    confirmed: bool = False
    told_at: float = -9.0
    last_told: Report | None = None
    stop_grace_s: int = 3


@dataclass
class Faults:
    """What goes wrong next: taken by the first engine that it fits."""

    drop: float = 0.0
    delay: float = 0.0
    repeat: float = 0.0
    joiner: str = ""  # "exit", "hang"
    resize: str = ""  # "refuse", "fail_prepare", "fail_commit", "hang"
    start: str = ""  # "exit"
    preflight: str = ""


class World:
    """Everything outside the coordinator's rules, and the clock."""

    def __init__(
        self,
        config: GroupConfig,
        seed: int = 0,
        traffic: bool = True,
        engine_limit: float = ENGINE_LIMIT_S,
        keeps_state: bool = True,
    ) -> None:
        self.config, self.now = config, 1000.0
        self._engine_limit = engine_limit
        self._keeps_state = keeps_state
        self._memory: Memory | None = None
        self._began = self.now
        self._random = random.Random(seed)
        self._ids = (f"i{number}" for number in itertools.count())
        self.hosts: dict[str, Host] = {}
        self.topologies: list[Topology] = []
        self.faults = Faults()
        self.traffic = traffic
        self.long_request_until = 0.0
        self.broken: list[str] = []
        self.amnesia = False
        """A coordinator without a state file led although no sidecar of the group had answered."""
        self.log: list[str] = []
        self.unplanned = False
        """An engine was lost, so requests may have failed."""
        self.starts = 0
        self.recoveries: list[str] = []
        """Why engines were restarted although nobody wanted it."""
        self._routes: dict[str, tuple[str, str]] = {}
        """Instance -> name and boot of the sidecar whose connection goals to it are sent over."""
        self._wire: list[tuple[float, int, str, object]] = []
        self._sent = itertools.count()
        self.coordinator_until = 0.0
        self.group: Group | None = None
        self.restart_coordinator()

    def next_id(self) -> str:
        return next(self._ids)

    # --- what a test does -----------------------------------------------------------------------

    def restart_coordinator(self) -> None:
        self.group = Group(
            self.config, term=1, now=self.now, new_id=self.next_id, memory=self._memory
        )
        self._wire = [one for one in self._wire if one[2] != "up"]
        self._routes.clear()
        self.say("coordinator starts")

    def add(self, name: str, ordinal: int | None = None, **facts: object) -> Host:
        fields: dict[str, object] = {
            "address": name,
            "serving_port": 1,
            "probe_port": 2,
            "rpc_port": 3,
            "ordinal": ordinal,
            "engine_version": "0.33.0",
            "model": "m",
            "num_experts": 8,
            "fingerprint": "f",
            "command": "c0",
        } | facts
        host = Host(name, Facts(**fields), self.next_id(), self.next_id())  # type: ignore[arg-type]
        host.boot = self.next_id()
        self.hosts[name] = host
        self.say(f"{name} is there")
        return host

    def replace_host(self, name: str) -> None:
        """Its pod is gone with everything in it, another one takes the name."""
        old = self.hosts[name]
        self._die(old.engine, "the pod is gone")
        host = self.add(name, old.facts.ordinal)
        host.facts, host.file = old.facts, old.file

    def remove(self, name: str) -> None:
        self._die(self.hosts[name].engine, "the host is gone")
        self.hosts[name].there = False
        self.say(f"{name} is gone")

    def kill_engine(self, name: str) -> None:
        engine = self.hosts[name].engine
        if engine is not None and engine.there:
            self.say(f"engine of {name} is killed")
            self._die(engine, "killed by signal 9")

    def restart_launcher(self, name: str) -> None:
        host = self.hosts[name]
        self.say(f"launcher of {name} is killed")
        self._die(host.engine, "launcher")
        host.engine, host.ready = None, False
        host.launcher_boot = self.next_id()

    def freeze_coordinator(self, seconds: float) -> None:
        self.say(f"coordinator is frozen for {seconds:g} s")
        self.coordinator_until = self.now + seconds

    def freeze_sidecar(self, name: str, seconds: float) -> None:
        self.say(f"sidecar of {name} is frozen for {seconds:g} s")
        self.hosts[name].frozen_until = self.now + seconds
        if seconds >= STOOD_STILL_S:
            self._renew(self.hosts[name])

    def restart_sidecar(self, name: str, away: float = 0.0) -> None:
        host = self.hosts[name]
        self.say(f"sidecar of {name} is killed")
        self._renew(host)
        host.last_told, host.stopped, host.preflight = None, None, None
        host.sidecar_until = self.now + away

    def _renew(self, host: Host) -> None:
        """To the coordinator its sidecar is another one now."""
        host.boot, host.seq, host.greeted, host.confirmed = self.next_id(), 0, False, False
        host.hello = 0

    def write_command(self, revision: str, *names: str) -> None:
        """A new command comes to the files of these (all of them without a name)."""
        for name in names or tuple(self.hosts):
            self.hosts[name].file = revision
        self.say(f"command {revision} comes to {', '.join(names) or 'all'}")

    def put(self, size: int, operation: str = "") -> str:
        assert self.group is not None
        operation = operation or f"put-{self.next_id()}"
        self.group.set_target(TargetRequest(operation, size), self.now)
        self.say(f"target {size}")
        return operation

    def try_put(self, size: int) -> bool:
        try:
            self.put(size)
        except Rejected as refusal:
            self.say(f"target {size} refused: {refusal}")
            return False
        return True

    def try_restart(self) -> bool:
        assert self.group is not None
        try:
            self.group.restart(TargetRequest(f"restart-{self.next_id()}", 0), self.now)
        except Rejected as refusal:
            self.say(f"restart refused: {refusal}")
            return False
        self.say("restart asked for")
        return True

    @property
    def status(self) -> GroupStatus:
        assert self.group is not None
        return self.group.status(self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def until(self, condition: Callable[[], bool], seconds: float = 120.0) -> bool:
        end = self.now + seconds
        while self.now < end:
            if condition():
                return True
            self.step()
        return condition()

    def serving(self, size: int) -> bool:
        """That many engines compute together, and the coordinator says so."""
        status = self.status
        live = [t for t in self.topologies if t.alive() and len(t.engines) == t.size]
        return (
            status.state == "Serving"
            and status.size == size
            and any(t.size == size for t in live)
            and sum(1 for one in status.instances if one.ready) == size
        )

    def say(self, line: str) -> None:
        self.log.append(f"{self.now - self._began:7.1f} {line}")

    def breaks(self, promise: str) -> None:
        self.say(f"BROKEN: {promise}")
        self.broken.append(promise)

    # --- a step ---------------------------------------------------------------------------------

    def step(self) -> None:
        self.now += STEP
        self._engines()
        self._users()
        for host in list(self.hosts.values()):
            self._sidecar(host)
        self._deliver("up")
        if self.now >= self.coordinator_until:
            self._coordinator()
        self._deliver("down")

    def _coordinator(self) -> None:
        assert self.group is not None
        before = self.group.status(self.now)
        outbox = self.group.tick(self.now)
        memory = self.group.memory
        if before.state == "Learning" and memory is not None:
            known = {one.launch for one in (*memory.record.members, *memory.record.joining)}
            live = [topology for topology in self.topologies if topology.alive()]
            launches = {one.spec.launch for two in live for one in two.engines.values()}
            self.amnesia = self.amnesia or (bool(launches) and known.isdisjoint(launches))
        if self._keeps_state:
            self._memory = memory or self._memory
        self.log.extend(
            f"{self.now - self._began:7.1f}   {note.level}: {note.text}" for note in outbox.notes
        )
        for goal in outbox.goals:
            self._send("down", (self._routes[goal.instance], goal))
        for name in outbox.introduce:
            introduce = Introduce(deployment=self.config.deployment)
            self._send("down", (self._routes[name], introduce))
        for probe in outbox.probes:
            host = self.hosts.get(probe.instance)
            engine = self._seen(host) if host and host.there else None
            self.group.probed(ProbeAnswer(probe.instance, engine), self.now)
        self._check_status(before)
        after = self.status.operation
        if after is not None and (before.operation is None or before.operation.id != after.id):
            forced = after.kind == "recover" or after.reason.startswith("prepare did not end")
            self.recoveries += [after.reason] if forced else []

    def _check_status(self, before: GroupStatus) -> None:
        status = self.status
        for one in status.instances:
            host = self.hosts[one.instance]
            engine = host.engine
            if one.safe_to_delete and engine and engine.there and not engine.retired:
                topology = engine.topology
                if topology and topology.alive():
                    self.breaks(f"promise 1: {one.instance} called safe to delete while it serves")
        if before.operation and status.operation and status.operation.id != before.operation.id:
            ended = next((h for h in status.history if h.id == before.operation.id), None)
            if ended is None:
                self.breaks("promise 2: an operation was dropped without an end")

    # --- the wire -------------------------------------------------------------------------------

    def _send(self, way: str, content: object) -> None:
        faults = self.faults
        if self._random.random() < faults.drop:
            return
        copies = 2 if self._random.random() < faults.repeat else 1
        for _ in range(copies):
            late = self._random.random() < faults.delay
            due = self.now + (self._random.random() * 4 if late else 0)
            self._wire.append((due, next(self._sent), way, content))

    def _deliver(self, way: str) -> None:
        due = sorted(one for one in self._wire if one[2] == way and one[0] <= self.now)
        if way == "up" and self.now < self.coordinator_until:
            return
        self._wire = [one for one in self._wire if one not in due]
        for _, _, _, content in due:
            if way == "up":
                self._to_coordinator(content)
            else:
                self._to_sidecar(*content)  # type: ignore[misc]

    def _to_coordinator(self, message: object) -> None:
        assert self.group is not None
        if isinstance(message, Hello):
            if not self.group.hello(message, self.now):
                self._routes[message.instance] = (message.instance, message.boot)
        elif isinstance(message, Report):
            if not self.group.report(message, self.now):
                route = (message.instance, message.boot)
                self._send("down", (route, Introduce(deployment="moe")))
        elif isinstance(message, tuple) and isinstance(message[1], Refused):
            self.group.refused(message[0], message[1], self.now)

    def _to_sidecar(self, route: tuple[str, str], message: object) -> None:
        name, boot = route
        host = self.hosts[name]
        if not host.there or self._away(host) or host.boot != boot:
            return
        if isinstance(message, Introduce):
            host.greeted = False
        elif isinstance(message, Goal):
            if reason := stale(message, host.goal):
                term = host.goal.term if host.goal else -1
                refused = Refused(deployment="moe", reason=reason, term=term)
                self._send("up", (name, refused))
                return
            host.goal, host.confirmed = message, True

    def _away(self, host: Host) -> bool:
        return self.now < max(host.frozen_until, host.sidecar_until)

    # --- sidecars -------------------------------------------------------------------------------

    def _sidecar(self, host: Host) -> None:
        if not host.there or self._away(host):
            return
        for _ in range(4):
            self._read_command(host)
            if not self._converge(host):
                break
        self._read_command(host)
        if not host.greeted:
            host.greeted, host.hello = True, host.hello + 1
            hello = Hello(
                deployment="moe",
                instance=host.name,
                incarnation=host.incarnation,
                boot=host.boot,
                facts=host.facts,
                accepted=host.goal,
                number=host.hello,
            )
            self._send("up", hello)
        self._send("up", self._report(host))
        host.seq += 1

    def _read_command(self, host: Host) -> None:
        """Its launcher looks at its file; without an engine it takes the command over."""
        facts, file = host.facts, host.file
        if file in ("", facts.command):
            facts = replace(facts, next_command="")
        elif host.engine is None:
            facts = replace(facts, command=file, fingerprint=file, next_command="")
        else:
            facts = replace(facts, next_command=file)
        if facts != host.facts:
            host.facts, host.greeted = facts, False

    def _seen(self, host: Host) -> EngineReport:
        wanted = host.goal.launch if host.goal else None
        return observe.engine_report(self._launcher_state(host), wanted, host.started)

    def _report(self, host: Host) -> Report:
        gate = self._gate_state(host)
        watch = host.goal is not None and host.goal.watch
        phase = PhaseState(phase=self._shared_phase(host)) if watch and gate else None
        return Report(
            deployment="moe",
            instance=host.name,
            boot=host.boot,
            seq=host.seq,
            term=host.goal.term if host.goal else -1,
            goal=host.goal.seq if host.goal and host.confirmed else -1,
            leader=host.goal.leader if host.goal else "",
            hello=host.hello,
            launcher=True,
            warm=True,
            engine=self._seen(host),
            gate=observe.gate_report(gate, 0, phase) if gate else None,
            preflight=host.preflight,
            leaving=host.leaving,
        )

    def _shared_phase(self, host: Host) -> str:
        topology = host.engine.topology if host.engine else None
        resize = topology.resize if topology else None
        if resize is None:
            return "idle"
        if resize.failed:
            return "failed"
        return "preparing" if resize.committing is None else "committing"

    def _launcher_state(self, host: Host) -> LauncherState:
        engine = host.engine
        if engine is None:
            state = EngineState()
        else:
            state = EngineState(
                phase="stopping" if engine.stopping and engine.there else engine.phase,  # type: ignore[arg-type]
                launch=engine.spec.launch,
                rank=engine.spec.rank,
                size=engine.spec.size,
                exit=engine.exit,
            )
        return LauncherState(boot=host.launcher_boot, warm=True, engine=state, ready=host.ready)

    def _gate_state(self, host: Host) -> GateState | None:
        engine = host.engine
        if engine is None or engine.phase != "running" or engine.stopping or engine.frozen:
            return None
        return GateState(
            launch=engine.spec.launch,
            fence=engine.fence,  # type: ignore[arg-type]
            in_flight=engine.in_flight,
            open_connections=engine.in_flight,
            progress=engine.progress,
            completed=engine.completed,
            scaling=engine.scaling,
            retired=engine.retired,
            dp_size=engine.topology.size if engine.topology else 0,
            operation=engine.operation,
        )

    def _converge(self, host: Host) -> bool:
        goal = host.goal
        if goal is None:
            return False
        observed = Observed(
            launcher=self._launcher_state(host),
            gate=self._gate_state(host),
            started=host.started,
            stopped=host.stopped,
            preflight=host.preflight.check if host.preflight else "",
            confirmed=host.confirmed,
        )
        step = next_step(goal, observed, host.stop_grace_s)
        match step:
            case None:
                return False
            case StopEngine():
                host.stopped = step
                self._stop(host, step)
            case StartEngine(spec):
                host.started = Started(launch=spec.launch, boot=host.launcher_boot)
                if spec.fingerprint != host.facts.fingerprint:
                    self.say(f"launcher of {host.name} refuses: it has {host.facts.command}")
                    return False
                self._start(host, spec)
            case SetFence(mode):
                assert host.engine is not None
                host.engine.fence = mode
            case SetReady(ready):
                host.ready = ready
            case StartScale(order):
                assert host.engine is not None
                self._post(host.name, host.engine, order)
            case RunPreflight(spec):
                reason = host.unfit or self.faults.preflight
                self.faults.preflight = ""
                host.preflight = PreflightOutcome(check=spec.check, ok=not reason, reason=reason)
        return True

    # --- engines --------------------------------------------------------------------------------

    def _all_engines(self) -> Iterator[tuple[Host, Engine]]:
        for host in self.hosts.values():
            if host.engine is not None:
                yield host, host.engine

    def _start(self, host: Host, spec: LaunchSpec) -> None:
        assert host.engine is None
        self.starts += 1
        for other, engine in self._all_engines():
            mine = engine.topology is not None and engine.topology.alive()
            if not spec.joiner and engine.there and mine and not engine.retired:
                self.breaks(f"{host.name} starts anew while {other.name} serves")
        command = host.facts.command
        host.engine = Engine(spec=spec, started=self.now, rank=spec.rank, command=command)
        self.say(f"{host.name} starts rank {spec.rank} of {spec.size} joiner={spec.joiner}")
        if self.faults.start == "exit":
            self.faults.start = ""
            self._die(host.engine, "CUDA out of memory")
        elif spec.joiner and self.faults.joiner:
            if self.faults.joiner == "exit":
                self._die(host.engine, "CUDA out of memory")
            else:
                host.engine.hangs = True
            self.faults.joiner = ""

    def _stop(self, host: Host, step: StopEngine) -> None:
        engine = host.engine
        assert engine is not None
        if engine.phase == "exited":
            host.engine = None
            return
        if not engine.stopping:
            self._check_stop(host, engine)
        waits = step.grace
        if waits and not (engine.spec.joiner and engine.phase == "starting"):
            waits = 1
        until = self.now + min(waits, STUBBORN_S)
        engine.stopping = min(engine.stopping, until) if engine.stopping else until

    def _check_stop(self, host: Host, engine: Engine) -> None:
        """A planned stop takes nothing from users."""
        topology = engine.topology
        if topology is None or not topology.alive() or engine.retired or self.unplanned:
            return
        resizing = topology.resize is not None and topology.resize.failed
        memory = self.group.memory if self.group else None
        running = memory.record.operation if memory else None
        urgent = running is not None and running.urgent
        if engine.in_flight and self.config.drain_policy == "postpone" and not urgent:
            self.breaks(f"promise 4: {host.name} is stopped with requests in flight ({resizing=})")

    def _die(self, engine: Engine | None, reason: str) -> None:
        if engine is None or engine.phase == "exited":
            return
        topology = engine.topology
        if topology is not None and not engine.retired:
            topology.broken = True
            self.unplanned = True
        engine.phase, engine.in_flight = "exited", 0
        engine.exit = Exit(process="engine core", code=-9, reason=reason)

    def _post(self, name: str, engine: Engine, order: ScaleOrder) -> None:
        topology = engine.topology
        assert topology is not None
        if order.operation in engine.posted:
            self.breaks(f"promise 2: {order.operation} was sent twice to {name}")
        engine.posted.append(order.operation)
        engine.operation = OperationState(
            operation=order.operation, target=order.target, state="running"
        )
        if not topology.elastic:
            self._outcome(engine, 500, "Elastic EP reconfiguration is already active")
            return
        if self.faults.resize == "refuse":
            self._outcome(engine, 400, "cannot retain all model experts")
            return
        if topology.resize is None:
            topology.resize = Resize(order.operation, order.target, self.now)
        if topology.resize.operation != order.operation:
            self.breaks("promise 2: a second resize while one is unresolved")
        topology.resize.told.add(engine.rank)

    def _outcome(self, engine: Engine, status: int, error: str = "") -> None:
        assert engine.operation is not None
        engine.operation = OperationState(
            operation=engine.operation.operation,
            target=engine.operation.target,
            state="succeeded" if status == 200 else "failed",
            status=status,
            error=error,
        )

    def _engines(self) -> None:
        for host, engine in list(self._all_engines()):
            if engine.stopping and self.now >= engine.stopping:
                if engine.topology and not engine.retired:
                    engine.topology.broken = True
                host.engine = None
        self._rendezvous()
        for topology in self.topologies:
            if topology.resize is not None and not topology.resize.failed:
                self._resize(topology, topology.resize)
        self.topologies = [t for t in self.topologies if any(e.there for e in t.engines.values())]

    def _rendezvous(self) -> None:
        """Engines of one start find each other when all are there."""
        waiting = [
            engine
            for _, engine in self._all_engines()
            if engine.phase == "starting"
            and not engine.spec.joiner
            and not engine.stopping
            and engine.topology is None
            and self.now - engine.started >= BOOT_S
        ]
        for engine in waiting:
            mates = {
                one.spec.rank: one
                for one in waiting
                if (one.spec.size, one.spec.master_address)
                == (engine.spec.size, engine.spec.master_address)
            }
            if len(mates) == engine.spec.size and engine.topology is None:
                topology = Topology(engine.spec.size, mates)
                self.topologies.append(topology)
                self._check_mixed(mates)
                for mate in mates.values():
                    mate.topology, mate.phase = topology, "running"
                self.unplanned = False
                self.say(f"{topology.size} engines serve")

    def _check_mixed(self, engines: dict[int, Engine]) -> None:
        commands = {engine.command for engine in engines.values()}
        if len(commands) > 1:
            self.breaks(f"engines with different commands serve together: {sorted(commands)}")

    def _resize(self, topology: Topology, resize: Resize) -> None:
        if topology.broken:
            return
        old = topology.engines
        waited = self.now - resize.began
        joiners = {
            engine.spec.rank: engine
            for _, engine in self._all_engines()
            if engine.phase == "starting"
            and engine.spec.joiner
            and engine.topology is None
            and not engine.stopping
            and engine.spec.size == resize.target
            and self.now - engine.started >= BOOT_S
        }
        hanging = any(engine.hangs for engine in joiners.values())
        complete = set(joiners) == set(range(topology.size, resize.target)) and not hanging
        fault = self.faults.resize
        if resize.committing is None:
            if waited >= self._engine_limit:
                if hanging or fault == "hang":
                    for engine in list(old.values()):
                        self._die(engine, "DistStoreError")
                else:
                    self._fail(topology, resize, 408)
            elif resize.told == set(old) and complete and waited >= PREPARE_S and fault != "hang":
                if fault == "fail_prepare":
                    self.faults.resize = ""
                    self._fail(topology, resize, 500)
                    return
                resize.committing = self.now
                self._commits(topology, resize)
        elif self.now - resize.committing >= COMMIT_S:
            if fault == "fail_commit":
                self.faults.resize = ""
                topology.broken = self.unplanned = True
                self._fail(topology, resize, 500)
                return
            if not complete:  # a joiner died in the commit
                topology.broken = self.unplanned = True
                return
            self._committed(topology, resize, joiners)

    def _commits(self, topology: Topology, resize: Resize) -> None:
        for rank, engine in topology.engines.items():
            engine.scaling = True
            if rank >= resize.target and engine.in_flight:
                if self.config.drain_policy == "postpone":
                    self.breaks(f"promise 4: rank {rank} retires with requests in flight")
                engine.in_flight = 0

    def _committed(self, topology: Topology, resize: Resize, joiners: dict[int, Engine]) -> None:
        for rank, engine in list(topology.engines.items()):
            engine.scaling = False
            self._outcome(engine, 200)
            if rank >= resize.target:
                engine.retired = True
                del topology.engines[rank]
        for rank, engine in joiners.items():
            if rank < resize.target:
                engine.topology, engine.phase = topology, "running"
                topology.engines[rank] = engine
        self._check_mixed(topology.engines)
        topology.size, topology.resize = resize.target, None
        self.say(f"{topology.size} engines serve (resized)")

    def _fail(self, topology: Topology, resize: Resize, status: int) -> None:
        resize.failed, topology.elastic = True, False
        for engine in topology.engines.values():
            if engine.operation is not None and engine.operation.state == "running":
                self._outcome(engine, status, "request draining timed out")

    # --- users ----------------------------------------------------------------------------------

    def _users(self) -> None:
        for host, engine in self._all_engines():
            topology = engine.topology
            moving = topology is not None and topology.alive() and not engine.scaling
            if engine.in_flight and moving and self.now >= self.long_request_until:
                engine.in_flight, engine.completed = 0, engine.completed + 1
                engine.progress += 1
            elif engine.in_flight and moving:
                engine.progress += 1
            open_now = engine.phase == "running" and engine.fence in ("open", "lame_duck")
            # Endpoints propagate late: a lame duck still gets some.
            wanted = host.ready or (engine.fence == "lame_duck" and self._random.random() < 0.2)
            if self.traffic and open_now and not engine.scaling and not engine.stopping and wanted:
                if engine.retired:
                    continue
                engine.in_flight += self._random.random() < 0.6


__all__ = ["Faults", "Host", "World", "launch_is_lost", "small_config"]
