"""The APIs that an operator calls: they keep what they are told."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Mapping
from typing import Any

from elasticmoe_operator.clients.coordinator import CoordinatorError
from elasticmoe_operator.clients.kubernetes import ApiError
from elasticmoe_operator.core.observed import Group
from elasticmoe_operator.reconciler import Children

from support.operator_world import DELETED, NOW, body, group, look, merged


class Cluster:
    """Both APIs, and the order in which they were called."""

    def __init__(self, size: int = 3) -> None:
        seen = look(size)
        self.calls: list[tuple[str, str, Any]] = []
        self.secret: Mapping[str, Any] | None = None
        self.status: dict[str, Any] = {}
        self.group: Group | None = group(size)
        self.children = Children(ranks=seen.ranks, pods=seen.pods)
        self.refuses: set[str] = set()
        self.now = NOW

    def _call(self, verb: str, what: str, content: Any = None) -> None:
        self.calls.append((verb, what, copy.deepcopy(content)))
        for word in self.refuses:
            if word in (verb, what):
                raise ApiError(f"{what} is refused", 500)

    @property
    def verbs(self) -> list[str]:
        return [f"{verb} {what}" for verb, what, _ in self.calls]

    async def get(self, kind: str, *_: str) -> Mapping[str, Any] | None:
        self._call("get", kind)
        return body(meta=DELETED) if kind == "ElasticMoEDeployment" else self.secret

    async def apply(self, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
        self._call("apply", manifest["kind"], manifest)
        if manifest["kind"] == "Secret":
            self.secret = manifest
        return manifest

    async def merge(
        self, kind: str, _: str, namespace: str, name: str, patch: Any, subresource: str = ""
    ) -> Mapping[str, Any] | None:
        self._call("merge", subresource or kind, patch)
        if subresource == "status":
            self.status = merged(self.status, json.loads(json.dumps(patch["status"])))
        return {}

    async def delete(self, kind: str, *_: str, **__: Any) -> None:
        self._call("delete", kind)

    async def close(self) -> None:
        pass

    # --- the coordinator

    async def set_target(self, *given: Any) -> None:
        self.calls.append(("put", "target", given[-2:]))
        if "target" in self.refuses:
            raise CoordinatorError("another operation runs")

    async def restart(self, *given: Any) -> None:
        self.calls.append(("post", "restart", given[-1]))

    def told(self, verb: str, what: str) -> list[Any]:
        return [one[2] for one in self.calls if one[:2] == (verb, what)]


class Coordinator:
    """The same, where both have a method of one name."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.set_target, self.restart = cluster.set_target, cluster.restart
        self.change = asyncio.Event()
        """The group is another one; or, with a group that is None, nobody answers."""

    async def status(self, *_: str) -> Group:
        self._cluster.calls.append(("get", "group", None))
        if self._cluster.group is None:
            raise CoordinatorError("it does not answer")
        return self._cluster.group

    async def changed(self, _: str, __: str, tag: str, limit_s: float) -> None:
        self._cluster.calls.append(("wait", "group", (tag, limit_s)))
        await self.change.wait()
        if self._cluster.group is None:
            raise CoordinatorError("it does not answer")

    async def close(self) -> None:
        pass
