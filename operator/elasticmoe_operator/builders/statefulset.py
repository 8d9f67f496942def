"""The ranks' StatefulSet: an ordinal for each pod, and pods are replaced only when we say so."""

from __future__ import annotations

from elasticmoe_operator import names
from elasticmoe_operator.builders import rank
from elasticmoe_operator.builders.common import Manifest, Platform, manifest
from elasticmoe_operator.core.spec import Spec


def build(spec: Spec, platform: Platform, *, image: str, replicas: int) -> Manifest:
    """The StatefulSet of the spec's newest revision. Raises SpecError.

    Its annotations say what the group runs. It is applied whole at the first start and at a
    planned restart only; a resize changes `replicas` and nothing else.
    """
    found = manifest(spec, "apps/v1", "StatefulSet", spec.name, names.RANK)
    found["metadata"]["annotations"] = {
        names.REVISION: spec.revision,
        names.POD_REVISION: spec.pod_revision,
        names.IMAGE: image,
        names.MAX_REPLICAS: str(spec.max_replicas),
    }
    found["spec"] = {
        "replicas": replicas,
        "serviceName": names.ranks_service(spec.name),
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": "OnDelete"},
        "revisionHistoryLimit": 2,
        "selector": {"matchLabels": names.selector(spec.name, names.RANK)},
        "template": rank.build(spec, platform, image=image),
    }
    return found
