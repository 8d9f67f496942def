"""What is: StatefulSet and pods as Kubernetes tells it, the group as its coordinator does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from elasticmoe_operator import names

Object = Mapping[str, Any]

_WAITING_PROBLEMS = frozenset(
    {
        "CrashLoopBackOff",
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "RunContainerError",
    }
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a pod can't serve. reason: a word for conditions. message: one line."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A rank's pod. Times are Unix seconds.

    revision: of the template that it was made from. command: the revision that its command's volume
    was updated for. ready: as its readiness probe says. active: it carries the label of an active
    rank. deleting: it was told to end. evicted: because its node is not reachable or tainted.
    """

    name: str
    uid: str
    ordinal: int
    revision: str = ""
    command: str = ""
    ready: bool = False
    active: bool = False
    deleting: bool = False
    evicted: bool = False
    created: float = 0.0
    problem: Problem | None = None


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The StatefulSet. revision, pod_revision, image, max_replicas: what the group runs."""

    replicas: int
    revision: str
    pod_revision: str
    image: str
    max_replicas: int
    deleting: bool = False


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A pod as the coordinator knows it. uid: of the pod that it heard last.

    command, next_command: revisions of the command that its engine runs with, and of the one that
    its next start would use.
    """

    name: str
    uid: str
    ordinal: int
    state: str = "standby"
    registered: bool = True
    active: bool = False
    ready: bool = False
    warm: bool = True
    leaving: bool = False
    safe_to_delete: bool = True
    command: str = ""
    next_command: str = ""
    next_command_problem: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class GroupOperation:
    """An operation of the coordinator, running or ended."""

    id: str
    kind: str
    from_size: int
    to_size: int
    phase: str
    state: str
    started: float
    attempt: int = 1
    reason: str = ""
    error: str = ""
    phases: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Group:
    """The group as its coordinator sees it; words as in docs/operations.md.

    tag: of this status, another one as soon as something changes; "" from one that gives none.
    """

    state: str
    reason: str
    message: str = ""
    size: int = 0
    desired: int = 0
    generation: int = 0
    experts: int = 0
    slots_per_rank: int = 0
    redundant_experts: int = 0
    elastic: bool = True
    pause_mode: str = ""
    operation: GroupOperation | None = None
    history: tuple[GroupOperation, ...] = ()
    instances: tuple[Instance, ...] = ()
    tag: str = ""

    @property
    def known(self) -> bool:
        """Whether the coordinator has learnt who is there."""
        return self.state != "Learning"

    def find(self, operation_id: str) -> GroupOperation | None:
        """An operation, running or one of the last."""
        every = (*self.history, *((self.operation,) if self.operation else ()))
        return next((one for one in reversed(every) if one.id == operation_id), None)

    def instance(self, name: str) -> Instance | None:
        """The instance of this name."""
        return next((one for one in self.instances if one.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything that one pass looks at. group: None while the coordinator doesn't answer."""

    now: float
    ranks: Ranks | None = None
    pods: tuple[Pod, ...] = ()
    group: Group | None = None
    group_error: str = ""
    coordinator_problem: Problem | None = None


# --- from the APIs' objects -------------------------------------------------------------------


def seconds(text: str | None) -> float:
    """Unix seconds of an RFC 3339 time, 0.0 for none."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else 0.0


def pod(body: Object) -> Pod:
    """A rank's pod."""
    metadata, status = body["metadata"], body.get("status") or {}
    labels = metadata.get("labels") or {}
    name = metadata["name"]
    index = labels.get("apps.kubernetes.io/pod-index", name.rpartition("-")[2])
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    disrupted = conditions.get("DisruptionTarget", {})
    return Pod(
        name=name,
        uid=metadata["uid"],
        ordinal=int(index),
        revision=labels.get(names.POD_REVISION, ""),
        command=(metadata.get("annotations") or {}).get(names.COMMAND, ""),
        ready=conditions.get("Ready", {}).get("status") == "True",
        active=labels.get(names.ACTIVE) == "true",
        deleting=bool(metadata.get("deletionTimestamp")),
        evicted=disrupted.get("reason") == "DeletionByTaintManager",
        created=seconds(metadata.get("creationTimestamp")),
        problem=pod_problem(name, status),
    )


def pod_problem(name: str, status: Object) -> Problem | None:
    """Why a pod can't come up, as far as Kubernetes says it."""
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return Problem(
                reason="Unschedulable", message=f"{name}: {condition.get('message', '')}"
            )
    statuses = [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
    for one in statuses:
        waiting = (one.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in _WAITING_PROBLEMS:
            return _container_problem(name, one, waiting)
    if status.get("phase") == "Failed":
        detail = status.get("message") or status.get("reason") or "it failed"
        return Problem(reason="PodFailed", message=f"{name}: {detail}")
    return None


def _container_problem(pod_name: str, one: Object, waiting: Object) -> Problem:
    reason = str(waiting["reason"])
    detail = waiting.get("message") or ""
    ended = (one.get("lastState") or {}).get("terminated") or {}
    if reason == "CrashLoopBackOff" and ended:
        said = (ended.get("message") or "").strip().splitlines()
        detail = f"it ended with status {ended.get('exitCode')}" + (
            f": {said[-1]}" if said else f": see `kubectl logs {pod_name} -c {one['name']}`"
        )
    word = "ImagePull" if "mage" in reason else reason
    word = "ContainerFailing" if reason == "CrashLoopBackOff" else word
    return Problem(reason=word, message=f"{pod_name}: container {one['name']}: {reason}: {detail}")


def ranks(body: Object) -> Ranks:
    """The ranks' StatefulSet."""
    annotations = body["metadata"].get("annotations") or {}
    return Ranks(
        replicas=int(body["spec"].get("replicas", 1)),
        revision=annotations.get(names.REVISION, ""),
        pod_revision=annotations.get(names.POD_REVISION, ""),
        image=annotations.get(names.IMAGE, ""),
        max_replicas=int(annotations.get(names.MAX_REPLICAS, "0")),
        deleting=bool(body["metadata"].get("deletionTimestamp")),
    )


def group(body: Object, tag: str = "") -> Group:
    """What `GET /v1/status` of the coordinator answered. tag: its ETag."""
    running = body.get("operation")
    return Group(
        state=body["state"],
        reason=body["reason"],
        message=body["message"],
        size=body["size"],
        desired=body["desired"],
        generation=body["generation"],
        experts=body["numExperts"],
        slots_per_rank=body["slotsPerRank"],
        redundant_experts=body["redundantExperts"],
        elastic=body["elastic"],
        pause_mode=body["pauseMode"],
        operation=_operation(running) if running else None,
        history=tuple(_operation(one) for one in body["history"]),
        instances=tuple(_instance(one) for one in body["instances"]),
        tag=tag,
    )


def _operation(body: Object) -> GroupOperation:
    return GroupOperation(
        id=body["id"],
        kind=body["kind"],
        from_size=body["fromSize"],
        to_size=body["toSize"],
        phase=body["phase"],
        state=body["state"],
        started=body["started"],
        attempt=body["attempt"],
        reason=body["reason"],
        error=body["error"],
        phases=tuple((one["phase"], one["seconds"]) for one in body["phases"]),
    )


def _instance(body: Object) -> Instance:
    ordinal = body["ordinal"]
    return Instance(
        name=body["instance"],
        uid=body.get("incarnation", ""),
        ordinal=-1 if ordinal is None else ordinal,
        state=body["state"],
        registered=body["registered"],
        active=body["active"],
        ready=body["ready"],
        warm=body["warm"],
        leaving=body["leaving"],
        safe_to_delete=body["safeToDelete"],
        command=body.get("command", ""),
        next_command=body.get("nextCommand", ""),
        next_command_problem=body.get("nextCommandProblem", ""),
        reason=body["reason"],
    )
