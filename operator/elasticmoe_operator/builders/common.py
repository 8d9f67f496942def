"""What all child objects have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elasticmoe_operator import names
from elasticmoe_operator.core.spec import Part, Spec

Manifest = dict[str, Any]

RESTRICTED: Mapping[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": names.USER,
    "runAsGroup": names.USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""Security context of every container of ours: what Pod Security *restricted* asks for."""

POD_FIELDS: Mapping[str, str] = {
    "POD_NAME": "metadata.name",
    "POD_UID": "metadata.uid",
    "POD_IP": "status.podIP",
    "POD_INDEX": "metadata.labels['apps.kubernetes.io/pod-index']",
}


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What the operator was installed with. image: for every container of ours."""

    image: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    namespace: str = ""
    network_policy: bool = True


def manifest(spec: Spec, api_version: str, kind: str, name: str, component: str = "") -> Manifest:
    """An object that belongs to the ElasticMoEDeployment and is collected with it."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": spec.namespace,
            "labels": names.labels(spec.name, component),
            "ownerReferences": [
                {
                    "apiVersion": names.API_VERSION,
                    "kind": names.KIND,
                    "name": spec.name,
                    "uid": spec.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
    }


def field_env(*wanted: str) -> list[Manifest]:
    """Environment that Kubernetes fills in."""
    return [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": POD_FIELDS[name]}}}
        for name in wanted
    ]


def container(name: str, part: Part, image: str, platform: Platform) -> Manifest:
    """A container of ours. image: what is used when the part names none."""
    found: Manifest = {
        "name": name,
        "image": part.image or image,
        "imagePullPolicy": platform.pull_policy,
        "securityContext": dict(RESTRICTED),
    }
    return found
