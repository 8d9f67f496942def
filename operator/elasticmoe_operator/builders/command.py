"""The ConfigMap of the engines' command line: launchers read it, so it changes without new pods."""

from __future__ import annotations

import json

from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Manifest, manifest
from elasticmoe_operator.core.spec import Spec


def build(spec: Spec) -> Manifest:
    """The command of the spec's newest revision. Raises SpecError."""
    found = manifest(spec, "v1", "ConfigMap", names.command_map(spec.name), names.RANK)
    content = {"revision": spec.revision, "command": spec.engine_words}
    found["data"] = {names.COMMAND_FILE: json.dumps(content, indent=1)}
    return found
