"""What a sidecar counts of itself, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class Metrics:
    """The sidecar's own series, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._reports = Counter("elasticmoe_sidecar_reports", "Reports sent.", registry=own)
        self._goals = Counter(
            "elasticmoe_sidecar_goals",
            "Goals received, by what became of them.",
            ["outcome"],
            registry=own,
        )
        self._steps = Counter(
            "elasticmoe_sidecar_steps",
            "Steps done to bring the instance to its goal.",
            ["step", "outcome"],
            registry=own,
        )
        self._term = Gauge(
            "elasticmoe_sidecar_term", "Highest term seen, -1 for none.", registry=own
        )
        self._launcher = Gauge(
            "elasticmoe_sidecar_launcher_up",
            "Whether the launcher answers.",
            registry=own,
        )
        self._gate = Gauge("elasticmoe_sidecar_gate_up", "Whether the gate answers.", registry=own)
        self._heard = Gauge(
            "elasticmoe_sidecar_coordinator_heard_timestamp_seconds",
            "When the coordinator was last heard, in Unix seconds; 0 for never.",
            registry=own,
        )

    def reported(self, term: int, launcher: bool, gate: bool) -> None:
        """A report was sent."""
        self._reports.inc()
        self._term.set(term)
        self._launcher.set(launcher)
        self._gate.set(gate)

    def goal(self, outcome: str) -> None:
        """A goal came: accepted, repeated or refused."""
        self._goals.labels(outcome).inc()

    def step(self, name: str, failed: bool) -> None:
        """A step was done."""
        self._steps.labels(name, "failed" if failed else "done").inc()

    def heard(self) -> None:
        """The coordinator said something."""
        self._heard.set_to_current_time()

    def text(self) -> bytes:
        """All series as Prometheus' text."""
        return generate_latest(self._registry)
