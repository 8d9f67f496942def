"""What is kept up whether an operation runs or not. Pure."""

from __future__ import annotations

from elasticmoe_operator.core.actions import (
    Action,
    ApplyRanks,
    DeleteRanks,
    ForgetPod,
    LabelPod,
    ScaleRanks,
)
from elasticmoe_operator.core.view import View


def replicas(view: View) -> list[Action]:
    """As many pods as needed."""
    ranks = view.observed.ranks
    if view.spec.paused:
        return []
    if ranks is None:
        return [ApplyRanks(replicas=view.new_replicas())]
    wanted = view.wanted_replicas()
    return [ScaleRanks(replicas=wanted)] if wanted != ranks.replicas else []


def labels(view: View) -> list[Action]:
    """Pods of active ranks have the label, no others."""
    found: list[Action] = []
    if view.group is None:
        return found
    for pod in view.observed.pods:
        instance = view.instance(pod)
        active = instance is not None and instance.active
        if pod.ready and view.silent(pod):
            continue  # it serves as it did, whatever keeps it from being heard
        if active != pod.active and not pod.deleting:
            found.append(LabelPod(name=pod.name, uid=pod.uid, active=active))
    return found


def forgotten(view: View) -> list[Action]:
    """Pods that were evicted from a node that is gone stay for ever if nobody removes them."""
    if view.group is None:
        return []
    return [
        ForgetPod(name=pod.name, uid=pod.uid)
        for pod in view.observed.pods
        if pod.deleting and pod.evicted and view.silent(pod)
    ]


def tear_down(view: View) -> list[Action]:
    """Of a deployment that is deleted: the StatefulSet goes first, its pods leave in order."""
    ranks = view.observed.ranks
    gone = ranks is None or ranks.deleting
    return [*([] if gone else [DeleteRanks()]), *forgotten(view)]
