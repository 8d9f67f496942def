"""NetworkPolicies: who reaches the ranks and the coordinator. Egress is left to the cluster."""

from __future__ import annotations

from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Manifest, Platform, manifest
from elasticmoe_operator.core.spec import Spec


def build(spec: Spec, platform: Platform) -> list[Manifest]:
    """One for the ranks, one for the coordinator."""
    return [_ranks(spec), _coordinator(spec, platform)]


def _ranks(spec: Spec) -> Manifest:
    found = manifest(
        spec, "networking.k8s.io/v1", "NetworkPolicy", names.ranks_service(spec.name), names.RANK
    )
    found["spec"] = {
        "podSelector": {"matchLabels": names.selector(spec.name, names.RANK)},
        "policyTypes": ["Ingress"],
        "ingress": [
            # Rank 0 chooses ports when it starts or resizes, so ranks need all of them.
            {"from": [_pods(spec, names.RANK)]},
            {"from": [_pods(spec, names.COORDINATOR)], "ports": [_tcp(names.PROBE_PORT)]},
            {"ports": [_tcp(spec.serving_port), _tcp(names.SIDECAR_PORT)]},
        ],
    }
    return found


def _coordinator(spec: Spec, platform: Platform) -> Manifest:
    found = manifest(
        spec,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        names.coordinator(spec.name),
        names.COORDINATOR,
    )
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": platform.namespace}},
        "podSelector": {"matchLabels": {names.NAME: names.OPERATOR_APP}},
    }
    found["spec"] = {
        "podSelector": {"matchLabels": names.selector(spec.name, names.COORDINATOR)},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [_pods(spec, names.RANK)], "ports": [_tcp(names.COORDINATOR_PORT)]},
            {"from": [operator], "ports": [_tcp(names.COORDINATOR_HTTP_PORT)]},
        ],
    }
    return found


def _pods(spec: Spec, component: str) -> Manifest:
    return {"podSelector": {"matchLabels": names.selector(spec.name, component)}}


def _tcp(port: int) -> Manifest:
    return {"port": port, "protocol": "TCP"}
