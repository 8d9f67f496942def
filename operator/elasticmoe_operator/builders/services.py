"""Three Services: for clients (ready ranks only), one that names pods, one for the coordinator."""

from __future__ import annotations

from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Manifest, manifest
from elasticmoe_operator.core.spec import Spec


def build(spec: Spec) -> list[Manifest]:
    """Serving, headless and coordinator."""
    return [_serving(spec), _ranks(spec), _coordinator(spec)]


def _serving(spec: Spec) -> Manifest:
    found = manifest(spec, "v1", "Service", spec.name, names.RANK)
    found["metadata"]["annotations"] = dict(spec.service.annotations)
    found["spec"] = {
        "type": spec.service.type,
        "selector": names.selector(spec.name, names.RANK),
        "ports": [
            {"name": "http", "port": spec.service.port, "targetPort": "http", "protocol": "TCP"}
        ],
    }
    return found


def _ranks(spec: Spec) -> Manifest:
    found = manifest(spec, "v1", "Service", names.ranks_service(spec.name), names.RANK)
    found["spec"] = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": names.selector(spec.name, names.RANK),
        "ports": [
            {"name": "http", "port": spec.serving_port, "targetPort": "http", "protocol": "TCP"}
        ],
    }
    return found


def _coordinator(spec: Spec) -> Manifest:
    found = manifest(spec, "v1", "Service", names.coordinator(spec.name), names.COORDINATOR)
    found["spec"] = {
        # While it learns who is there it is not ready, and has to be reached all the same.
        "publishNotReadyAddresses": True,
        "selector": names.selector(spec.name, names.COORDINATOR),
        "ports": [
            {
                "name": "sidecars",
                "port": names.COORDINATOR_PORT,
                "targetPort": "sidecars",
                "protocol": "TCP",
            },
            {
                "name": "http",
                "port": names.COORDINATOR_HTTP_PORT,
                "targetPort": "http",
                "protocol": "TCP",
            },
        ],
    }
    return found
