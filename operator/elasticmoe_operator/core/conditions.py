"""Conditions of an ElasticMoEDeployment. docs/operations.md says what to do about each reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from elasticmoe_operator.core.observed import Observed
from elasticmoe_operator.core.operation import Ended, Operation, time_text
from elasticmoe_operator.core.plan import Plan
from elasticmoe_operator.core.spec import Spec

Type = Literal["Available", "Progressing", "Degraded"]

# Available
MINIMUM_RANKS_READY: Final = "MinimumRanksReady"
NOT_STARTED: Final = "NotStarted"
TOO_FEW_READY: Final = "TooFewReady"
DELETING: Final = "Deleting"
# Progressing
SCALING_UP: Final = "ScalingUp"
SCALING_DOWN: Final = "ScalingDown"
STARTING: Final = "Starting"
RESTARTING: Final = "Restarting"
RECOVERING: Final = "Recovering"
AS_DESIRED: Final = "AsDesired"
SIZE_LIMITED: Final = "SizeLimited"
PAUSED: Final = "Paused"
BLOCKED: Final = "Blocked"
# Degraded, beside the coordinator's own reasons and those of pods
HEALTHY: Final = "Healthy"
INVALID_SPEC: Final = "InvalidSpec"
JOINERS_NOT_READY: Final = "JoinersNotReady"
COORDINATOR_UNAVAILABLE: Final = "CoordinatorUnavailable"

_KINDS: Final = {
    "Start": STARTING,
    "ScaleUp": SCALING_UP,
    "ScaleDown": SCALING_DOWN,
    "Restart": RESTARTING,
}
OWN_KINDS: Final = frozenset(_KINDS)
_GROUP_KINDS: Final = {
    "start": STARTING,
    "scale_up": SCALING_UP,
    "scale_down": SCALING_DOWN,
    "restart": RESTARTING,
    "recover": RECOVERING,
}
_HEALTHY_REASONS: Final = frozenset(
    {"AsDesired", "Learning", "NoTarget", "Restart", "ScaleDown", "ScaleUp", "Start"}
)
"""Reasons of the coordinator that are no fault."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition, without its times."""

    type: Type
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""


def conditions(spec: Spec, observed: Observed, plan: Plan) -> tuple[Condition, ...]:
    """All three, always."""
    return (
        _available(spec, observed),
        _progressing(spec, observed, plan),
        _degraded(spec, observed, plan),
    )


def invalid(message: str) -> tuple[Condition, ...]:
    """Of a spec that nothing can be built from: what runs is left alone."""
    return (
        Condition(type="Available", status="Unknown", reason=INVALID_SPEC, message=message),
        Condition(type="Progressing", status="False", reason=INVALID_SPEC, message=message),
        Condition(type="Degraded", status="True", reason=INVALID_SPEC, message=message),
    )


def ready_ranks(observed: Observed) -> int:
    """Pods that serve."""
    return sum(1 for one in observed.pods if one.ready)


def _available(spec: Spec, observed: Observed) -> Condition:
    ready = ready_ranks(observed)
    line = f"{ready} ranks are ready, {spec.min_replicas} are the least"
    if ready >= spec.min_replicas:
        return Condition(type="Available", status="True", reason=MINIMUM_RANKS_READY, message=line)
    if spec.deleting:
        return Condition(type="Available", status="False", reason=DELETING, message=line)
    started = observed.group is not None and observed.group.generation > 0
    reason = TOO_FEW_READY if started else NOT_STARTED
    return Condition(type="Available", status="False", reason=reason, message=line)


def _progressing(spec: Spec, observed: Observed, plan: Plan) -> Condition:
    def said(status: Literal["True", "False"], reason: str, message: str = "") -> Condition:
        return Condition(type="Progressing", status=status, reason=reason, message=message)

    if spec.deleting:
        return said("True", DELETING, "the ranks finish their requests and leave")
    if plan.operation is not None:
        return said("True", _KINDS[plan.operation.kind], words(plan.operation))
    running = observed.group.operation if observed.group else None
    if running is not None:
        text = running.reason or running.error
        line = f"{running.from_size} -> {running.to_size}" + (f": {text}" if text else "")
        return said("True", _GROUP_KINDS[running.kind], line)
    if spec.paused:
        return said("False", PAUSED, "spec.paused is true: size and revision stay as they are")
    if plan.held:
        return said("False", BLOCKED, plan.held)
    if spec.size_limited:
        return said("False", SIZE_LIMITED, spec.size_limited)
    if observed.group is not None and observed.group.size != spec.size:
        return said("False", BLOCKED, observed.group.message)
    return said("False", AS_DESIRED)


def words(operation: Operation) -> str:
    """An operation in a line."""
    what = {
        "Start": f"starting {operation.to_size} ranks",
        "ScaleUp": f"{operation.from_size} -> {operation.to_size}",
        "ScaleDown": f"{operation.from_size} -> {operation.to_size}",
        "Restart": "a new template: in place"
        if operation.phase in ("Update", "Restart")
        else "a new template: new pods",
    }[operation.kind]
    attempt = f", attempt {operation.attempt}" if operation.attempt > 1 else ""
    detail = f": {operation.message}" if operation.message else ""
    return f"{what} ({operation.phase}{attempt}){detail}"


def _degraded(spec: Spec, observed: Observed, plan: Plan) -> Condition:
    def said(reason: str, message: str) -> Condition:
        return Condition(type="Degraded", status="True", reason=reason, message=message)

    if spec.deleting:
        return Condition(type="Degraded", status="False", reason=DELETING)
    problems = [one.problem for one in observed.pods if one.problem and not one.deleting]
    group = observed.group
    if plan.held:
        reason = problems[0].reason if problems else JOINERS_NOT_READY
        failed = group is not None and group.reason == "ResizeFailed"
        return said("ResizeFailed" if failed else reason, plan.held)
    if problems:
        return said(problems[0].reason, "; ".join(one.message for one in problems[:3]))
    if observed.coordinator_problem is not None:
        return said(COORDINATOR_UNAVAILABLE, observed.coordinator_problem.message)
    if group is None and observed.ranks is not None and plan.operation is None:
        return said(COORDINATOR_UNAVAILABLE, observed.group_error)
    if group is not None and group.reason not in _HEALTHY_REASONS:
        return said(group.reason, group.message)
    return Condition(type="Degraded", status="False", reason=HEALTHY)


def merge(
    before: Sequence[Mapping[str, Any]],
    now: float,
    generation: int,
    wanted: Sequence[Condition],
) -> list[dict[str, Any]]:
    """As `status.conditions`; the transition time stays while the status is the same."""
    old = {one["type"]: one for one in before}
    found = []
    for one in wanted:
        last = old.get(one.type)
        kept = last is not None and last["status"] == one.status
        found.append(
            {
                "type": one.type,
                "status": one.status,
                "reason": one.reason,
                "message": one.message,
                "observedGeneration": generation,
                "lastTransitionTime": last["lastTransitionTime"]
                if kept and last is not None
                else time_text(now),
            }
        )
    return found


def result_words(ended: Ended) -> str:
    """How an operation ended, in a line for an event."""
    operation = ended.operation
    spent = ended.at - operation.started
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in operation.phases)
    detail = f": {ended.message}" if ended.message else ""
    return (
        f"{operation.kind} {operation.from_size} -> {operation.to_size} "
        f"{ended.result.lower()} after {spent:.1f} s ({phases}){detail}"
    )
