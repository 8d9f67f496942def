"""The coordinator's Deployment: one replica, never two at a time."""

from __future__ import annotations

from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Manifest, Platform, container, manifest
from elasticmoe_operator.core.spec import Spec

STATE_DIR = "/var/lib/elasticmoe"
DEFAULT_RESOURCES = {
    "requests": {"cpu": "50m", "memory": "96Mi"},
    "limits": {"memory": "256Mi"},
}


def build(
    spec: Spec, platform: Platform, *, image: str, max_replicas: int, pod_revision: str
) -> Manifest:
    """image, max_replicas, pod_revision: what the group runs. New pods may be of another model,
    with other expert slots: they get a coordinator that knows nothing of those before."""
    found = manifest(spec, "apps/v1", "Deployment", names.coordinator(spec.name), names.COORDINATOR)
    selector = names.selector(spec.name, names.COORDINATOR)
    probe = {"port": "http", "scheme": "HTTP"}
    found["spec"] = {
        "replicas": 1,
        "revisionHistoryLimit": 2,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": selector},
        "template": {
            "metadata": {
                "labels": names.labels(spec.name, names.COORDINATOR),
                "annotations": {names.POD_REVISION: pod_revision},
            },
            "spec": {
                "serviceAccountName": names.coordinator(spec.name),
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "terminationGracePeriodSeconds": 10,
                "imagePullSecrets": [{"name": one} for one in platform.pull_secrets],
                "securityContext": {
                    "runAsNonRoot": True,
                    "fsGroup": names.USER,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        **container("coordinator", spec.coordinator, image, platform),
                        "args": _arguments(spec, max_replicas),
                        "ports": [
                            {
                                "name": "sidecars",
                                "containerPort": names.COORDINATOR_PORT,
                                "protocol": "TCP",
                            },
                            {
                                "name": "http",
                                "containerPort": names.COORDINATOR_HTTP_PORT,
                                "protocol": "TCP",
                            },
                        ],
                        "resources": spec.coordinator.resources or DEFAULT_RESOURCES,
                        "readinessProbe": {
                            "httpGet": {**probe, "path": "/readyz"},
                            "periodSeconds": 2,
                        },
                        "livenessProbe": {
                            "httpGet": {**probe, "path": "/healthz"},
                            "periodSeconds": 10,
                            # Frozen for some seconds is no reason to lose what it knows.
                            "failureThreshold": 6,
                            "initialDelaySeconds": 10,
                        },
                        "volumeMounts": [
                            {"name": "keys", "mountPath": names.KEYS_DIR, "readOnly": True},
                            {"name": "state", "mountPath": STATE_DIR},
                        ],
                    }
                ],
                "volumes": [
                    {
                        "name": "keys",
                        "secret": {
                            "secretName": names.keys_secret(spec.name),
                            "defaultMode": 0o440,
                        },
                    },
                    {"name": "state", "emptyDir": {"sizeLimit": "16Mi"}},
                ],
            },
        },
    }
    return found


def _arguments(spec: Spec, max_replicas: int) -> list[str]:
    scaling, recovery = spec.scaling, spec.recovery
    options = {
        "--deployment": spec.name,
        "--keys": names.KEYS_DIR,
        "--bind": f"tcp://0.0.0.0:{names.COORDINATOR_PORT}",
        "--http-host": "0.0.0.0",
        "--http-port": names.COORDINATOR_HTTP_PORT,
        "--state-file": f"{STATE_DIR}/state.json",
        "--policy": "declared",
        "--min-size": spec.min_replicas,
        "--max-size": max_replicas,
        "--drain-policy": scaling.drain_policy.lower(),
        "--drain-timeout": scaling.drain_timeout,
        "--lame-duck": scaling.lame_duck,
        "--prepare-limit": scaling.prepare_timeout,
        "--commit-limit": scaling.commit_timeout,
        "--loss-policy": recovery.policy.lower(),
        "--stall": recovery.stall,
        "--replacement": recovery.replacement,
        "--restart-limit": recovery.max_restarts,
        "--restart-window": recovery.window,
    }
    return ["coordinator", *(str(word) for pair in options.items() for word in pair)]
