"""Prometheus metrics of a coordinator, made from the status when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from elasticmoe_coordinator.core.status import GroupState, GroupStatus, OperationStatus

_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600)


class _FromStatus(Collector):
    """Gauges of group and instances. `*_requests` are per instance: sum them for an autoscaler."""

    def __init__(
        self, status: Callable[[], GroupStatus], dropped: Callable[[], Mapping[str, int]]
    ) -> None:
        self._status, self._dropped = status, dropped

    def collect(self) -> Iterator[Metric]:
        """Called for each scrape."""
        status = self._status()
        for name, text, value in (
            ("size", "DP size that serves", status.size),
            ("desired_size", "DP size that is desired", status.desired),
            ("generation", "lives of the group's engines so far", status.generation),
            ("term", "this coordinator's term", status.term),
            ("elastic", "1 while the engines can be resized in place", int(status.elastic)),
            ("slots_per_rank", "expert slots of each rank", status.slots_per_rank),
        ):
            yield GaugeMetricFamily(f"elasticmoe_group_{name}", text, value)
        state = GaugeMetricFamily(
            "elasticmoe_group_state", "1 for the state that the group is in", labels=["state"]
        )
        for known in get_args(GroupState):
            state.add_metric([known], int(known == status.state))
        yield state
        yield from self._instances(status)
        dropped = CounterMetricFamily(
            "elasticmoe_messages_dropped", "messages that could not be used", labels=["reason"]
        )
        for reason, count in self._dropped().items():
            dropped.add_metric([reason], count)
        yield dropped

    def _instances(self, status: GroupStatus) -> Iterator[Metric]:
        for name, text, attribute in (
            ("ready", "1 while the instance takes new requests", "ready"),
            ("active", "1 while its rank serves", "active"),
            ("suspect", "1 while nothing is heard from its sidecar", "suspect"),
            ("in_flight_requests", "requests inside its engine", "in_flight"),
            ("held_requests", "requests held while the engine commits a resize", "held"),
            ("waiting_requests", "requests that the engine has queued", "waiting"),
            ("running_requests", "requests that the engine computes", "running"),
            ("kv_cache_usage", "part of the KV cache that is used, 0 to 1", "kv_cache"),
        ):
            family = GaugeMetricFamily(f"elasticmoe_instance_{name}", text, labels=["instance"])
            for one in status.instances:
                family.add_metric([one.instance], float(getattr(one, attribute)))
            yield family


class Metrics:
    """The registry of one coordinator."""

    def __init__(
        self, status: Callable[[], GroupStatus], dropped: Callable[[], Mapping[str, int]]
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_FromStatus(status, dropped))
        self._operations = Counter(
            "elasticmoe_operations", "operations ended", ["kind", "state"], registry=self._registry
        )
        self._phases = Histogram(
            "elasticmoe_operation_phase_seconds",
            "seconds that phases took",
            ["kind", "phase"],
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def ended(self, operation: OperationStatus) -> None:
        """An operation is over."""
        self._operations.labels(operation.kind, operation.state).inc()
        for timing in operation.phases:
            self._phases.labels(operation.kind, timing.phase).observe(timing.seconds)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
