"""A new coordinator learns from the sidecars' journals what the group is and does.

What its predecessor wrote down beside it, if it did, is one more journal. It changes nothing until
every instance of the newest record has answered, or has been silent for so long that the rules of
loss have to decide about it.
"""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_protocol.messages import Goal, Record

from elasticmoe_coordinator.core.config import GroupConfig
from elasticmoe_coordinator.core.members import Roster


@dataclass(frozen=True)
class Memory:
    """What a coordinator wrote down: its term, and the record as of its last order."""

    term: int
    record: Record


class Learning:
    """Gathers journals. term: the highest seen."""

    def __init__(
        self, config: GroupConfig, term: int, now: float, memory: Memory | None = None
    ) -> None:
        self._config = config
        self._began = now
        self.term = max(term, memory.term) if memory else term
        self._memory = memory
        self.newest: Goal | None = None

    def heard(self, goal: Goal | None) -> None:
        """An instance told its newest goal."""
        if goal is None:
            return
        self.term = max(self.term, goal.term)
        newest = self.newest
        if newest is None or (goal.term, goal.seq) > (newest.term, newest.seq):
            self.newest = goal

    def passed(self, term: int) -> None:
        """Somebody has seen this term."""
        self.term = max(self.term, term)

    def shift(self, seconds: float, now: float) -> None:
        """The coordinator itself stood still for so long: nobody could answer in that time."""
        self._began = min(self._began + seconds, now)

    def record(self) -> Record:
        """What is known of the group; a new one when nobody remembers any."""
        memory, newest = self._memory, self.newest
        if memory is not None and (newest is None or newest.term <= memory.term):
            return memory.record
        if newest is not None:
            return newest.record
        return Record(generation=0, desired=self._config.size or 0)

    def missing(self, roster: Roster, now: float) -> list[str]:
        """Instances of the record that have not answered yet."""
        record = self.record()
        names = [member.instance for member in (*record.members, *record.joining)]
        return [name for name in names if not roster.fresh(name, now)]

    def complete(self, roster: Roster, now: float) -> bool:
        """Enough is known to act."""
        waited = now - self._began
        # Sidecars that remember something may just be a little slower than those that don't.
        if waited < 4 * self._config.heartbeat:
            return False
        return not self.missing(roster, now) or waited > self._config.learn_limit
