"""What an operation may look at in one turn, and the order it gives to each instance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from elasticmoe_protocol.messages import (
    Fence,
    GateReport,
    LaunchSpec,
    Member,
    PreflightSpec,
    ScaleOrder,
)

from elasticmoe_coordinator.core import fitness
from elasticmoe_coordinator.core.book import Book
from elasticmoe_coordinator.core.config import GroupConfig
from elasticmoe_coordinator.core.layout import redundant_experts
from elasticmoe_coordinator.core.members import Instance, Roster


@dataclass(frozen=True)
class Order:
    """What one instance should be now: a goal without its envelope."""

    launch: LaunchSpec | None = None
    kill: bool = False
    fence: Fence = "open"
    scale: ScaleOrder | None = None
    preflight: PreflightSpec | None = None
    ready: bool = False
    watch: bool = False
    released: bool = False


@dataclass
class View:
    """The group at one instant.

    specs: how each launch was ordered, so that asked again it is asked the same. knowing: instances
    that accepted the newest goal, with the phase of the operation that it told them of.
    ready: instances whose newest goal said ready.
    """

    config: GroupConfig
    roster: Roster
    book: Book
    now: float
    specs: dict[str, LaunchSpec]
    knowing: dict[str, tuple[str, str]] = field(default_factory=dict)
    ready: frozenset[str] = frozenset()

    # --- instances ------------------------------------------------------------------------------

    def fresh(self, name: str) -> Instance | None:
        """The instance, if what it says is new."""
        return self.roster.fresh(name, self.now)

    def up(self, member: Member) -> bool:
        """Its engine runs and its gate answers."""
        found = self.fresh(member.instance)
        return found is not None and found.runs(member.launch) and self.gate(member) is not None

    def all_up(self) -> bool:
        """All engines of the layout are up."""
        return all(self.up(member) for member in self.book.record.members)

    def gate(self, member: Member) -> GateReport | None:
        """What the gate of this launch says, None if that is not known now."""
        found = self.fresh(member.instance)
        gate = found.gate if found else None
        return gate if gate is not None and gate.launch == member.launch else None

    def gates(self, members: Iterable[Member]) -> list[GateReport | None]:
        """The gates of some members."""
        return [self.gate(member) for member in members]

    def was_ready(self, name: str) -> bool:
        """Its newest goal said ready."""
        return name in self.ready

    def gone(self, name: str) -> bool:
        """No engine is there, by its launcher's own word."""
        found = self.fresh(name)
        return found is not None and found.has_no_engine

    def unreachable(self, name: str) -> bool:
        """Neither the sidecar nor the launcher was heard lately."""
        found = self.roster.get(name)
        if found is None:
            return True
        return (
            self.roster.silent(name, self.now)
            and self.now - found.probed > self.roster.silence + 2 * PROBE_EVERY
        )

    def candidates(self) -> list[Instance]:
        """Instances that could serve: the members, and standbys without an objection to them."""
        members = set(self.book.names)
        return [
            one
            for one in self.roster
            if not one.leaving
            and (one.name in members or (self.fresh(one.name) and not self.objection(one)))
        ]

    def unheard(self) -> list[str]:
        """Members that were not heard since this coordinator began; they may well serve."""
        return [name for name in self.book.names if self.roster.get(name) is None]

    def starters(self) -> list[Instance]:
        """Instances that could be started now, all engines being down."""
        return [
            one
            for one in self.roster
            if not one.leaving and self.gone(one.name) and not self.objection(one)
        ]

    def objection(self, instance: Instance) -> str:
        """Why this instance can't serve in this group, "" when it can."""
        record = self.book.record
        size = record.desired or self.config.max_size
        return fitness.objection(instance, self.reference(), self.now) or fitness.too_few_slots(
            instance, record.slots, size
        )

    @property
    def down(self) -> bool:
        """No engine serves: none was started yet, or a recovery runs."""
        running = self.book.operation
        return not self.book.size or (running is not None and running.kind == "recover")

    def reference(self) -> Instance | None:
        """The instance with which the others have to agree: rank 0.

        While no engine serves, one of those that are most: a single launcher that got another
        command, or did not get it, keeps nobody else from being started.
        """
        members = [one for name in self.book.names if (one := self.roster.get(name)) is not None]
        if members and not self.down:
            return members[0]
        fit = [one for one in self.roster if not fitness.objection(one, None, self.now)]
        fit = [one for one in fit if self.fresh(one.name)] or fit
        kinds = Counter(fitness.kind(one) for one in fit)
        first = members[0] if members else None
        return max(fit, key=lambda one: kinds[fitness.kind(one)], default=first)

    def strays(self, layout: Iterable[str]) -> list[str]:
        """Instances outside the layout that may still have an engine."""
        inside = set(layout)
        return [
            one.name
            for one in self.roster
            if one.name not in inside and one.report is not None and one.engine.phase != "absent"
        ]

    # --- time -----------------------------------------------------------------------------------

    def waited(self) -> float:
        """Seconds since the running phase began."""
        return self.now - self.book.phase_since()

    def all_know(self, names: Iterable[str]) -> bool:
        """All these journaled that the operation is in its present phase."""
        operation = self.book.running
        return all(self.knowing.get(name) == (operation.id, operation.phase) for name in names)

    # --- orders ---------------------------------------------------------------------------------

    def spec(self, member: Member, layout: Sequence[Member], joiner: bool) -> LaunchSpec | None:
        """How to start this member's engine in this layout; None while rank 0 is not known."""
        known = self.specs.get(member.launch)
        if known is not None:
            return known
        master = self.roster.get(layout[0].instance)
        if master is None:
            return None
        experts = max(0, master.facts.num_experts)
        spec = LaunchSpec(
            launch=member.launch,
            rank=member.rank,
            size=len(layout),
            joiner=joiner,
            master_address=master.facts.address,
            rpc_port=master.facts.rpc_port,
            redundant_experts=redundant_experts(experts, self.book.record.slots, len(layout)),
            max_size=self.config.max_size,
            command=master.facts.command,
            fingerprint=master.facts.fingerprint,
        )
        self.specs[member.launch] = spec
        return spec


PROBE_EVERY = 2.0
"""Seconds between two questions to a silent instance's launcher."""
