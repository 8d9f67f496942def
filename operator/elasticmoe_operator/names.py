"""Names that other programs know: the API group, labels, annotations, ports, child objects."""

from __future__ import annotations

from typing import Final

GROUP: Final = "elasticmoe.io"
VERSION: Final = "v1alpha1"
KIND: Final = "ElasticMoEDeployment"
PLURAL: Final = "elasticmoedeployments"
API_VERSION: Final = f"{GROUP}/{VERSION}"
FIELD_MANAGER: Final = "elasticmoe-operator"
FINALIZER: Final = f"{GROUP}/drain"

DEPLOYMENT: Final = f"{GROUP}/deployment"
"""Label of every child: the name of its ElasticMoEDeployment."""
ACTIVE: Final = f"{GROUP}/active"
"""Label of a pod that is a rank of the serving layout: what an HPA counts."""
REVISION: Final = f"{GROUP}/revision"
"""Annotation of the StatefulSet: what the group runs."""
POD_REVISION: Final = f"{GROUP}/pod-revision"
"""Annotation of the StatefulSet and the coordinator, label of ranks' pods: what takes new pods."""
COMMAND: Final = f"{GROUP}/command"
"""Annotation of a pod: the command that its volume was updated for."""
IMAGE: Final = f"{GROUP}/image"
MAX_REPLICAS: Final = f"{GROUP}/max-replicas"
LAUNCHER_OPTIONS: Final = f"{GROUP}/launcher-options"
"""Annotation of the pod template: options for the launcher, for engines that are not vLLM."""
ROTATE: Final = f"{GROUP}/rotate-keys"
"""Annotation of an ElasticMoEDeployment: another value makes new keys."""
KEYS: Final = f"{GROUP}/keys"
"""Annotation of a pod: the rotation that its keys' volume was updated for."""
ROTATED_AT: Final = f"{GROUP}/rotated-at"
"""Annotation of the keys' Secret: since when (Unix seconds) old and new keys are taken."""

NAME: Final = "app.kubernetes.io/name"
INSTANCE: Final = "app.kubernetes.io/instance"
COMPONENT: Final = "app.kubernetes.io/component"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
APP: Final = "elasticmoe"
RANK: Final = "rank"
COORDINATOR: Final = "coordinator"
OPERATOR_APP: Final = "elasticmoe-operator"

ENGINE_CONTAINER: Final = "engine"
SIDECAR_CONTAINER: Final = "elasticmoe-sidecar"
INJECT_CONTAINER: Final = "elasticmoe-inject"

COORDINATOR_PORT: Final = 7410
COORDINATOR_HTTP_PORT: Final = 7411
PROBE_PORT: Final = 7412
SIDECAR_PORT: Final = 7413
RPC_PORT: Final = 29550
"""Where rank 0 listens for the group (vLLM's own default for data parallelism)."""

RUN_DIR: Final = "/run/elasticmoe"
ENGINE_DIR: Final = "/opt/elasticmoe-engine"
COMMAND_DIR: Final = "/etc/elasticmoe/command"
COMMAND_FILE: Final = "command.json"
KEYS_DIR: Final = "/etc/elasticmoe/keys"
USER: Final = 65532
"""Of our containers, and the group that shares the run folder."""


def labels(deployment: str, component: str = "") -> dict[str, str]:
    """Labels of a child object."""
    found = {
        NAME: APP,
        INSTANCE: deployment,
        MANAGED_BY: OPERATOR_APP,
        DEPLOYMENT: deployment,
    }
    return {**found, COMPONENT: component} if component else found


def selector(deployment: str, component: str) -> dict[str, str]:
    """What selects the pods of one component; never changed, StatefulSets forbid it."""
    return {DEPLOYMENT: deployment, COMPONENT: component}


def active_selector(deployment: str) -> str:
    """The scale subresource's selector: active ranks only, or standbys damp every scale-up."""
    return f"{DEPLOYMENT}={deployment},{ACTIVE}=true"


def ranks_service(deployment: str) -> str:
    """The headless Service that names the ranks' pods."""
    return f"{deployment}-ranks"


def coordinator(deployment: str) -> str:
    """The coordinator's Deployment, Service, ServiceAccount and NetworkPolicy."""
    return f"{deployment}-coordinator"


def command_map(deployment: str) -> str:
    """The ConfigMap of the engines' command line."""
    return f"{deployment}-command"


def keys_secret(deployment: str) -> str:
    """The Secret of CURVE keys and token."""
    return f"{deployment}-keys"
