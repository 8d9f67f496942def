"""`status` of an ElasticMoEDeployment, built whole each time and written only when it changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elasticmoe_operator import names
from elasticmoe_operator.core import conditions as conds
from elasticmoe_operator.core import operation as ops
from elasticmoe_operator.core.conditions import Condition
from elasticmoe_operator.core.observed import Observed
from elasticmoe_operator.core.plan import Plan
from elasticmoe_operator.core.spec import Spec

Status = dict[str, Any]


def initial(spec: Spec) -> Status:
    """What can be said at once: the scale subresource works from the first second on."""
    return {
        "replicas": 0,
        "selector": names.active_selector(spec.name),
        "desiredReplicas": spec.size,
    }


def build(spec: Spec, observed: Observed, plan: Plan, before: Mapping[str, Any]) -> Status:
    """The new status. before: what was written last."""
    group = observed.group
    wanted = conds.conditions(spec, observed, plan)
    found: Status = {
        **_widths(spec, observed, before),
        "observedGeneration": spec.generation,
        "selector": names.active_selector(spec.name),
        "conditions": conds.merge(
            before.get("conditions") or [], observed.now, spec.generation, wanted
        ),
        "operation": _operation(plan, observed),
        "history": _history(plan, before),
        "message": _message(wanted),
    }
    if observed.ranks is not None:
        found["revision"] = {
            "hash": observed.ranks.revision,
            "image": observed.ranks.image,
            "maxReplicas": observed.ranks.max_replicas,
        }
    if group is not None and group.known:
        found |= {
            "expertSlots": {
                "experts": group.experts,
                "perRank": group.slots_per_rank,
                "redundant": group.redundant_experts,
            },
            "elastic": group.elastic,
            "engineGeneration": group.generation,
            "pauseMode": group.pause_mode,
        }
    return found


def invalid(generation: int, message: str, now: float, before: Mapping[str, Any]) -> Status:
    """Of a spec that can't be read: all else stays as it was said last."""
    merged = conds.merge(before.get("conditions") or [], now, generation, conds.invalid(message))
    return {"observedGeneration": generation, "conditions": merged, "message": message}


def read_operation(status: Mapping[str, Any]) -> ops.Operation | None:
    """The operation that was under way when this status was written, if it is the operator's."""
    found = status.get("operation")
    return ops.from_status(found) if found and found.get("kind") in conds.OWN_KINDS else None


def read_history(status: Mapping[str, Any]) -> tuple[ops.Ended, ...]:
    """Operations that ended, oldest first."""
    return tuple(ops.ended_from_status(one) for one in status.get("history") or ())


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Status:
    """A merge patch (RFC 7386) of what changed; empty when nothing did."""
    patch: Status = {}
    for key, value in after.items():
        old = before.get(key)
        if value == old:
            continue
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            gone = {name: None for name in old if name not in value}
            patch[key] = {**{k: v for k, v in value.items() if old.get(k) != v}, **gone}
        else:
            patch[key] = value
    return patch


def _widths(spec: Spec, observed: Observed, before: Mapping[str, Any]) -> Status:
    """The widths side by side: what is asked for, made, heard of, in the layout, and serving."""
    group = observed.group
    found: Status = {
        "desiredReplicas": spec.size,
        "createdReplicas": len(observed.pods),
        "readyReplicas": conds.ready_ranks(observed),
    }
    if group is None or not group.known:
        # Unknown is not none: an autoscaler would take a restarting coordinator for an empty group.
        return found | {"replicas": before.get("replicas", 0)}
    there = {one.name for one in observed.pods}
    registered = [one for one in group.instances if one.registered and one.name in there]
    return found | {
        "replicas": group.size,
        "registeredReplicas": len(registered),
        "standbyReplicas": sum(1 for one in registered if one.state == "standby"),
    }


def _operation(plan: Plan, observed: Observed) -> Status | None:
    """The operator's operation, or one that the coordinator began by itself."""
    running = observed.group.operation if observed.group else None
    if plan.operation is not None:
        found = ops.to_status(plan.operation)
        if running is not None:
            found["groupPhase"] = running.phase
        return found
    if running is None:
        return None
    since = running.started + sum(spent for _, spent in running.phases[:-1])
    return {
        "id": running.id,
        "kind": "".join(word.capitalize() for word in running.kind.split("_")) + "ByGroup",
        "from": running.from_size,
        "to": running.to_size,
        "phase": running.phase,
        "startedAt": ops.time_text(running.started),
        "phaseStartedAt": ops.time_text(since),
        "attempt": running.attempt,
        "message": running.reason or running.error,
    }


def _history(plan: Plan, before: Mapping[str, Any]) -> Sequence[Status]:
    ended = [ops.ended_to_status(one) for one in plan.ended]
    return [*(before.get("history") or []), *ended][-ops.HISTORY :]


def _message(wanted: Sequence[Condition]) -> str:
    """One line for `kubectl get`: what is wrong, or what goes on."""
    by_type = {one.type: one for one in wanted}
    degraded, progressing = by_type["Degraded"], by_type["Progressing"]
    return degraded.message if degraded.status == "True" else progressing.message
