"""The operation under way is brought on, by as many phases as are over. Pure."""

from __future__ import annotations

from dataclasses import replace

from elasticmoe_operator.core import operation as ops
from elasticmoe_operator.core.actions import (
    Action,
    ApplyCommand,
    ApplyRanks,
    NudgePod,
    RestartGroup,
    ScaleRanks,
    SetTarget,
)
from elasticmoe_operator.core.operation import Ended, Operation
from elasticmoe_operator.core.view import View

_WAITS = ("wait", "kill", "replace")
"""Phases in which a start or a recovery of the coordinator takes another size."""


class Progress:
    """Of one operation; after `advance`: where it is now, what it asks for, how it ended.

    One method a phase. Each does what the phase needs until it is over, then enters the next one.
    """

    def __init__(self, view: View, operation: Operation | None) -> None:
        self.view, self.operation = view, operation
        self.spec, self.group, self.now = view.spec, view.group, view.now
        self.actions: list[Action] = []
        self.ended: list[Ended] = []

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
        if not self.view.in_place():
            self._end("Superseded", "the change takes new pods now")
            return
        self.actions.append(ApplyCommand())
        waiting = []
        for pod in self.view.observed.pods:
            instance = self.view.instance(pod)
            if pod.command != spec.revision and not pod.deleting:
                self.actions.append(NudgePod(name=pod.name, uid=pod.uid, command=spec.revision))
            if instance is None or spec.revision not in (instance.command, instance.next_command):
                waiting.append(pod.name)
            if instance is None or instance.next_command != spec.revision:
                continue  # its word may still be of the command before this one
            if instance.next_command_problem:
                self._end("Failed", f"{pod.name}: {instance.next_command_problem}")
                return
        if not waiting:
            self.operation = operation.enter("Restart", self.now)
        else:
            message = f"the new command has not come to {', '.join(waiting)} yet"
            self.operation = replace(operation, message=message)

    def _restart(self, operation: Operation) -> None:
        group, ranks = self.group, self.view.observed.ranks
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

    def _drain(self, operation: Operation) -> None:
        """All pods leave, the group stops; then new ones come."""
        ranks = self.view.observed.ranks
        operation = self.operation = replace(operation, revision=self.spec.revision)
        if self.view.serves_unseen():
            return
        if ranks is None and self.view.observed.pods:
            self.actions.append(ApplyRanks(replicas=0))
        elif ranks is not None and ranks.replicas:
            self.actions.append(ScaleRanks(replicas=0))
        elif not self.view.observed.pods:
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
        if self.view.joiners_ready(operation.to_size):
            self.operation = operation.enter("Resize", self.now)
        elif self.now - operation.since > self.spec.scaling.joiner_timeout:
            self._end("Withdrawn", self.view.missing(operation.to_size))
        else:
            self.operation = replace(operation, message=self.view.missing(operation.to_size))

    def _start(self, operation: Operation) -> None:
        """The coordinator starts all engines: with fewer than asked for if some don't come."""
        group = self.group
        if self._changed_mind(operation) or not self._made() or group is None:
            return
        operation = self.operation or operation
        serves = group.size > 0 and group.desired and group.state == "Serving"
        if serves and self.view.all_ready():
            self.operation = replace(operation, to_size=group.size)
            self._end("Succeeded")
        else:
            self._ask(operation)
            self.operation = replace(operation, message=group.message)

    def _made(self) -> bool:
        """Whether the StatefulSet is there, of the newest revision; if not, it is made (again)."""
        ranks, spec = self.view.observed.ranks, self.spec
        if ranks is not None and (ranks.revision == spec.revision or spec.paused):
            return True
        if not spec.paused:
            self.actions.append(ApplyRanks(replicas=self.view.new_replicas()))
        return False

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
        if other or self.view.all_ready() or self.group.size != operation.to_size:
            self._end("Succeeded")

    def _removepods(self, operation: Operation) -> None:
        wanted = self.view.wanted_replicas()
        surplus = any(one.ordinal >= wanted for one in self.view.observed.pods)
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
        again = operation.attempt > 1 or self.view.gave_up() or self.view.exhausted()
        if group.desired != operation.to_size or again:
            self.actions.append(SetTarget(operation_id=operation.id, size=operation.to_size))

    def _end(self, result: ops.Result, message: str = "") -> None:
        if self.operation is not None:
            self.ended.append(self.operation.end(result, self.now, message))
            self.operation = None
