"""What is known of each instance: its facts, its newest report, and when it was last heard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from elasticmoe_protocol.messages import (
    EngineReport,
    Facts,
    GateReport,
    Goal,
    Hello,
    Load,
    Report,
)

from elasticmoe_coordinator.core.outbox import ProbeAnswer


@dataclass
class Instance:
    """One instance.

    order: when it first registered, compared to the others. seen: when its sidecar was last heard.
    probed: when its launcher last answered directly. registered_at: Unix seconds of this
    incarnation's first Hello. gate_seen: when its gate last answered.
    """

    name: str
    order: int
    facts: Facts
    incarnation: str
    boot: str
    accepted: Goal | None
    registered_at: float
    seen: float
    gate_seen: float
    hello: int = 0
    """Number of the Hello from which the facts are."""
    report: Report | None = None
    probed: float = 0.0
    told_directly: EngineReport | None = None
    """What its launcher said of the engine while its sidecar was silent."""
    replaced_at: float = 0.0
    """When another incarnation took this name: what ran in the one before is gone."""

    @property
    def engine(self) -> EngineReport:
        """The engine as last reported."""
        return self.report.engine if self.report else EngineReport()

    @property
    def gate(self) -> GateReport | None:
        """The gate's word, None while its API server does not answer."""
        return self.report.gate if self.report else None

    @property
    def load(self) -> Load:
        """The engine's own load."""
        return self.report.load if self.report else Load()

    @property
    def leaving(self) -> bool:
        """It was told to go."""
        return self.report is not None and self.report.leaving

    @property
    def has_no_engine(self) -> bool:
        """Its launcher says that nothing runs or ran."""
        return self.report is not None and self.report.launcher and self.engine.phase == "absent"

    def runs(self, launch: str) -> bool:
        """Its engine with this launch id answers requests."""
        return self.engine.phase == "running" and self.engine.launch == launch


@dataclass
class Roster:
    """All instances that said hello. silence: seconds without a word until one is suspect."""

    silence: float
    instances: dict[str, Instance] = field(default_factory=dict)
    _order: int = 0

    def __iter__(self) -> Iterator[Instance]:
        return iter(sorted(self.instances.values(), key=place))

    def get(self, name: str) -> Instance | None:
        """The instance of this name."""
        return self.instances.get(name)

    def fresh(self, name: str, now: float) -> Instance | None:
        """The instance, if it was heard lately and its launcher answers it."""
        found = self.instances.get(name)
        if found is None or found.report is None or self.silent(name, now):
            return None
        return found if found.report.launcher else None

    def silent(self, name: str, now: float) -> bool:
        """Nothing was heard from its sidecar for too long."""
        found = self.instances.get(name)
        return found is None or now - found.seen > self.silence

    def hello(self, message: Hello, now: float) -> str:
        """Take note of an instance; returns why it is refused, or "".

        A name belongs to one incarnation. Another one gets it once the first is silent.
        """
        known = self.instances.get(message.instance)
        if known is None:
            self._order += 1
            self.instances[message.instance] = Instance(
                message.instance,
                self._order,
                message.facts,
                message.incarnation,
                message.boot,
                message.accepted,
                now,
                now,
                now,
                message.number,
            )
            return ""
        if known.incarnation != message.incarnation:
            if not self.silent(message.instance, now):
                return (
                    f"another instance is registered as {message.instance}: give this one another "
                    "name, or wait until the other one is gone"
                )
            known.registered_at = known.replaced_at = now
            known.report = None
        if known.boot != message.boot:
            known.report = None
        elif message.number < known.hello:
            return ""  # late: a newer one is known
        known.hello = message.number
        known.facts, known.incarnation, known.boot = (
            message.facts,
            message.incarnation,
            message.boot,
        )
        known.accepted, known.seen = message.accepted, now
        return ""

    def note(self, message: Report, now: float) -> bool:
        """Take a report; False when its sender has to say Hello first.

        So what is known of an instance is never older than what it reports.
        """
        known = self.instances.get(message.instance)
        if known is None or known.boot != message.boot or message.hello > known.hello:
            return False
        if known.report is not None and message.seq <= known.report.seq:
            return True  # late or said twice
        known.report, known.seen, known.told_directly = message, now, None
        if message.gate is not None or message.engine.phase != "running":
            known.gate_seen = now
        return True

    def probed(self, answer: ProbeAnswer, now: float) -> None:
        """A silent instance's launcher was asked directly."""
        known = self.instances.get(answer.instance)
        if known is None or known.report is None or answer.engine is None:
            return
        if not self.silent(known.name, now):
            return  # its sidecar is back and knows better
        known.probed = now
        known.told_directly = answer.engine

    def forget(self, name: str) -> None:
        """It is gone and nothing depends on it."""
        self.instances.pop(name, None)

    def shift(self, seconds: float, now: float) -> None:
        """The coordinator itself stood still for so long: nobody was silent in that time."""
        for known in self.instances.values():
            known.seen = min(known.seen + seconds, now)
            known.gate_seen = min(known.gate_seen + seconds, now)


def place(instance: Instance) -> tuple[int, int]:
    """Ordinal order; those without one come after, in the order in which they registered."""
    ordinal = instance.facts.ordinal
    return (ordinal, 0) if ordinal is not None else (1 << 30, instance.order)
