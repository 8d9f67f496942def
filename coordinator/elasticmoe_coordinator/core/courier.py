"""Turns orders into goals: numbered, whole, said again until they are accepted."""

from __future__ import annotations

from dataclasses import dataclass, field

from elasticmoe_protocol.messages import Goal, LaunchSpec, Record
from msgspec.structs import replace

from elasticmoe_coordinator.core.members import Instance
from elasticmoe_coordinator.core.view import Order


@dataclass
class Courier:
    """The newest goal of each instance, and whether it knows it.

    leader: this coordinator's own id.
    specs: launch id -> how it was ordered.
    """

    deployment: str
    term: int
    leader: str
    repeat: float
    goals: dict[str, Goal] = field(default_factory=dict)
    specs: dict[str, LaunchSpec] = field(default_factory=dict)
    _seq: int = 0
    _sent: dict[str, float] = field(default_factory=dict)

    def learn(self, instance: Instance) -> None:
        """An instance told what it journaled."""
        goal = instance.accepted
        if goal is not None and goal.launch is not None:
            self.specs.setdefault(goal.launch.launch, goal.launch)
        self._sent.pop(instance.name, None)

    def accepted(self, instance: Instance) -> bool:
        """It journaled its newest goal."""
        goal, report = self.goals.get(instance.name), instance.report
        return (
            goal is not None
            and report is not None
            and (report.term, report.leader, report.goal) == (goal.term, goal.leader, goal.seq)
        )

    def knows(self, instance: Instance) -> tuple[str, str]:
        """(operation, phase) that it certainly journaled."""
        goal = self.goals.get(instance.name)
        operation = goal.record.operation if goal else None
        if operation is None or not self.accepted(instance):
            return ("", "")
        return (operation.id, operation.phase)

    def was_ready(self, instance: Instance) -> bool:
        """Its newest goal, ours or the one it remembers, said ready."""
        goal = self.goals.get(instance.name) or instance.accepted
        return goal is not None and goal.ready

    def goal(self, instance: Instance, order: Order, record: Record, now: float) -> Goal | None:
        """The goal to send now: a new one, an unaccepted one again, or None."""
        operation = record.operation.id if record.operation else ""
        present = self.goals.get(instance.name)
        wanted = Goal(
            deployment=self.deployment,
            instance=instance.name,
            term=self.term,
            seq=present.seq if present else -1,
            leader=self.leader,
            generation=record.generation,
            operation=operation,
            launch=order.launch,
            kill=order.kill,
            fence=order.fence,
            scale=order.scale,
            preflight=order.preflight,
            ready=order.ready,
            watch=order.watch,
            released=order.released,
            record=record,
        )
        if wanted != present:
            self._seq += 1
            wanted = replace(wanted, seq=self._seq)
            self.goals[instance.name] = wanted
        elif self.accepted(instance) or now - self._sent.get(instance.name, 0.0) < self.repeat:
            return None
        self._sent[instance.name] = now
        return wanted

    def foreign(self, term: int, leader: str) -> bool:
        """Whether a goal of this term and leader is a sign of another coordinator's rule."""
        return term > self.term or (term == self.term and leader != self.leader)

    def forget(self, name: str) -> None:
        """The instance is gone."""
        self.goals.pop(name, None)
        self._sent.pop(name, None)
