"""What the operator's tests share: specs, pods and groups, and a whole cluster in virtual time.

`World` is Kubernetes and a coordinator as far as the operator sees them: a StatefulSet that makes
and removes pods by ordinal, nodes that vanish, a group that is resized, fails, withdraws, recovers
and forgets. It keeps what really runs, so that it knows when a promise is broken.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elasticmoe_operator.core import actions, status
from elasticmoe_operator.core import observed as seen
from elasticmoe_operator.core.observed import (
    Group,
    GroupOperation,
    Instance,
    Observed,
    Pod,
    Problem,
    Ranks,
)
from elasticmoe_operator.core.plan import Plan, plan
from elasticmoe_operator.core.spec import Spec, read

NOW = 1_800_000_000.0
TEMPLATE: Mapping[str, Any] = {
    "spec": {"containers": [{"name": "engine", "image": "vllm:1", "args": ["some/model"]}]}
}


def body(replicas: int = 3, **changes: Any) -> dict[str, Any]:
    """An ElasticMoEDeployment. changes: of its spec; `meta` of its metadata."""
    meta = changes.pop("meta", {})
    return {
        "metadata": {
            "name": "moe",
            "namespace": "ns",
            "uid": "cr",
            "generation": 1,
            "resourceVersion": "7",
            "finalizers": ["elasticmoe.io/drain"],
            **meta,
        },
        "spec": {
            "replicas": replicas,
            "minReplicas": 2,
            "maxReplicas": 6,
            "template": TEMPLATE,
            **changes,
        },
    }


def spec(replicas: int = 3, **changes: Any) -> Spec:
    return read(body(replicas, **changes))


DELETED = {"deletionTimestamp": "2027-01-01T00:00:00Z"}


def other_template(image: str = "vllm:2", args: Sequence[str] = ("some/model",)) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "engine", "image": image, "args": list(args)}]}}


def ranks(replicas: int = 3, of: Spec | None = None, **changes: Any) -> Ranks:
    of = of or spec()
    known = {"revision": of.revision, "pod_revision": of.pod_revision}
    known |= {"image": "elasticmoe:1", "max_replicas": 6}
    return Ranks(**{"replicas": replicas, **known, **changes})


def pod(ordinal: int, **changes: Any) -> Pod:
    """Of an active rank, unless it is said otherwise."""
    known = {"name": f"moe-{ordinal}", "uid": f"uid-{ordinal}", "ordinal": ordinal}
    return Pod(**{**known, "ready": True, "active": True, **changes})


def spare(ordinal: int, **changes: Any) -> Pod:
    return pod(ordinal, **{"ready": False, "active": False, **changes})


def instance(ordinal: int, **changes: Any) -> Instance:
    known = {"name": f"moe-{ordinal}", "uid": f"uid-{ordinal}", "ordinal": ordinal}
    rank = {"state": "active", "active": True, "ready": True, "safe_to_delete": False}
    return Instance(**{**known, **rank, **changes})


def standby(ordinal: int, **changes: Any) -> Instance:
    rank = {"state": "standby", "active": False, "ready": False, "safe_to_delete": True}
    return instance(ordinal, **{**rank, **changes})


def ran(id: str = "op", kind: str = "scale_up", **changes: Any) -> GroupOperation:
    """An operation of the coordinator; it runs, unless it is said otherwise."""
    known = {"from_size": 2, "to_size": 3, "phase": "prepare", "state": "running", "started": NOW}
    return GroupOperation(**{"id": id, "kind": kind, **known, **changes})


def group(size: int = 3, *, spares: int = 0, **changes: Any) -> Group:
    """A group of `size` ranks that serves, and `spares` standbys above them."""
    every = [instance(n) for n in range(size)]
    every += [standby(n) for n in range(size, size + spares)]
    known: dict[str, Any] = {"state": "Serving", "reason": "AsDesired", "generation": 1}
    known |= {"size": size, "desired": size, "instances": tuple(every)}
    return Group(**{**known, **changes})


def look(size: int = 3, *, spares: int = 0, **changes: Any) -> Observed:
    """A group of `size` ranks as it should be, with spare pods above; changes: of `Observed`."""
    pods = [*(pod(n) for n in range(size)), *(spare(n) for n in range(size, size + spares))]
    known: dict[str, Any] = {"now": NOW, "ranks": ranks(size + spares), "pods": tuple(pods)}
    return Observed(**{**known, "group": group(size, spares=spares), **changes})


# --- a cluster in virtual time ------------------------------------------------------------------

WARM_S, LEAVE_S, EVICT_S = 3.0, 2.0, 8.0
WAIT_S, PREPARE_S, COMMIT_S, START_S, REPLACE_S = 6.0, 3.0, 2.0, 4.0, 5.0
BACKOFF_S = 4.0
STEP_S = 1.0
LOOK_S = 0.002
"""A look takes a while: no two operations begin in one millisecond, or they had one id."""


class Refused(Exception):
    """The coordinator answers 409, or not at all."""


class Lost(Exception):
    """The operator's process ends here."""


@dataclass(kw_only=True)
class SimPod:
    """A pod of the StatefulSet. warm_at: from when its sidecar is registered and warm."""

    ordinal: int
    uid: str
    revision: str
    created: float
    warm_at: float | None = None
    ends_at: float | None = None
    evicts_at: float | None = None
    lost: bool = False
    label: bool = False
    nudged: str = ""
    command: str = ""
    next_command: str = ""

    @property
    def name(self) -> str:
        return f"moe-{self.ordinal}"


@dataclass(kw_only=True)
class SimOperation:
    """The coordinator's. until: when its phase ends; outcome: how it will end."""

    id: str
    kind: str
    from_size: int
    to_size: int
    phase: str
    started: float
    until: float
    outcome: str = "succeeded"
    state: str = "running"
    error: str = ""

    def told(self) -> dict[str, Any]:
        spent = [{"phase": self.phase, "seconds": 0.5}]
        return {
            "id": self.id,
            "kind": self.kind,
            "fromSize": self.from_size,
            "toSize": self.to_size,
            "phase": self.phase if self.state == "running" else "",
            "state": self.state,
            "started": self.started,
            "ended": None,
            "attempt": 1,
            "reason": "",
            "error": self.error,
            "phases": spent,
        }


@dataclass(kw_only=True)
class World:
    """Kubernetes, a coordinator and an operator. capacity: pods that find a node."""

    replicas: int = 2
    seed: int = 0
    now: float = NOW
    capacity: int = 8
    outcomes: list[str] = field(default_factory=list)
    template: Mapping[str, Any] = field(default_factory=lambda: TEMPLATE)
    paused: bool = False
    spare_pods: int = 0
    image: str = "elasticmoe:1"

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.ranks: Ranks | None = None
        self.pods: dict[int, SimPod] = {}
        self.members: dict[str, str] = {}
        """Active ranks: pod name to UID, as the engines really are."""
        self.joining: dict[str, str] = {}
        self.desired = self.generation = 0
        self.operation: SimOperation | None = None
        self.history: list[SimOperation] = []
        self.away_until = self.learning_until = self.retry_at = 0.0
        self.stored: dict[str, Any] = {}
        self.memory: dict[str, Any] | None = None
        self.asked: dict[str, int] = {}
        self.broken: list[str] = []
        self.log: list[str] = []
        self.plan = Plan()
        self._count = 0
        self.command = ""
        """What the ConfigMap says; pods take it when they are made, or nudged."""
        self._specs: dict[str, Spec] = {}

    # --- what a test does ------------------------------------------------------------------------

    @property
    def spec(self) -> Spec:
        key = repr((self.template, self.replicas, self.paused))
        if key not in self._specs:
            self._specs[key] = self._spec()
        return self._specs[key]

    def _spec(self) -> Spec:
        scaling = {"joinerTimeoutSeconds": 40, "warmStandby": self.spare_pods}
        more = {"template": self.template, "paused": self.paused, "scaling": scaling}
        return spec(self.replicas, **more)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()
            self.operate()

    def until(self, condition: Any, seconds: float = 400.0) -> bool:
        end = self.now + seconds
        while self.now < end and not condition():
            self.run(STEP_S)
        return bool(condition())

    def settled(self) -> bool:
        """At the size that is asked for, and the status says so."""
        told = {one["type"]: one for one in self.stored.get("conditions") or []}
        if not told:
            return False
        progress = told["Progressing"]
        return (
            len(self.members) == self.spec.size
            and progress["status"] == "False"
            and progress["reason"] in ("AsDesired", "SizeLimited")
            and told["Available"]["status"] == "True"
            and told["Degraded"]["status"] == "False"
            and not self.stored.get("operation")
            and self.stored["replicas"] == self.spec.size
            and self.stored["readyReplicas"] == self.spec.size
            and len(self.pods) == self.spec.size + self.spare_pods
            and all(one.label == (one.name in self.members) for one in self.pods.values())
            and self.operation is None
            and self.ranks is not None
            and self.ranks.revision == self.spec.revision
            and all(one.revision == self.spec.pod_revision for one in self.pods.values())
        )

    def restart_coordinator(self, away: float, learns: float) -> None:
        self.say("coordinator restarts")
        self.away_until = self.now + away
        self.learning_until = self.away_until + learns

    def restart_operator(self) -> None:
        self.say("operator restarts")
        self.memory = None

    def lose_node(self, ordinal: int) -> None:
        if ordinal in self.pods:
            one = self.pods[ordinal]
            one.lost, one.evicts_at = True, self.now + EVICT_S
            self.say(f"the node of {one.name} is gone")

    def delete_pod(self, ordinal: int) -> None:
        if ordinal in self.pods and not self.pods[ordinal].lost:
            self._end_pod(self.pods[ordinal])
            self.say(f"moe-{ordinal} is deleted")

    def say(self, line: str) -> None:
        self.log.append(f"{self.now - NOW:7.1f} {line}")

    def breaks(self, promise: str) -> None:
        self.say(f"BROKEN: {promise}")
        self.broken.append(promise)

    # --- Kubernetes ------------------------------------------------------------------------------

    def step(self) -> None:
        self.now += STEP_S
        parts = [self._stateful_set, self._coordinate]
        self.random.shuffle(parts)
        for part in parts:
            part()
        self._kubelets()

    def _uid(self) -> str:
        self._count += 1
        return f"uid-{self._count}"

    def _stateful_set(self) -> None:
        if self.ranks is None:
            return
        for ordinal in range(self.ranks.replicas):
            if ordinal not in self.pods:
                made = SimPod(
                    ordinal=ordinal,
                    uid=self._uid(),
                    revision=self.ranks.pod_revision,
                    created=self.now,
                    next_command=self.command,
                )
                self.pods[ordinal] = made
        for ordinal, one in self.pods.items():
            if ordinal >= self.ranks.replicas:
                self._end_pod(one)

    def _serves(self, one: SimPod) -> bool:
        return one.uid in (self.members.get(one.name), self.joining.get(one.name))

    def _end_pod(self, one: SimPod) -> None:
        if one.ends_at is None:
            one.ends_at = self.now + LEAVE_S

    def _kubelets(self) -> None:
        running = [one for one in self.pods.values() if one.warm_at is not None]
        free = self.capacity - len(running)
        for one in sorted(self.pods.values(), key=lambda one: one.ordinal):
            if one.warm_at is None and one.ends_at is None and free > 0:
                one.warm_at = self.now + WARM_S
                free -= 1
        for ordinal, one in list(self.pods.items()):
            if one.evicts_at is not None and self.now >= one.evicts_at:
                self._end_pod(one)
            over = one.ends_at is not None and self.now >= one.ends_at
            # A rank that leaves waits until the group goes on without it.
            if over and not one.lost and not self._serves(one):
                del self.pods[ordinal]

    # --- the coordinator -------------------------------------------------------------------------

    def _registered(self) -> list[SimPod]:
        return [
            one
            for one in sorted(self.pods.values(), key=lambda one: one.ordinal)
            if one.warm_at is not None and self.now >= one.warm_at and not one.lost
        ]

    def _starters(self) -> list[SimPod]:
        return [one for one in self._registered() if one.ends_at is None]

    @property
    def _min(self) -> int:
        return self.spec.min_replicas

    @property
    def _there(self) -> bool:
        return self.now >= self.away_until

    def _coordinate(self) -> None:
        if not self._there or self.now < self.learning_until:
            return
        registered = {one.name: one.uid for one in self._registered()}
        gone = [name for name, uid in self.members.items() if registered.get(name) != uid]
        operation = self.operation
        if gone and (operation is None or operation.kind != "recover"):
            if operation is not None:
                self._end(operation, "failed", "a rank is lost")
            self._begin("recover", self.desired, "kill")
        elif operation is None:
            self._next()
        elif self.now >= operation.until:
            self._go_on(operation)

    def _begin(self, kind: str, to_size: int, phase: str, id: str = "") -> SimOperation:
        self._count += 1
        self.operation = SimOperation(
            id=id or f"own-{self._count}",
            kind=kind,
            from_size=len(self.members),
            to_size=to_size,
            phase=phase,
            started=self.now,
            until=self.now + (WAIT_S if phase == "wait" else 1.0),
            outcome=self.outcomes.pop(0) if self.outcomes else "succeeded",
        )
        self.say(f"  {kind} {len(self.members)} -> {to_size} ({self.operation.id}) begins")
        return self.operation

    def _end(self, operation: SimOperation, state: str, error: str = "") -> None:
        operation.state, operation.error = state, error
        self.history = [*self.history, operation][-10:]
        self.operation, self.joining = None, {}
        self.retry_at = self.now + (BACKOFF_S if state == "withdrawn" else 0.0)
        self.say(f"  {operation.kind} -> {operation.to_size} {state} {error}")

    def _held_back(self) -> bool:
        resizes = [one for one in self.history if one.from_size != one.to_size]
        last = resizes[-1] if resizes else None
        failed = last is not None and last.state == "failed" and last.to_size == self.desired
        return failed and len(self.members) != self.desired

    def _next(self, id: str = "") -> None:
        size, leaving = len(self.members), self._leaving()
        if not size:
            enough = len(self._starters()) >= self._min or id
            if self.desired and enough:
                self._begin("start", self.desired, "wait", id)
            return
        if not id and (self.now < self.retry_at or (self._held_back() and not leaving)):
            return
        if leaving:
            self._begin("restart", size - len(leaving), "drain", id)
        elif self.desired < size:
            self._begin("scale_down", self.desired, "lame_duck", id)
        elif self.desired > size and (id or len(self._starters()) >= self.desired):
            self._begin("scale_up", self.desired, "wait", id)
        elif self._disordered():
            self._begin("restart", size, "drain", id)

    def _leaving(self) -> list[str]:
        ending = {one.name for one in self.pods.values() if one.ends_at is not None}
        return [name for name in self.members if name in ending]

    def _disordered(self) -> bool:
        wanted = {one.name for one in self._starters()[: len(self.members)]}
        return len(wanted) == len(self.members) and wanted != set(self.members)

    def _go_on(self, operation: SimOperation) -> None:
        getattr(self, f"_{operation.kind}")(operation)

    def _enter(self, operation: SimOperation, phase: str, seconds: float) -> None:
        operation.phase, operation.until = phase, self.now + seconds

    def _take(self, size: int) -> None:
        every = [one for one in self._registered() if self.joining.get(one.name) == one.uid]
        chosen = (every or self._starters())[:size]
        self.members = {one.name: one.uid for one in chosen}
        for one in chosen:
            one.command = one.next_command

    def _start(self, operation: SimOperation) -> None:
        if operation.phase == "wait":
            late = self.now - operation.started > REPLACE_S
            if len(self._starters()) >= (self._min if late else operation.to_size):
                self.joining = {one.name: one.uid for one in self._starters()[: operation.to_size]}
                self._enter(operation, "start", START_S)
        elif self._joined() >= self._min:
            self._take(operation.to_size)
            self.generation += 1
            self._end(operation, "succeeded")
        else:
            self.joining = {}
            self._enter(operation, "wait", 1.0)

    def _joined(self) -> int:
        """How many of those who start are there still."""
        there = [one for one in self._registered() if self.joining.get(one.name) == one.uid]
        return len(there)

    def _recover(self, operation: SimOperation) -> None:
        if operation.phase == "kill":
            self.members = {}
            self._enter(operation, "wait", 1.0)
            operation.started = self.now
        else:
            self._start(operation)

    def _restart(self, operation: SimOperation) -> None:
        if operation.phase == "drain":
            self.members = {}
            self._enter(operation, "start", START_S)
        elif len(self._starters()) >= self._min and operation.to_size:
            self._take(self.desired)
            self.generation += 1
            self._end(operation, "succeeded")
        else:
            self._end(operation, "succeeded")

    def _scale_up(self, operation: SimOperation) -> None:
        joiners = [one for one in self._starters() if one.name not in self.members]
        if operation.phase == "wait":
            joiners = joiners[: operation.to_size - operation.from_size]
            if operation.outcome == "withdrawn":
                self._end(operation, "withdrawn", "a joiner's check failed")
            elif len(self.members) + len(joiners) >= operation.to_size:
                self.joining = {one.name: one.uid for one in joiners}
                self._enter(operation, "prepare", PREPARE_S)
            elif self.now - operation.started > WAIT_S:
                self._end(operation, "withdrawn", "too few instances")
            return
        there = {one.name: one.uid for one in joiners}
        lost = [name for name, uid in self.joining.items() if there.get(name) != uid]
        if operation.phase == "prepare" and (operation.outcome == "failed" or lost):
            self._end(operation, "failed", "prepare failed")
        elif operation.phase == "prepare":
            self._enter(operation, "commit", COMMIT_S)
        elif operation.outcome == "failed_commit" or lost:
            self._end(operation, "failed", "commit failed")
            self._begin("recover", self.desired, "kill")
        else:
            self.members |= self.joining
            for one in joiners:
                one.command = one.next_command
            self._end(operation, "succeeded")

    def _scale_down(self, operation: SimOperation) -> None:
        if operation.phase == "lame_duck":
            if operation.outcome == "withdrawn":
                self._end(operation, "withdrawn", "drain timeout")
            else:
                self._enter(operation, "commit", COMMIT_S)
        elif operation.outcome in ("failed", "failed_commit"):
            self._end(operation, "failed", "prepare failed")
        else:
            order = sorted(self.members, key=lambda name: int(name.rpartition("-")[2]))
            self.members = {name: self.members[name] for name in order[: operation.to_size]}
            self._end(operation, "succeeded")

    def set_target(self, operation_id: str, size: int) -> None:
        """PUT /v1/target."""
        if self.asked.setdefault(operation_id, size) != size:
            self.breaks(f"promise 2: {operation_id} was used for {self.asked[operation_id]}")
        if not self._there:
            raise Refused("it does not answer")
        if self.now < self.learning_until:
            raise Refused("the coordinator is learning")
        every = [*self.history, *([self.operation] if self.operation else [])]
        if any(one.id == operation_id for one in every):
            return
        running = self.operation
        if running is not None:
            if running.phase in ("wait", "kill") and running.kind != "scale_up":
                self.desired = running.to_size = size
            elif running.to_size != size:
                self.breaks(f"promise 2: {operation_id} is sent while {running.id} runs")
                raise Refused(f"operation {running.id} is running")
            return
        self.say(f"  target {size} ({operation_id})")
        self.desired = size
        self._next(operation_id)

    def restart_group(self, operation_id: str) -> None:
        """POST /v1/restart."""
        if not self._there or self.now < self.learning_until:
            raise Refused("not now")
        every = [*self.history, *([self.operation] if self.operation else [])]
        if any(one.id == operation_id for one in every):
            return
        if self.operation is not None:
            raise Refused(f"operation {self.operation.id} is running")
        if not self.members:
            raise Refused("there is nothing to restart")
        operation = self._begin("restart", len(self.members), "drain", operation_id)
        if operation.outcome == "withdrawn":
            self._end(operation, "withdrawn", "drain timeout")

    def _status(self) -> dict[str, Any]:
        """GET /v1/status."""
        if not self._there:
            raise Refused("it does not answer")
        learning = self.now < self.learning_until
        running = self.operation
        state, reason = "Serving", "AsDesired"
        if learning:
            state = reason = "Learning"
        elif running is not None:
            state = {"start": "Starting", "recover": "Recovering", "restart": "Restarting"}.get(
                running.kind, "Resizing"
            )
            reason = "".join(word.capitalize() for word in running.kind.split("_"))
        elif not self.members:
            state, reason = "Waiting", "BelowMinReplicas" if self.desired else "NoTarget"
        elif self._held_back():
            reason = "ResizeFailed"
        elif len(self.members) != self.desired:
            reason = "TooFewInstances"
        known = [one for one in self.pods.values() if one.warm_at and self.now >= one.warm_at]
        return {
            "state": state,
            "reason": reason,
            "message": "" if reason == "AsDesired" else f"because of {reason}",
            "size": len(self.members),
            "desired": self.desired,
            "generation": self.generation,
            "numExperts": 16,
            "slotsPerRank": 8,
            "redundantExperts": 0,
            "elastic": True,
            "pauseMode": "keep",
            "operation": running.told() if running and not learning else None,
            "history": [one.told() for one in self.history],
            "instances": [] if learning else [self._told(one) for one in known],
        }

    def _told(self, one: SimPod) -> dict[str, Any]:
        active = self.members.get(one.name) == one.uid
        return {
            "instance": one.name,
            "incarnation": one.uid,
            "ordinal": one.ordinal,
            "state": "active" if active else "standby",
            "registered": not one.lost,
            "active": active,
            "ready": active,
            "warm": True,
            "leaving": one.ends_at is not None,
            "safeToDelete": not self._serves(one),
            "command": one.command if active else "",
            "nextCommand": one.next_command,
            "reason": "",
        }

    # --- the operator ----------------------------------------------------------------------------

    def observe(self) -> Observed:
        group, error = None, ""
        if self.ranks is not None or self.pods:
            try:
                group = seen.group(json.loads(json.dumps(self._status())))
            except Refused as refusal:
                error = str(refusal)
        every = sorted(self.pods.values(), key=lambda one: one.ordinal)
        return Observed(
            now=self.now,
            ranks=self.ranks,
            pods=tuple(self._seen(one) for one in every),
            group=group,
            group_error=error,
        )

    def _seen(self, one: SimPod) -> Pod:
        line = f"{one.name}: no node has a free GPU"
        stuck = one.warm_at is None
        return Pod(
            name=one.name,
            uid=one.uid,
            ordinal=one.ordinal,
            revision=one.revision,
            command=one.nudged,
            ready=self.members.get(one.name) == one.uid and not one.lost,
            active=one.label,
            deleting=one.ends_at is not None,
            evicted=one.lost and one.ends_at is not None,
            created=one.created,
            problem=Problem(reason="Unschedulable", message=line) if stuck else None,
        )

    def operate(self, fault: str = "") -> None:
        """One look, as the reconciler does it: read, plan, write the status, act.

        fault: "write" loses the status write, "die" ends the process right after it, "half" after
        the first action.
        """
        self.now += LOOK_S
        memory = self.stored if self.memory is None else self.memory
        found = self.observe()
        running, history = status.read_operation(memory), status.read_history(memory)
        self.plan = plan(self.spec, found, running, history)
        fresh = status.build(self.spec, found, self.plan, memory)
        known = found.group is not None and found.group.known
        if known and fresh["replicas"] != len(self.members):
            self.breaks(f"status: {fresh['replicas']} replicas, {len(self.members)} ranks")
        if fault == "write":
            return
        patch = status.difference(memory, fresh)
        self.stored = json.loads(json.dumps(merged(self.stored, patch)))
        self.memory = {**memory, **fresh}
        for begun in self.plan.ended:
            self.say(f"{begun.operation.id} {begun.result} {begun.message}")
        if self.plan.operation is not None and self.plan.operation != running:
            self.say(f"{self.plan.operation.id} is in {self.plan.operation.phase}")
        if fault == "die":
            self.restart_operator()
            return
        for action in self.plan.actions:
            try:
                self._do(action)
            except Refused as refusal:
                self.say(f"{action} refused: {refusal}")
                break
            if fault == "half":
                self.restart_operator()
                return

    def _do(self, action: actions.Action) -> None:
        here = {one.name: one for one in self.pods.values()}
        match action:
            case actions.ApplyRanks(replicas=replicas):
                self.ranks = ranks(replicas, self.spec)
                self.command = self.spec.revision
                self.say(f"StatefulSet of {replicas} at {self.spec.revision}")
            case actions.ApplyCommand():
                self.command = self.spec.revision
            case actions.NudgePod(name=name, uid=uid, command=command):
                if name in here and here[name].uid == uid:
                    here[name].nudged, here[name].next_command = command, self.command
            case actions.ScaleRanks(replicas=replicas):
                assert self.ranks is not None
                known = self._there and self.now >= self.learning_until
                if replicas < self.ranks.replicas and not known and self.members:
                    self.breaks("promise 1: fewer pods while nobody knows who has a rank")
                for one in here.values():
                    if self._serves(one) and one.ordinal >= replicas > 0:
                        self.breaks(f"promise 1: {one.name} is removed and has a rank")
                self.ranks = replace(self.ranks, replicas=replicas)
                self.say(f"replicas {replicas}")
            case actions.RestartGroup(operation_id=operation_id):
                self.restart_group(operation_id)
            case actions.SetTarget(operation_id=operation_id, size=size):
                self.set_target(operation_id, size)
            case actions.LabelPod(name=name, uid=uid, active=active):
                if name in here and here[name].uid == uid:
                    here[name].label = active
            case actions.ForgetPod(name=name, uid=uid):
                if name in here and here[name].uid == uid:
                    if not here[name].lost:
                        self.breaks(f"promise 1: {name} is forgotten and its node is there")
                    del self.pods[here[name].ordinal]
            case actions.DeleteRanks():
                self.ranks = None


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386, as an API server does it."""
    if not isinstance(patch, Mapping):
        return patch
    found = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found
