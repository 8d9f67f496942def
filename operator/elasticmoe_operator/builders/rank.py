"""The pod of a rank: the user's template with launcher, gate and sidecar put in.

The engine's image is not changed: an init container copies launcher and gate (standard library
only) into a volume, and the engine container's command becomes the launcher, which starts the
engine from a warm process when the sidecar says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Manifest, Platform, container, field_env
from elasticmoe_operator.core.spec import Spec

SIDECAR_RESOURCES = {
    "requests": {"cpu": "50m", "memory": "64Mi"},
    "limits": {"memory": "256Mi"},
}
RESTART_S = 120
"""What a planned restart without the leaving pod may take after its drain."""
SPARE_S = 30
UNREACHABLE_S = 30
"""Seconds on a node that vanished; Kubernetes' own 300 s would be five minutes without service."""
_UNREACHABLE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

Object = Mapping[str, Any]


def grace_s(spec: Spec) -> int:
    """Seconds that a pod may take to leave: its drain, a restart of the others, and some more."""
    wanted = spec.template.get("spec", {}).get("terminationGracePeriodSeconds") or 0
    return max(int(wanted), spec.scaling.drain_timeout + RESTART_S + SPARE_S)


def build(spec: Spec, platform: Platform, *, image: str) -> Manifest:
    """The pod template of the ranks' StatefulSet. image: of our containers in this revision.

    Raises SpecError.
    """
    metadata = dict(spec.template.get("metadata") or {})
    own = {**names.labels(spec.name, names.RANK), names.POD_REVISION: spec.pod_revision}
    pod = dict(spec.template.get("spec") or {})
    users = [one for one in pod["containers"] if one.get("name") != names.ENGINE_CONTAINER]
    security = {"fsGroup": names.USER, **(pod.get("securityContext") or {})}
    pod |= {
        "containers": [_engine(spec), *users],
        "initContainers": [
            _inject(spec, platform, image),
            *(pod.get("initContainers") or []),
            _sidecar(spec, platform, image),
        ],
        "volumes": [*(pod.get("volumes") or []), *_volumes(spec)],
        "securityContext": security,
        "tolerations": _tolerations(pod.get("tolerations") or []),
        "terminationGracePeriodSeconds": grace_s(spec),
        # A Service named `vllm` would set VLLM_PORT, which vLLM takes for its own.
        "enableServiceLinks": False,
    }
    pod.setdefault("serviceAccountName", names.ranks_service(spec.name))
    pod.setdefault("automountServiceAccountToken", False)
    secrets = [*(pod.get("imagePullSecrets") or []), *({"name": s} for s in platform.pull_secrets)]
    if secrets:
        pod["imagePullSecrets"] = secrets
    return {
        "metadata": {
            "labels": {**(metadata.get("labels") or {}), **own},
            "annotations": dict(metadata.get("annotations") or {}),
        },
        "spec": pod,
    }


def _engine(spec: Spec) -> Manifest:
    engine = dict(spec.engine)
    engine.pop("args", None)
    engine.pop("startupProbe", None)
    lifecycle = {**(engine.get("lifecycle") or {}), "preStop": _leave(spec)}
    probe = {"port": names.PROBE_PORT, "scheme": "HTTP"}
    return engine | {
        "command": [
            *("python3", "-m", "elasticmoe_engine.launcher"),
            *("--run-dir", names.RUN_DIR),
            *("--probe-port", str(names.PROBE_PORT)),
            *("--host-ip", "$(POD_IP)"),
            *("--command-file", f"{names.COMMAND_DIR}/{names.COMMAND_FILE}"),
            *spec.launcher_options,
        ],
        "env": _environment(engine.get("env") or []),
        "ports": _ports(engine.get("ports") or [], spec.serving_port),
        "volumeMounts": [
            *(engine.get("volumeMounts") or []),
            {"name": "elasticmoe-run", "mountPath": names.RUN_DIR},
            {"name": "elasticmoe-engine", "mountPath": names.ENGINE_DIR, "readOnly": True},
            {"name": "elasticmoe-command", "mountPath": names.COMMAND_DIR, "readOnly": True},
        ],
        # The launcher answers: a warm pod without an engine lives, and readiness is the group's.
        "livenessProbe": {
            "httpGet": {**probe, "path": "/livez"},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
            "initialDelaySeconds": 20,
        },
        "readinessProbe": {
            "httpGet": {**probe, "path": "/readyz"},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
            "failureThreshold": 1,
        },
        "lifecycle": lifecycle,
    }


def _leave(spec: Spec) -> Manifest:
    """Ask to leave and wait: sidecars get their SIGTERM only after this container ended."""
    timeout = str(grace_s(spec) - SPARE_S // 2)
    words = ["python3", "-m", "elasticmoe_engine.leave", "--run-dir", names.RUN_DIR]
    return {"exec": {"command": [*words, "--timeout", timeout]}}


def _environment(given: list[Object]) -> list[Object]:
    path = names.ENGINE_DIR
    kept = []
    for one in given:
        if one.get("name") == "PYTHONPATH" and one.get("value"):
            path = f"{path}:{one['value']}"
        elif one.get("name") not in ("PYTHONPATH", "POD_IP"):
            kept.append(one)
    ours = [*field_env("POD_IP"), {"name": "PYTHONPATH", "value": path}]
    return [*ours, *kept]


def _ports(given: list[Object], serving: int) -> list[Object]:
    """The Service finds the serving port by the name `http`."""
    others = [
        one
        for one in given
        if one.get("containerPort") not in (serving, names.PROBE_PORT) and one.get("name") != "http"
    ]
    return [
        {"name": "http", "containerPort": serving, "protocol": "TCP"},
        {"name": "probe", "containerPort": names.PROBE_PORT, "protocol": "TCP"},
        *others,
    ]


def _inject(spec: Spec, platform: Platform, image: str) -> Manifest:
    return {
        **container(names.INJECT_CONTAINER, spec.sidecar, image, platform),
        "args": ["inject", names.ENGINE_DIR],
        "resources": SIDECAR_RESOURCES,
        "volumeMounts": [{"name": "elasticmoe-engine", "mountPath": names.ENGINE_DIR}],
    }


def _sidecar(spec: Spec, platform: Platform, image: str) -> Manifest:
    coordinator = f"{names.coordinator(spec.name)}.{spec.namespace}.svc"
    options = {
        "--deployment": spec.name,
        "--instance": "$(POD_NAME)",
        "--ordinal": "$(POD_INDEX)",
        "--incarnation": "$(POD_UID)",
        "--address": "$(POD_IP)",
        "--rpc-port": names.RPC_PORT,
        "--coordinator": f"tcp://{coordinator}:{names.COORDINATOR_PORT}",
        "--keys": names.KEYS_DIR,
        "--run-dir": names.RUN_DIR,
        "--policy": "declared",
        "--http-host": "0.0.0.0",
        "--http-port": names.SIDECAR_PORT,
        "--leave-grace": grace_s(spec),
    }
    return {
        **container(names.SIDECAR_CONTAINER, spec.sidecar, image, platform),
        "restartPolicy": "Always",
        "args": ["sidecar", *(str(word) for pair in options.items() for word in pair)],
        "env": field_env("POD_NAME", "POD_UID", "POD_IP", "POD_INDEX"),
        "ports": [{"name": "metrics", "containerPort": names.SIDECAR_PORT, "protocol": "TCP"}],
        "resources": spec.sidecar.resources or SIDECAR_RESOURCES,
        "livenessProbe": {
            "httpGet": {"port": "metrics", "path": "/livez", "scheme": "HTTP"},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
            "initialDelaySeconds": 20,
        },
        "volumeMounts": [
            {"name": "elasticmoe-run", "mountPath": names.RUN_DIR},
            {"name": "elasticmoe-keys", "mountPath": names.KEYS_DIR, "readOnly": True},
        ],
    }


def _volumes(spec: Spec) -> list[Manifest]:
    return [
        {"name": "elasticmoe-run", "emptyDir": {}},
        {"name": "elasticmoe-engine", "emptyDir": {}},
        {"name": "elasticmoe-command", "configMap": {"name": names.command_map(spec.name)}},
        {
            "name": "elasticmoe-keys",
            "secret": {
                "secretName": names.keys_secret(spec.name),
                "items": [{"key": "sidecar.json", "path": "sidecar.json"}],
                "defaultMode": 0o440,
            },
        },
    ]


def _tolerations(given: list[Object]) -> list[Object]:
    named = {one.get("key") for one in given}
    ours = [
        {
            "key": key,
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": UNREACHABLE_S,
        }
        for key in _UNREACHABLE
        if key not in named and None not in named
    ]
    return [*given, *ours]
