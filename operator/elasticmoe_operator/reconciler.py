"""One look at one deployment, again and again: read, plan, write the status, act."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elasticmoe_operator import metrics, names
from elasticmoe_operator.builders.rank import grace_s
from elasticmoe_operator.clients.coordinator import CoordinatorError, Coordinators
from elasticmoe_operator.clients.kubernetes import ApiError, Kubernetes
from elasticmoe_operator.core import actions, conditions, status
from elasticmoe_operator.core import plan as plans
from elasticmoe_operator.core.observed import Group, Observed, Pod, Problem, Ranks
from elasticmoe_operator.core.spec import Spec, SpecError, read
from elasticmoe_operator.executor import Executor
from elasticmoe_operator.settings import Settings

logger = logging.getLogger(__name__)

SPARE_S = 60.0
"""Beyond the pods' grace, until a deletion no longer waits for them."""


@dataclass(frozen=True, kw_only=True)
class Children:
    """What the watches know of one deployment's children."""

    ranks: Ranks | None = None
    pods: tuple[Pod, ...] = ()
    coordinator_problem: Problem | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something to tell the user. warning: or normal."""

    reason: str
    message: str
    warning: bool = False


@dataclass(kw_only=True)
class Look:
    """What one look came to. pause: seconds until the next one. gone: nothing is left to do.

    tag: of the coordinator's status that was looked at, "" for none.
    """

    pause: float
    gone: bool = False
    tag: str = ""
    events: list[Event] = field(default_factory=list)


class Reconciler:
    """Of one deployment. children: what is known now. Remembers the status that it wrote last."""

    def __init__(
        self,
        kubernetes: Kubernetes,
        coordinators: Coordinators,
        settings: Settings,
        children: Callable[[], Children],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._kubernetes, self._coordinators = kubernetes, coordinators
        self._executor = Executor(kubernetes, coordinators, settings.platform)
        self._settings, self._children, self._clock = settings, children, clock
        self._status: dict[str, Any] | None = None
        self._deleted_at = 0.0
        self._held = False
        self._failures = 0
        self._events: list[Event] = []

    def forget(self, kind: str, name: str) -> None:
        """A child was changed by somebody else or is gone."""
        self._executor.forget(kind, name)

    async def look(self, body: Mapping[str, Any]) -> Look:
        """Look once; what fails is said and tried again with growing pauses."""
        metadata = body["metadata"]
        if self._status is None:
            self._status = dict(body.get("status") or {})
        started = time.perf_counter()
        self._events = []
        try:
            found = await self._look_while_ours(body)
            self._failures = 0
        except (ApiError, CoordinatorError) as error:
            self._failures += 1
            at = "kubernetes" if isinstance(error, ApiError) else "coordinator"
            metrics.ERRORS.labels(at).inc()
            about = f"{metadata['namespace']}/{metadata['name']}"
            logger.warning("%s: %s", about, error)
            pause = min(self._settings.calm, self._settings.busy * 2.0 ** min(self._failures, 8))
            # What the status says by now is told also when an action failed after it.
            found = Look(pause=pause, events=self._events)
        finally:
            metrics.RECONCILE.observe(time.perf_counter() - started)
        return found

    async def _look_while_ours(self, body: Mapping[str, Any]) -> Look:
        """The finalizer is there before any child, and goes when there is nothing left to drain."""
        metadata = body["metadata"]
        finalizers = list(metadata.get("finalizers") or [])
        deleting = bool(metadata.get("deletionTimestamp"))
        if deleting and names.FINALIZER not in finalizers:
            return Look(pause=self._settings.calm, gone=True)
        if not deleting and not self._held:
            if names.FINALIZER not in finalizers:
                await self._hold(metadata, [*finalizers, names.FINALIZER])
            self._held = True
        try:
            found = await self._look(read(body))
        except SpecError as error:
            found = await self._invalid(metadata, str(error))
        if found.gone:
            now = await self._kubernetes.get(
                names.KIND, names.API_VERSION, metadata["namespace"], metadata["name"]
            )
            if now is not None and now["metadata"]["uid"] == metadata["uid"]:
                kept = now["metadata"].get("finalizers") or []
                await self._hold(now["metadata"], [one for one in kept if one != names.FINALIZER])
        return found

    async def _hold(self, metadata: Mapping[str, Any], finalizers: list[str]) -> None:
        """Set the finalizers of the object as it was seen; refused when it has changed since."""
        patch = {"finalizers": finalizers, "resourceVersion": metadata["resourceVersion"]}
        await self._kubernetes.merge(
            *(names.KIND, names.API_VERSION, metadata["namespace"], metadata["name"]),
            {"metadata": patch},
        )

    async def _look(self, spec: Spec) -> Look:
        if not self._written.get("selector"):
            await self._write(spec.namespace, spec.name, status.initial(spec))
        observed = await self._observe(spec)
        if not spec.deleting:
            await self._executor.keep_children(spec, observed)
        operation = status.read_operation(self._written)
        history = status.read_history(self._written)
        plan = plans.plan(spec, observed, operation, history)
        fresh = status.build(spec, observed, plan, self._written)
        events = self._changes(self._written, fresh, plan, operation)
        made = any(isinstance(one, actions.ApplyRanks) for one in plan.actions)
        if made and spec.replaced_probes:
            events.append(Event(reason="ProbesReplaced", message=_probes_line(spec)))
        await self._write(spec.namespace, spec.name, fresh)
        self._events = events
        for action in plan.actions:
            logger.info("%s/%s: %s", spec.namespace, spec.name, action)
            await self._executor.do(spec, action)
        return Look(
            pause=self._pause(observed, plan),
            gone=self._gone(spec, observed),
            tag=observed.group.tag if observed.group is not None else "",
            events=events,
        )

    async def _observe(self, spec: Spec) -> Observed:
        group: Group | None = None
        error = ""
        children = self._children()
        if children.ranks is not None or children.pods:
            try:
                group = await self._coordinators.status(spec.namespace, spec.name)
            except CoordinatorError as problem:
                error = str(problem)
        # Read again: pods may have changed while the coordinator was asked.
        children = self._children()
        return Observed(
            now=self._clock(),
            ranks=children.ranks,
            pods=tuple(sorted(children.pods, key=lambda one: one.ordinal)),
            group=group,
            group_error=error,
            coordinator_problem=children.coordinator_problem,
        )

    async def _invalid(self, metadata: Mapping[str, Any], message: str) -> Look:
        fresh = status.invalid(
            int(metadata.get("generation", 0)), message, self._clock(), self._written
        )
        known = self._written.get("message") == message
        await self._write(metadata["namespace"], metadata["name"], fresh)
        said = Event(reason=conditions.INVALID_SPEC, message=message, warning=True)
        # Nothing can be drained in order for a spec that can't be read: its children are collected.
        return Look(
            pause=self._settings.calm,
            gone=bool(metadata.get("deletionTimestamp")),
            events=[] if known else [said],
        )

    @property
    def _written(self) -> dict[str, Any]:
        return self._status or {}

    async def _write(self, namespace: str, name: str, fresh: Mapping[str, Any]) -> None:
        patch = status.difference(self._written, fresh)
        if not patch:
            return
        await self._kubernetes.merge(
            names.KIND, names.API_VERSION, namespace, name, {"status": patch}, "status"
        )
        self._status = {**self._written, **fresh}

    def _pause(self, observed: Observed, plan: plans.Plan) -> float:
        group = observed.group
        calm = (
            plan.operation is None
            and not plan.ended
            and not plan.actions
            and group is not None
            and {one.name for one in observed.pods}
            <= {one.name for one in group.instances if one.registered}
            and group.state == "Serving"
            and group.operation is None
        )
        return self._settings.calm if calm else self._settings.busy

    def _gone(self, spec: Spec, observed: Observed) -> bool:
        """Whether a deleted deployment has nothing left to wait for."""
        if not spec.deleting:
            return False
        self._deleted_at = self._deleted_at or self._clock()
        late = self._clock() - self._deleted_at > grace_s(spec) + SPARE_S
        return late or (observed.ranks is None and not observed.pods)

    @staticmethod
    def _changes(
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        plan: plans.Plan,
        running: object,
    ) -> list[Event]:
        """What changed: an operation began or ended, a condition turned or has another reason."""
        found = []
        for ended in plan.ended:
            operation = ended.operation
            metrics.OPERATIONS.labels(operation.kind, ended.result).inc()
            for phase, spent in operation.phases:
                metrics.PHASES.labels(operation.kind, phase).observe(spent)
            found.append(
                Event(
                    reason=f"{operation.kind}{ended.result}",
                    message=conditions.result_words(ended),
                    warning=ended.result in ("Failed", "Withdrawn"),
                )
            )
        if plan.operation is not None and (running is None or plan.ended):
            found.append(
                Event(
                    reason=f"{plan.operation.kind}Began", message=conditions.words(plan.operation)
                )
            )
        old = {one["type"]: one for one in before.get("conditions") or []}
        for one in after.get("conditions") or []:
            last = old.get(one["type"], {})
            changed = (one["status"], one["reason"]) != (last.get("status"), last.get("reason"))
            # What progresses is told by the operations themselves.
            if changed and one["type"] != "Progressing" and last:
                warning = one["status"] == ("False" if one["type"] == "Available" else "True")
                found.append(
                    Event(
                        reason=one["reason"],
                        message=f"{one['type']} is {one['status']}: {one['message']}",
                        warning=warning,
                    )
                )
            elif changed and one["reason"] == conditions.SIZE_LIMITED:
                found.append(
                    Event(reason=conditions.SIZE_LIMITED, message=one["message"], warning=True)
                )
        return found


def _probes_line(spec: Spec) -> str:
    which = ", ".join(spec.replaced_probes)
    return f"{which} of the container engine: the launcher's own are used, which know the group"
