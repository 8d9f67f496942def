"""Does what the plan says: each action is one call that may be made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from elasticmoe_protocol import keys

from elasticmoe_operator import names
from elasticmoe_operator.builders import (
    accounts,
    coordinator,
    disruption,
    network,
    secret,
    services,
    statefulset,
)
from elasticmoe_operator.builders.common import Manifest, Platform
from elasticmoe_operator.clients.coordinator import Coordinators
from elasticmoe_operator.clients.kubernetes import Kubernetes
from elasticmoe_operator.core import plan as plans
from elasticmoe_operator.core.observed import Observed
from elasticmoe_operator.core.plan import Action
from elasticmoe_operator.core.spec import Spec


class Executor:
    """Of one deployment: it remembers what it applied last, to apply only what changed."""

    def __init__(
        self, kubernetes: Kubernetes, coordinators: Coordinators, platform: Platform
    ) -> None:
        self._kubernetes, self._coordinators = kubernetes, coordinators
        self._platform = platform
        self._applied: dict[tuple[str, str], bytes] = {}
        self._token = ""

    async def keep_children(self, spec: Spec, observed: Observed) -> None:
        """Secret, accounts, Services, policies, budget, coordinator. Raises ApiError."""
        if not self._token:
            await self._ensure_keys(spec)
        ranks = observed.ranks
        image = (ranks.image if ranks else "") or self._platform.image
        maximum = (ranks.max_replicas if ranks else 0) or spec.max_replicas
        revision = (ranks.revision if ranks else "") or spec.revision
        size = observed.group.size if observed.group else 0
        await self._keep(*accounts.build(spec), *services.build(spec))
        if self._platform.network_policy:
            await self._keep(*network.build(spec, self._platform))
        if observed.group is not None:
            await self._keep(disruption.build(spec, size=size))
        await self._keep(
            coordinator.build(
                spec, self._platform, image=image, max_replicas=maximum, revision=revision
            )
        )

    def forget(self, kind: str, name: str) -> None:
        """The child was changed by somebody else or is gone: apply it again."""
        self._applied.pop((kind, name), None)

    async def do(self, spec: Spec, action: Action) -> None:
        """One action. Raises ApiError, CoordinatorError, SpecError."""
        kubernetes, where = self._kubernetes, spec.namespace
        match action:
            case plans.ApplyRanks(replicas=replicas):
                image = self._platform.image
                await kubernetes.apply(
                    statefulset.build(spec, self._platform, image=image, replicas=replicas)
                )
            case plans.ScaleRanks(replicas=replicas):
                patch: Mapping[str, Any] = {"spec": {"replicas": replicas}}
                await kubernetes.merge("StatefulSet", "apps/v1", where, spec.name, patch)
            case plans.SetTarget(operation_id=operation_id, size=size):
                await self._coordinators.set_target(
                    where, spec.name, self._token, operation_id, size
                )
            case plans.LabelPod(name=name, uid=uid, active=active):
                value = "true" if active else None
                patch = {"metadata": {"uid": uid, "labels": {names.ACTIVE: value}}}
                await kubernetes.merge("Pod", "v1", where, name, patch)
            case plans.ForgetPod(name=name, uid=uid):
                await kubernetes.delete("Pod", "v1", where, name, uid=uid, grace_s=0)
            case plans.DeleteRanks():
                await kubernetes.delete("StatefulSet", "apps/v1", where, spec.name)

    async def _keep(self, *manifests: Manifest) -> None:
        for manifest in manifests:
            key = manifest["kind"], manifest["metadata"]["name"]
            text = json.dumps(manifest, sort_keys=True).encode()
            digest = hashlib.blake2b(text, digest_size=8).digest()
            if self._applied.get(key) != digest:
                await self._kubernetes.apply(manifest)
                self._applied[key] = digest

    async def _ensure_keys(self, spec: Spec) -> None:
        """Made once: a second pair would lock out all sidecars."""
        name = names.keys_secret(spec.name)
        found = await self._kubernetes.get("Secret", "v1", spec.namespace, name)
        files = secret.files(found) if found is not None else {}
        if not files:
            files = keys.make()
            await self._kubernetes.apply(secret.build(spec, files, spec.rotate_keys))
        self._token = files[keys.TOKEN_FILE].strip()
