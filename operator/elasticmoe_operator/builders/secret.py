"""The Secret of a group's CURVE keys and token, made once, and rotated when that is asked for."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Manifest, manifest
from elasticmoe_operator.core.spec import Spec


def build(
    spec: Spec, files: Mapping[str, str], *, rotated: str = "", rotated_at: float = 0.0
) -> Manifest:
    """files: file name to content. rotated: the spec's word of the rotation that they are of.

    rotated_at: since when old and new ones are taken (Unix seconds), 0 when that is over.
    """
    found = manifest(spec, "v1", "Secret", names.keys_secret(spec.name), names.COORDINATOR)
    found["metadata"]["annotations"] = {
        names.ROTATE: rotated,
        names.ROTATED_AT: str(rotated_at) if rotated_at else "",
    }
    found["type"] = "Opaque"
    found["data"] = {
        name: base64.b64encode(content.encode()).decode() for name, content in files.items()
    }
    return found


def files(secret: Mapping[str, object]) -> dict[str, str]:
    """What a Secret holds, file name to content."""
    data = secret.get("data")
    given = data if isinstance(data, Mapping) else {}
    return {str(name): base64.b64decode(str(value)).decode() for name, value in given.items()}
