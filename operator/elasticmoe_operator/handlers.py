"""kopf's side: watches keep indexes of children, and one daemon a deployment looks again and again.

Events only wake the daemon: what it does depends on what is, never on what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import kopf

from elasticmoe_operator import metrics, names
from elasticmoe_operator.clients.coordinator import Coordinators
from elasticmoe_operator.clients.kubernetes import Kubernetes
from elasticmoe_operator.core import observed
from elasticmoe_operator.core.observed import Problem
from elasticmoe_operator.reconciler import Children, Reconciler
from elasticmoe_operator.settings import Settings

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a deployment."""

LOOKS = 20
"""Looks at a time. With hundreds each would act on what it saw long ago, and httpx's pool, which
goes through all that wait in it at each step of each call, would take all the time."""

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
        self._wakes: dict[Key, asyncio.Event] = defaultdict(asyncio.Event)
        self._reconcilers: dict[Key, Reconciler] = {}

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
        kopf.daemon(*ref, id="reconcile", cancellation_polling=1.0, registry=registry)(self.daemon)

    async def startup(self, settings: kopf.OperatorSettings, **_: Any) -> None:
        """Connections, and what kopf has to be told."""
        kubernetes, coordinators = self._given
        self._kubernetes = kubernetes or Kubernetes.in_cluster()
        self._coordinators = coordinators or Coordinators()
        configure(settings)

    async def cleanup(self, **_: Any) -> None:
        """Connections end with the process."""
        await self._coordinators.close()
        await self._kubernetes.close()

    async def probe(self, **_: Any) -> int:
        """For /healthz: the loop turns."""
        return len(self._reconcilers)

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
        key = _owner(body)
        if type == "DELETED" and key in self._reconcilers:
            self._reconcilers[key].forget(body["kind"], body["metadata"]["name"])
        if key in self._reconcilers:
            self._wakes[key].set()

    async def changed(self, namespace: str | None, name: str, **_: Any) -> None:
        """The deployment itself changed: look now."""
        if (key := (namespace or "", name)) in self._reconcilers:
            self._wakes[key].set()

    # --- the loop -----------------------------------------------------------------------------

    async def daemon(
        self,
        body: kopf.Body,
        namespace: str | None,
        name: str,
        stopped: Any,
        **indexes: Any,
    ) -> None:
        """Look at one deployment until it is gone or the operator ends."""
        key = (namespace or "", name)

        pods, ranks, coordinators = (indexes[one] for one in ("pods", "ranks", "coordinators"))

        def children() -> Children:
            return Children(
                ranks=next(iter(ranks.get(key, ())), None),
                pods=tuple(pods.get(key, ())),
                coordinator_problem=next(iter(coordinators.get(key, ())), None),
            )

        reconciler = Reconciler(self._kubernetes, self._coordinators, self._settings, children)
        self._reconcilers[key] = reconciler
        wake = self._wakes[key]
        metrics.DEPLOYMENTS.inc()
        try:
            while not _ending(stopped):
                wake.clear()
                look = await self._look(reconciler, body)
                if look is None:
                    pause = self._settings.calm
                elif look.gone:
                    return
                else:
                    pause = look.pause
                await _first(wake, stopped, pause, bool(stopped))
        finally:
            metrics.DEPLOYMENTS.dec()
            del self._reconcilers[key]
            del self._wakes[key]

    async def _look(self, reconciler: Reconciler, body: kopf.Body) -> Any:
        try:
            async with self._turns:
                look = await reconciler.look(body)
        except Exception:  # a fault of ours may not end the loop: it is said, counted, tried again
            metrics.ERRORS.labels("operator").inc()
            logger.exception("%s/%s", body["metadata"]["namespace"], body["metadata"]["name"])
            return None
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
    prefix = names.GROUP
    settings.persistence.finalizer = names.FINALIZER
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=prefix)
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.networking.request_timeout = 10
    settings.networking.connect_timeout = 5
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 50  # or all pods come as one text when the operator starts
    for resource in ("pods", "statefulsets.apps", "deployments.apps"):
        settings.watching.label_selectors[resource] = names.DEPLOYMENT
    settings.posting.loggers = False
    settings.posting.reporting_component = names.FIELD_MANAGER


def _owner(body: Mapping[str, Any]) -> Key:
    metadata = body["metadata"]
    return metadata["namespace"], metadata["labels"][names.DEPLOYMENT]


def _ending(stopped: Any) -> bool:
    """Whether the loop ends: not for a deletion, of which the group's end is a part."""
    reason = stopped.reason
    deleted = kopf.DaemonStoppingReason.RESOURCE_DELETED
    return bool(stopped) and not (reason is not None and deleted in reason and not _exits(reason))


def _exits(reason: kopf.DaemonStoppingReason) -> bool:
    ends = kopf.DaemonStoppingReason.OPERATOR_EXITING | kopf.DaemonStoppingReason.OPERATOR_PAUSING
    return bool(reason & ends)


async def _first(wake: asyncio.Event, stopped: Any, pause: float, deleting: bool) -> None:
    """Until somebody wakes it, it has to stop, or the pause is over."""
    if deleting:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), min(pause, 1.0))
        return
    waits = [asyncio.ensure_future(wake.wait()), asyncio.ensure_future(stopped.wait())]
    try:
        await asyncio.wait(waits, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
