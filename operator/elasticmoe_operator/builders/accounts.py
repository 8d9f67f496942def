"""ServiceAccounts without any right: neither ranks nor coordinator call the Kubernetes API."""

from __future__ import annotations

from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Manifest, manifest
from elasticmoe_operator.core.spec import Spec


def build(spec: Spec) -> list[Manifest]:
    """One for the ranks, one for the coordinator."""
    return [
        {
            **manifest(spec, "v1", "ServiceAccount", name, component),
            "automountServiceAccountToken": False,
        }
        for name, component in (
            (names.ranks_service(spec.name), names.RANK),
            (names.coordinator(spec.name), names.COORDINATOR),
        )
    ]
