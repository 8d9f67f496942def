"""One pure function: what to do next, given what is, what is wanted and the operation under way.

It is asked again and again; an action that was lost is planned again. What may not happen twice is
guarded where it happens: a resize by its operation's id, a deletion by the pod's UID.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from elasticmoe_operator.core import operation as ops
from elasticmoe_operator.core.observed import Group, Instance, Observed, Pod
from elasticmoe_operator.core.operation import Ended, Operation
from elasticmoe_operator.core.spec import Spec

_WAITS = ("wait", "kill", "replace")
"""Phases in which a start or a recovery of the coordinator takes another size."""

RETRY_S = 30.0
RETRY_MAX_S = 600.0
"""Pause before a failed resize is tried again: doubled each time, up to the second one."""


# --- actions ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ApplyRanks:
    """Write the whole StatefulSet and the command, at the spec's newest revision.

    same_pods: with the images that the group runs: its pods go on.
    """

    replicas: int
    same_pods: bool = False


@dataclass(frozen=True, kw_only=True)
class ApplyCommand:
    """Write the engines' command of the spec's newest revision; launchers take it at a restart."""


@dataclass(frozen=True, kw_only=True)
class NudgePod:
    """Change a pod's annotation: its kubelet brings the volumes up to date at once."""

    name: str
    uid: str
    command: str


@dataclass(frozen=True, kw_only=True)
class RestartGroup:
    """Have the coordinator restart all engines, planned and warm."""

    operation_id: str


@dataclass(frozen=True, kw_only=True)
class ScaleRanks:
    """Change the StatefulSet's replicas and nothing else."""

    replicas: int


@dataclass(frozen=True, kw_only=True)
class SetTarget:
    """Have the coordinator resize the group."""

    operation_id: str
    size: int


@dataclass(frozen=True, kw_only=True)
class LabelPod:
    """Say whether a pod is an active rank."""

    name: str
    uid: str
    active: bool


@dataclass(frozen=True, kw_only=True)
class ForgetPod:
    """Remove the object of a pod whose node is gone, so that it is made again elsewhere."""

    name: str
    uid: str


@dataclass(frozen=True, kw_only=True)
class DeleteRanks:
    """Delete the StatefulSet; its pods leave the group in order."""


Action = (
    ApplyRanks
    | ApplyCommand
    | ScaleRanks
    | SetTarget
    | RestartGroup
    | LabelPod
    | NudgePod
    | ForgetPod
    | DeleteRanks
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do, in this order, after `operation` was written to the status.

    operation: the one under way now. ended: those that ended just now, oldest first. held: why the
    size that is asked for is not tried now, "" when it is or when nothing is to be done.
    """

    actions: tuple[Action, ...] = ()
    operation: Operation | None = None
    ended: tuple[Ended, ...] = ()
    held: str = ""


def plan(
    spec: Spec, observed: Observed, operation: Operation | None, history: tuple[Ended, ...] = ()
) -> Plan:
    """The next step. history: operations that ended before, oldest first."""
    planner = _Planner(spec, observed, operation, history)
    if spec.deleting:
        return Plan(actions=tuple(planner.tear_down()))
    planner.advance()
    planner.begin()
    return Plan(
        actions=(*planner.actions, *planner.upkeep()),
        operation=planner.operation,
        ended=tuple(planner.ended),
        held=planner.held,
    )


class _Planner:
    def __init__(
        self,
        spec: Spec,
        observed: Observed,
        operation: Operation | None,
        history: tuple[Ended, ...],
    ) -> None:
        self.spec, self.observed, self.operation = spec, observed, operation
        self.group = observed.group if observed.group and observed.group.known else None
        self.actions: list[Action] = []
        self.ended: list[Ended] = []
        self.held = ""
        self._history = history

    @property
    def now(self) -> float:
        return self.observed.now

    @property
    def idle(self) -> bool:
        """Whether the coordinator answers and runs no operation."""
        return self.group is not None and self.group.operation is None

    # --- the operation under way -----------------------------------------------------------------

    def advance(self) -> None:
        """Bring the operation under way on, by as many phases as are over."""
        while (operation := self.operation) is not None:
            step = getattr(self, f"_{operation.phase.lower()}")
            step(operation)
            if self.operation is None or self.operation.phase == operation.phase:
                return

    def _update(self, operation: Operation) -> None:
        """The new command has to lie with every pod before one restart brings it to all."""
        spec, group = self.spec, self.group
        if group is None:
            return
        operation = self.operation = replace(operation, revision=spec.revision)
        if not self._same_pods(group):
            self._end("Superseded", "the change takes new pods now")
            return
        self.actions.append(ApplyCommand())
        waiting = []
        for pod in self.observed.pods:
            instance = self._instance(group, pod)
            if pod.command != spec.revision and not pod.deleting:
                self.actions.append(NudgePod(name=pod.name, uid=pod.uid, command=spec.revision))
            if instance is None or spec.revision not in (instance.command, instance.next_command):
                waiting.append(pod.name)
            if instance is not None and instance.next_command_problem:
                self._end("Failed", f"{pod.name}: {instance.next_command_problem}")
                return
        if not waiting:
            self.operation = operation.enter("Restart", self.now)
        else:
            message = f"the new command has not come to {', '.join(waiting)} yet"
            self.operation = replace(operation, message=message)

    def _restart(self, operation: Operation) -> None:
        group, ranks = self.group, self.observed.ranks
        if group is None or ranks is None:
            return
        asked = group.find(operation.id)
        if asked is None:
            self.actions.append(RestartGroup(operation_id=operation.id))
        elif asked.state in ("failed", "withdrawn") and group.operation is None:
            self._end("Failed" if asked.state == "failed" else "Withdrawn", asked.error)
        elif asked.state == "succeeded" and group.operation is None:
            if ranks.revision == operation.revision or self.spec.revision != operation.revision:
                self._end("Succeeded")
            else:
                self.actions.append(ApplyRanks(replicas=ranks.replicas, same_pods=True))

    def _same_pods(self, group: Group) -> bool:
        """Whether the newest revision can be had in place."""
        ranks = self.observed.ranks
        return (
            ranks is not None
            and ranks.pod_revision == self.spec.pod_revision
            and not self._old_pods()
            and group.state == "Serving"
            and group.size == group.desired
        )

    def _drain(self, operation: Operation) -> None:
        """All pods leave, the group stops; then new ones come."""
        ranks = self.observed.ranks
        operation = self.operation = replace(operation, revision=self.spec.revision)
        if self._serves_unseen():
            return
        if ranks is None and self.observed.pods:
            self.actions.append(ApplyRanks(replicas=0))
        elif ranks is not None and ranks.replicas:
            self.actions.append(ScaleRanks(replicas=0))
        elif not self.observed.pods:
            size = self.spec.size
            self.operation = replace(operation, to_size=size).enter("CreatePods", self.now)

    def _createpods(self, operation: Operation) -> None:
        if self._changed_mind(operation):
            return
        group = self.group
        if operation.kind in ("Start", "Restart"):
            if self._made() and group is not None:
                self.operation = operation.enter("Start", self.now)
            return
        if self._joiners_ready(operation.to_size):
            self.operation = operation.enter("Resize", self.now)
        elif self.now - operation.since > self.spec.scaling.joiner_timeout:
            self._end("Withdrawn", self._missing(operation.to_size))
        else:
            self.operation = replace(operation, message=self._missing(operation.to_size))

    def _start(self, operation: Operation) -> None:
        """The coordinator starts all engines: with fewer than asked for if some don't come."""
        group = self.group
        if self._changed_mind(operation) or not self._made() or group is None:
            return
        operation = self.operation or operation
        serves = group.size > 0 and group.desired and group.state == "Serving"
        if serves and self._all_ready():
            self.operation = replace(operation, to_size=group.size)
            self._end("Succeeded")
        else:
            self._ask(operation)
            self.operation = replace(operation, message=group.message)

    def _made(self) -> bool:
        """Whether the StatefulSet is there, of the newest revision; if not, it is made (again)."""
        ranks, spec = self.observed.ranks, self.spec
        if ranks is not None and (ranks.revision == spec.revision or spec.paused):
            return True
        if not spec.paused:
            self.actions.append(self._new_ranks())
        return False

    def _new_ranks(self) -> ApplyRanks:
        """A StatefulSet that takes no pod which is there."""
        floor = max((one.ordinal + 1 for one in self.observed.pods), default=0)
        return ApplyRanks(replicas=max(self.spec.size + self.spec.scaling.warm_standby, floor))

    def _resize(self, operation: Operation) -> None:
        group = self.group
        if group is None:
            return
        asked = group.find(operation.id)
        if asked is None and self._changed_mind(operation):
            return
        state = asked.state if asked is not None else ""
        there = group.size == operation.to_size
        if asked is not None and state == "failed" and not there:
            if group.operation is None:
                self._end("Failed", asked.error)
            return
        done = there and group.desired == operation.to_size
        if (done or state in ("succeeded", "failed")) and group.operation is None:
            shrinks = operation.kind == "ScaleDown"
            self.operation = operation.enter("RemovePods" if shrinks else "Ready", self.now)
            return
        self._ask(operation)
        message = "" if state == "running" else group.message
        self.operation = replace(operation, message=message)
        # Withdrawn by the coordinator: it tries again by itself, for as long as joiners may take.
        late = self.now - operation.since > self.spec.scaling.joiner_timeout
        untold = state in ("withdrawn", "") and group.operation is None
        if untold and not self._changed_mind(operation) and late:
            self._end("Withdrawn", group.message or (asked.error if asked else ""))

    def _ready(self, operation: Operation) -> None:
        other = self.spec.size != operation.to_size and not self.spec.paused
        if self.group is None:
            return
        if other or self._all_ready() or self.group.size != operation.to_size:
            self._end("Succeeded")

    def _removepods(self, operation: Operation) -> None:
        surplus = [one for one in self.observed.pods if one.ordinal >= self._wanted_replicas()]
        if not surplus or self.spec.size != operation.to_size:
            self._end("Succeeded")

    def _changed_mind(self, operation: Operation) -> bool:
        """Something else is asked for and nobody was told of this: it ends."""
        starts = operation.kind in ("Start", "Restart")
        if self.spec.paused:
            if not starts:
                self._end("Superseded", "spec.paused was set")
            return not starts
        if operation.revision and operation.revision != self.spec.revision:
            self._end("Superseded", "the template was changed")
            return True
        if operation.to_size == self.spec.size:
            return False
        if starts:
            size = self.spec.size
            id = ops.new_id(operation.kind, size, self.now)
            self.operation = replace(operation, to_size=size, id=id)
            return False
        self._end("Superseded", f"{self.spec.size} was asked for")
        return True

    def _ask(self, operation: Operation) -> None:
        """PUT the target until the coordinator has it."""
        group = self.group
        if group is None or group.find(operation.id) is not None:
            return
        running = group.operation
        if running is not None and (running.kind == "scale_up" or running.phase not in _WAITS):
            return
        again = operation.attempt > 1 or self._gave_up(group)
        if group.desired != operation.to_size or again:
            self.actions.append(SetTarget(operation_id=operation.id, size=operation.to_size))

    def _end(self, result: ops.Result, message: str = "") -> None:
        if self.operation is not None:
            self.ended.append(self.operation.end(result, self.now, message))
            self.operation = None

    # --- the next operation ----------------------------------------------------------------------

    def begin(self) -> None:
        """Begin what is due, if nothing is under way."""
        spec, ranks, group = self.spec, self.observed.ranks, self.group
        if self.operation is not None or spec.paused:
            return
        if ranks is None:
            self._begin("Start", "CreatePods", 0)
            self.advance()
        elif ranks.revision != spec.revision or self._old_pods() or self._old_engines():
            self._begin_restart(group)
        elif group is None or not self.idle:
            return
        elif not group.desired:
            self._begin("Start", "Start", 0)
        elif spec.size != group.desired or self._gave_up(group):
            self._begin_resize(group)

    def _begin_restart(self, group: Group | None) -> None:
        running = group.operation if group is not None else None
        if running is not None and running.kind not in ("start", "recover"):
            return
        if self._serves_unseen():
            return
        every = (*self._history, *self.ended)
        last = next((one for one in reversed(every) if one.operation.kind == "Restart"), None)
        attempt = 1
        if last is not None and last.operation.revision == self.spec.revision:
            ranks = self.observed.ranks
            in_vain = ranks is not None and ranks.revision == self.spec.revision
            if (in_vain or last.result in ("Failed", "Withdrawn")) and not self._rested(last):
                return
            attempt = last.operation.attempt + 1
        in_place = group is not None and self._same_pods(group)
        phase: ops.Phase = "Update" if in_place else "Drain"
        self._begin("Restart", phase, group.size if group else 0, attempt)
        self.advance()

    def _rested(self, last: Ended) -> bool:
        """Whether it is time to try again; says so in `held` when it isn't."""
        pause = min(RETRY_MAX_S, RETRY_S * 2.0 ** min(last.operation.attempt - 1, 10))
        if self.now - last.at >= pause:
            return True
        why = last.message or "pods or engines are still not of the spec's revision"
        self.held = f"{why}; it is tried again after {pause:.0f} s"
        return False

    def _gave_up(self, group: Group) -> bool:
        """The coordinator does not try a failed resize again before somebody asks."""
        return group.reason == "ResizeFailed"

    def _begin_resize(self, group: Group) -> None:
        size = self.spec.size
        last = next(
            (one for one in reversed((*self._history, *self.ended)) if _is_resize(one)), None
        )
        again = last is not None and last.operation.to_size == size and last.result != "Succeeded"
        attempt = last.operation.attempt + 1 if again and last and last.result == "Failed" else 1
        withdrawn = again and last is not None and last.result == "Withdrawn"
        if last is not None and withdrawn and size > group.size and not self._joiners_ready(size):
            self.held = last.message
            return
        failed = again and last is not None and last.result == "Failed"
        if last is not None and failed and not self._rested(last):
            return
        if not group.size:
            self._begin("Start", "Start", 0, attempt)
        elif size > group.size:
            self._begin("ScaleUp", "CreatePods", group.size, attempt)
        elif size < group.size:
            self._begin("ScaleDown", "Resize", group.size, attempt)
        else:  # a resize that was asked for is called off
            self._begin("ScaleUp", "Resize", group.size, attempt)
        self.advance()

    def _begin(self, kind: ops.Kind, phase: ops.Phase, from_size: int, attempt: int = 1) -> None:
        spec = self.spec
        revision = spec.revision if kind in ("Start", "Restart") else ""
        self.operation = ops.begin(
            kind, phase, from_size, spec.size, self.now, attempt=attempt, revision=revision
        )

    def tear_down(self) -> list[Action]:
        """The StatefulSet goes first, its pods leave in order."""
        ranks = self.observed.ranks
        gone = ranks is None or ranks.deleting
        forgotten = self._forgotten(self.group) if self.group is not None else []
        return [*([] if gone else [DeleteRanks()]), *forgotten]

    # --- what is always kept up ------------------------------------------------------------------

    def upkeep(self) -> list[Action]:
        """Pods as many as needed, labels of active ranks, pods of nodes that are gone."""
        actions: list[Action] = []
        ranks = self.observed.ranks
        draining = self.operation is not None and self.operation.phase == "Drain"
        applied = any(isinstance(one, ApplyRanks) for one in self.actions)
        if not draining and not applied and not self.spec.paused:
            wanted = self._wanted_replicas()
            if ranks is None:
                actions.append(self._new_ranks())
            elif wanted != ranks.replicas:
                actions.append(ScaleRanks(replicas=wanted))
        if self.group is not None:
            actions += self._labels(self.group)
            actions += self._forgotten(self.group)
        return actions

    def _wanted_replicas(self) -> int:
        """As many pods as the size needs; no pod is taken whose rank is not safe to delete."""
        ranks = self.observed.ranks
        replicas = ranks.replicas if ranks else 0
        wanted = self.spec.size + self.spec.scaling.warm_standby
        if self.group is None:
            return max(wanted, replicas)
        return max(wanted, min(self._floor(self.group), replicas))

    def _floor(self, group: Group) -> int:
        needed = [one.ordinal for one in group.instances if not one.safe_to_delete]
        # A coordinator that could not learn of a rank doesn't know what it does.
        needed += [
            one.ordinal
            for one in self.observed.pods
            if one.ready and self._instance(group, one) is None
        ]
        # Of a size that was asked for, joiners may be on their way, now or at its next attempt.
        busy = group.operation.to_size if group.operation is not None else 0
        return max([-1, *needed, busy - 1, group.size - 1, group.desired - 1]) + 1

    def _labels(self, group: Group) -> list[Action]:
        found: list[Action] = []
        for pod in self.observed.pods:
            instance = self._instance(group, pod)
            active = instance is not None and instance.active
            if pod.ready and self._silent(group, pod):
                continue  # it serves as it did, whatever keeps it from being heard
            if active != pod.active and not pod.deleting:
                found.append(LabelPod(name=pod.name, uid=pod.uid, active=active))
        return found

    def _forgotten(self, group: Group) -> list[Action]:
        """Pods that were evicted from a node that is gone stay for ever if nobody removes them."""
        return [
            ForgetPod(name=pod.name, uid=pod.uid)
            for pod in self.observed.pods
            if pod.deleting and pod.evicted and self._silent(group, pod)
        ]

    # --- questions -------------------------------------------------------------------------------

    @staticmethod
    def _instance(group: Group, pod: Pod) -> Instance | None:
        """The pod as the coordinator knows it, if it is this one and not an earlier one."""
        found = group.instance(pod.name)
        return found if found is not None and found.uid in (pod.uid, "") else None

    def _silent(self, group: Group, pod: Pod) -> bool:
        """The coordinator does not hear this pod's sidecar."""
        instance = self._instance(group, pod)
        return instance is None or not instance.registered

    def _old_pods(self) -> bool:
        """There are pods of another template: a StatefulSet was deleted without its pods."""
        wanted = ("", self.spec.pod_revision)
        return any(one.revision not in wanted and not one.deleting for one in self.observed.pods)

    def _old_engines(self) -> bool:
        """Engines run with another command: it was changed again while they restarted."""
        wanted = ("", self.spec.revision)
        every = self.group.instances if self.group is not None else ()
        return any(one.active and one.command not in wanted for one in every)

    def _serves_unseen(self) -> bool:
        """Ranks serve, or did when last heard of; no coordinator could have them leave in order.

        One that is learning who is there will know in seconds.
        """
        if self.group is not None:
            return False
        learning = self.observed.group is not None
        return learning or any(one.ready or one.active for one in self.observed.pods)

    def _joiners(self, size: int) -> list[Pod]:
        """Pods that could be ranks of this size now."""
        group = self.group
        if group is None:
            return []
        found = []
        for pod in self.observed.pods:
            instance = self._instance(group, pod)
            if pod.deleting or instance is None or not instance.registered or instance.leaving:
                continue
            if instance.active or (instance.warm and not instance.reason):
                found.append(pod)
        return found[:size]

    def _joiners_ready(self, size: int) -> bool:
        return len(self._joiners(size)) >= size

    def _missing(self, size: int) -> str:
        """Why there are not enough joiners, one line."""
        there = {one.name for one in self._joiners(size)}
        lines = []
        for pod in self.observed.pods:
            if pod.name in there or pod.deleting:
                continue
            instance = self._instance(self.group, pod) if self.group else None
            if pod.problem is not None:
                lines.append(pod.problem.message)
            elif instance is None:
                lines.append(f"{pod.name}: its sidecar has not registered yet")
            elif instance.reason:
                lines.append(f"{pod.name}: {instance.reason}")
            else:
                lines.append(f"{pod.name}: it is not warm yet")
        head = f"{len(there)} of {size} pods can serve"
        return "; ".join([head, *lines[:3]])

    def _all_ready(self) -> bool:
        group = self.group
        if group is None:
            return False
        names = {one.name for one in group.instances if one.active}
        ready = {one.name for one in self.observed.pods if one.ready}
        return len(names) >= group.size > 0 and names <= ready


def _is_resize(ended: Ended) -> bool:
    return ended.operation.kind in ("ScaleUp", "ScaleDown")
