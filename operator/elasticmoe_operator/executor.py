"""Does what the plan says: each action is one call that may be made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elasticmoe_protocol import keys

from elasticmoe_operator import names
from elasticmoe_operator.builders import (
    accounts,
    command,
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
from elasticmoe_operator.core import actions
from elasticmoe_operator.core.observed import Observed
from elasticmoe_operator.core.spec import Spec

OVERLAP_S = 180.0
"""So long old keys are taken too: a kubelet that misses the nudge may need 90 s to bring them."""

AGAIN_S = 600.0
"""Children that nobody watches are applied again so often: somebody may have changed them."""


class Executor:
    """Of one deployment: it remembers what it applied last, to apply only what changed."""

    def __init__(
        self, kubernetes: Kubernetes, coordinators: Coordinators, platform: Platform
    ) -> None:
        self._kubernetes, self._coordinators = kubernetes, coordinators
        self._platform = platform
        self._applied: dict[tuple[str, str], bytes] = {}
        self._all_applied_at = 0.0
        self._image = platform.image
        self._keys: _Keys | None = None

    async def keep_children(self, spec: Spec, observed: Observed) -> None:
        """Secret, accounts, Services, policies, budget, coordinator. Raises ApiError."""
        if observed.now - self._all_applied_at > AGAIN_S:
            self._applied.clear()
            self._all_applied_at = observed.now
        await self._keep_keys(spec, observed.now)
        ranks = observed.ranks
        image = self._image = (ranks.image if ranks else "") or self._platform.image
        maximum = (ranks.max_replicas if ranks else 0) or spec.max_replicas
        pods = (ranks.pod_revision if ranks else "") or spec.pod_revision
        size = observed.group.size if observed.group else 0
        await self._keep(*accounts.build(spec), *services.build(spec))
        if self._platform.network_policy:
            await self._keep(*network.build(spec, self._platform))
        if size:
            await self._keep(disruption.build(spec, size=size))
        if ranks is not None and ranks.revision == spec.revision:
            await self._keep(command.build(spec))
        await self._keep(
            coordinator.build(
                spec, self._platform, image=image, max_replicas=maximum, pod_revision=pods
            )
        )

    def forget(self, kind: str, name: str) -> None:
        """The child was changed by somebody else or is gone: apply it again."""
        self._applied.pop((kind, name), None)

    async def do(self, spec: Spec, action: actions.Action) -> None:
        """One action. Raises ApiError, CoordinatorError, SpecError."""
        kubernetes, where = self._kubernetes, spec.namespace
        patch: Mapping[str, Any]
        match action:
            case actions.ApplyRanks(replicas=replicas, same_pods=same_pods):
                image = self._image if same_pods else self._platform.image
                await kubernetes.apply(command.build(spec))
                await kubernetes.apply(
                    statefulset.build(spec, self._platform, image=image, replicas=replicas)
                )
            case actions.ApplyCommand():
                await self._keep(command.build(spec))
            case actions.NudgePod(name=name, uid=uid, command=revision):
                patch = {"metadata": {"uid": uid, "annotations": {names.COMMAND: revision}}}
                await kubernetes.merge("Pod", "v1", where, name, patch)
            case actions.RestartGroup(operation_id=operation_id):
                await self._coordinators.restart(where, spec.name, self._token, operation_id)
            case actions.ScaleRanks(replicas=replicas):
                patch = {"spec": {"replicas": replicas}}
                await kubernetes.merge("StatefulSet", "apps/v1", where, spec.name, patch)
            case actions.SetTarget(operation_id=operation_id, size=size):
                await self._coordinators.set_target(
                    where, spec.name, self._token, operation_id, size
                )
            case actions.LabelPod(name=name, uid=uid, active=active):
                value = "true" if active else None
                patch = {"metadata": {"uid": uid, "labels": {names.ACTIVE: value}}}
                await kubernetes.merge("Pod", "v1", where, name, patch)
            case actions.ForgetPod(name=name, uid=uid):
                await kubernetes.delete("Pod", "v1", where, name, uid=uid, grace_s=0)
            case actions.DeleteRanks():
                await kubernetes.delete("StatefulSet", "apps/v1", where, spec.name)

    async def _keep(self, *manifests: Manifest) -> None:
        for manifest in manifests:
            key = manifest["kind"], manifest["metadata"]["name"]
            text = json.dumps(manifest, sort_keys=True).encode()
            digest = hashlib.blake2b(text, digest_size=8).digest()
            if self._applied.get(key) != digest:
                await self._kubernetes.apply(manifest)
                self._applied[key] = digest

    async def _keep_keys(self, spec: Spec, now: float) -> None:
        """Made once: a second pair would lock out all sidecars. Rotated when that is asked for."""
        if self._keys is None:
            name = names.keys_secret(spec.name)
            found = await self._kubernetes.get("Secret", "v1", spec.namespace, name)
            self._keys = _Keys.read(found) if found else None
        known = self._keys
        if known is None:
            fresh = _Keys(files=keys.make(), word=spec.rotate_keys)
        elif known.word != spec.rotate_keys:
            fresh = _Keys(files=keys.rotated(known.files), word=spec.rotate_keys, rotated_at=now)
        elif known.rotated_at and now - known.rotated_at > OVERLAP_S:
            fresh = _Keys(files=keys.finished(known.files), word=known.word)
        else:
            return
        await self._kubernetes.apply(
            secret.build(spec, fresh.files, rotated=fresh.word, rotated_at=fresh.rotated_at)
        )
        self._keys = fresh
        if fresh.rotated_at:
            await self._nudge(spec, fresh.word)

    async def _nudge(self, spec: Spec, rotation: str) -> None:
        """Kubelets bring the new keys now: until then a coordinator refuses the new token."""
        selector = f"{names.DEPLOYMENT}={spec.name}"
        for name, uid in await self._kubernetes.pods(spec.namespace, selector):
            patch = {"metadata": {"uid": uid, "annotations": {names.KEYS: rotation}}}
            await self._kubernetes.merge("Pod", "v1", spec.namespace, name, patch)

    @property
    def _token(self) -> str:
        return self._keys.files[keys.TOKEN_FILE].strip() if self._keys else ""


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """files: of the Secret. word: of the rotation that they are of. rotated_at: since when old and
    new keys are taken (Unix seconds), 0 when only the new ones are."""

    files: Mapping[str, str]
    word: str
    rotated_at: float = 0.0

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> _Keys | None:
        files = secret.files(found)
        said = found["metadata"].get("annotations") or {}
        if not files:
            return None
        return cls(
            files=files,
            word=said.get(names.ROTATE, ""),
            rotated_at=float(said.get(names.ROTATED_AT) or 0),
        )
