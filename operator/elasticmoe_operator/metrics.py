"""The operator's own Prometheus series."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RECONCILE = Histogram(
    "elasticmoe_operator_reconcile_seconds",
    "One look at one deployment.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
ERRORS = Counter(
    "elasticmoe_operator_errors_total", "Looks that failed, by what they failed at.", ["at"]
)
OPERATIONS = Counter(
    "elasticmoe_operator_operations_total", "Operations that ended.", ["kind", "result"]
)
PHASES = Histogram(
    "elasticmoe_operator_operation_phase_seconds",
    "Phases of operations that ended.",
    ["kind", "phase"],
    buckets=(0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640),
)
DEPLOYMENTS = Gauge("elasticmoe_operator_deployments", "Deployments that are looked after.")
