"""The PodDisruptionBudget: one rank at a time may be evicted, and waits for the group to go on."""

from __future__ import annotations

from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Manifest, manifest
from elasticmoe_operator.core.spec import Spec


def build(spec: Spec, *, size: int) -> Manifest:
    """size: ranks that serve. Standby pods are never Ready: they may always be evicted."""
    found = manifest(spec, "policy/v1", "PodDisruptionBudget", spec.name, names.RANK)
    selector = {**names.selector(spec.name, names.RANK), names.ACTIVE: "true"}
    found["spec"] = {
        "minAvailable": max(1, size - 1),
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": selector},
    }
    return found
