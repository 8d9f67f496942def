"""kopf's side: watches keep indexes of children; a loop for each deployment looks again and again.

Events only wake the loop: what it does depends on what is, never on what happened. It is no daemon
of kopf's, which would not be started for an object that was deleted while no operator ran.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kopf

from elasticmoe_operator import metrics, names
from elasticmoe_operator.clients.coordinator import Coordinators
from elasticmoe_operator.clients.kubernetes import Kubernetes
from elasticmoe_operator.core import observed
from elasticmoe_operator.core.observed import Problem
from elasticmoe_operator.reconciler import Children, Look, Reconciler
from elasticmoe_operator.settings import Settings

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a deployment."""

LOOKS = 20
"""Looks at a time. With hundreds at once each would act on what it saw long ago."""


@dataclass
class _Loop:
    """Of one deployment. body: as it was seen last."""

    body: kopf.Body
    reconciler: Reconciler
    wake: asyncio.Event
    task: asyncio.Task[None] = field(init=False)


_OURS = {names.DEPLOYMENT: kopf.PRESENT}


class Operator:
    """Handlers of one operator's process, registered with `register`."""

    def __init__(
        self,
        settings: Settings,
        kubernetes: Kubernetes | None = None,
        coordinators: Coordinators | None = None,
    ) -> None:
        self._settings = settings
        self._given = kubernetes, coordinators
        self._turns = asyncio.Semaphore(LOOKS)
        self._loops: dict[Key, _Loop] = {}

    def register(self, registry: kopf.OperatorRegistry) -> None:
        """Add all handlers."""
        ours: Any = {"labels": _OURS, "registry": registry}
        kopf.on.startup(registry=registry)(self.startup)
        kopf.on.cleanup(registry=registry)(self.cleanup)
        kopf.on.probe(id="deployments", registry=registry)(self.probe)
        kopf.index("v1", "pods", id="pods", **ours)(self.index_pod)
        kopf.index("apps", "v1", "statefulsets", id="ranks", **ours)(self.index_ranks)
        kopf.index("apps", "v1", "deployments", id="coordinators", **ours)(self.index_coordinator)
        for resource in (
            ("v1", "pods"),
            ("apps", "v1", "statefulsets"),
            ("apps", "v1", "deployments"),
        ):
            kopf.on.event(*resource, id="wake", **ours)(self.wake)
        ref = (names.GROUP, names.VERSION, names.PLURAL)
        kopf.on.event(*ref, id="changed", registry=registry)(self.changed)

    async def startup(self, settings: kopf.OperatorSettings, **_: Any) -> None:
        """Connections, and what kopf has to be told."""
        kubernetes, coordinators = self._given
        self._kubernetes = kubernetes or Kubernetes.in_cluster()
        self._coordinators = coordinators or Coordinators()
        configure(settings)

    async def cleanup(self, **_: Any) -> None:
        """Loops and connections end with the process."""
        tasks = [loop.task for loop in self._loops.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._coordinators.close()
        await self._kubernetes.close()

    async def probe(self, **_: Any) -> int:
        """For /healthz: the loop turns."""
        return len(self._loops)

    # --- children -----------------------------------------------------------------------------

    async def index_pod(self, body: kopf.Body, **_: Any) -> Mapping[Key, object]:
        """A rank's pod under its deployment."""
        labels = body["metadata"]["labels"]
        if labels.get(names.COMPONENT) != names.RANK:
            return {}
        return {_owner(body): observed.pod(body)}

    async def index_ranks(self, body: kopf.Body, **_: Any) -> Mapping[Key, object]:
        """The StatefulSet under its deployment."""
        return {_owner(body): observed.ranks(body)}

    async def index_coordinator(self, body: kopf.Body, **_: Any) -> Mapping[Key, object]:
        """What is wrong with the coordinator's Deployment, under its deployment."""
        for one in body.get("status", {}).get("conditions") or []:
            if one["type"] == "ReplicaFailure" and one["status"] == "True":
                return {_owner(body): Problem(reason=one["reason"], message=one["message"])}
        return {}

    async def wake(self, body: kopf.Body, type: str | None, **_: Any) -> None:
        """A child changed: look now. What is gone is made again."""
        loop = self._loops.get(_owner(body))
        if loop is None:
            return
        if type == "DELETED":
            loop.reconciler.forget(body["kind"], body["metadata"]["name"])
        loop.wake.set()

    # --- the loop -----------------------------------------------------------------------------

    async def changed(self, body: kopf.Body, type: str | None, **indexes: Any) -> None:
        """A deployment came, changed or went: a loop looks after each, which looks now."""
        key = body["metadata"]["namespace"], body["metadata"]["name"]
        loop = self._loops.get(key)
        if type == "DELETED":
            if loop is not None:
                loop.task.cancel()
            return
        if loop is None:
            found = _children(key, *(indexes[one] for one in ("pods", "ranks", "coordinators")))
            reconciler = Reconciler(self._kubernetes, self._coordinators, self._settings, found)
            loop = self._loops[key] = _Loop(body, reconciler, asyncio.Event())
            loop.task = asyncio.create_task(self._run(key, loop))
        loop.body = body
        loop.wake.set()

    async def _run(self, key: Key, loop: _Loop) -> None:
        """Look at one deployment until it is gone or the operator ends."""
        metrics.DEPLOYMENTS.inc()
        try:
            while True:
                loop.wake.clear()
                look = await self._look(loop.reconciler, loop.body)
                if look.gone:
                    return
                await self._pause(key, loop, look)
        finally:
            metrics.DEPLOYMENTS.dec()
            del self._loops[key]

    async def _pause(self, key: Key, loop: _Loop, look: Look) -> None:
        """Until something changed in the cluster or with the coordinator, or time is over."""
        wake = asyncio.create_task(loop.wake.wait())
        waits: set[asyncio.Task[Any]] = {wake}
        if look.tag:
            told = self._coordinators.changed(*key, look.tag, look.pause)
            waits.add(asyncio.create_task(told))
        try:
            await asyncio.wait(waits, timeout=look.pause, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
            # A coordinator that went away is found by the look that follows.
            await asyncio.gather(*waits, return_exceptions=True)

    async def _look(self, reconciler: Reconciler, body: kopf.Body) -> Look:
        try:
            async with self._turns:
                look = await reconciler.look(body)
        except Exception:  # a fault of ours may not end the loop: it is said, counted, tried again
            metrics.ERRORS.labels("operator").inc()
            logger.exception("%s/%s", body["metadata"]["namespace"], body["metadata"]["name"])
            return Look(pause=self._settings.calm)
        if body["metadata"].get("deletionTimestamp"):
            return look  # a namespace that goes with it takes no events any more
        for event in look.events:
            kind = "Warning" if event.warning else "Normal"
            kopf.event(body, type=kind, reason=event.reason, message=event.message[:1000])
        return look


class _NoDiffs(kopf.DiffBaseStorage):
    """Nobody here asks what changed, for which kopf would copy every object at every event."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


def configure(settings: kopf.OperatorSettings) -> None:
    """What kopf does by default and we don't want."""
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.networking.request_timeout = 10
    settings.networking.connect_timeout = 5
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 50  # or all pods come as one text when the operator starts
    settings.queueing.idle_timeout = 0.5  # each object's worker keeps its last event until then
    for resource in ("pods", "statefulsets.apps", "deployments.apps"):
        settings.watching.label_selectors[resource] = names.DEPLOYMENT
    settings.posting.loggers = False
    settings.posting.reporting_component = names.FIELD_MANAGER


def _owner(body: Mapping[str, Any]) -> Key:
    metadata = body["metadata"]
    return metadata["namespace"], metadata["labels"][names.DEPLOYMENT]


def _children(
    key: Key,
    pods: kopf.Index[Key, Any],
    ranks: kopf.Index[Key, Any],
    coordinators: kopf.Index[Key, Any],
) -> Callable[[], Children]:
    """What the watches know of one deployment's children, asked again at each look."""

    def children() -> Children:
        return Children(
            ranks=next(iter(ranks.get(key, ())), None),
            pods=tuple(pods.get(key, ())),
            coordinator_problem=next(iter(coordinators.get(key, ())), None),
        )

    return children
