"""Which operation is due when none is under way. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elasticmoe_operator.core import operation as ops
from elasticmoe_operator.core.operation import Ended, Operation
from elasticmoe_operator.core.view import View

RETRY_S = 30.0
RETRY_MAX_S = 600.0
"""Pause before a failed operation is tried again: doubled each time, up to the second one."""


def due(view: View, history: Sequence[Ended]) -> tuple[Operation | None, str]:
    """The operation that begins now, or why the one that is wanted is not tried ("": none is).

    history: what ended before, oldest first.
    """
    spec, ranks, group = view.spec, view.observed.ranks, view.group
    if spec.paused:
        return None, ""
    if ranks is None:
        return _begin(view, "Start", "CreatePods", 0), ""
    changed = ranks.revision != spec.revision or view.old_pods() or view.old_engines()
    if changed or _taken_back(view, history):
        return _restart(view, history)
    if group is None or group.operation is not None:
        return None, ""
    if not group.desired:
        return _begin(view, "Start", "Start", 0), ""
    if spec.size != group.desired or view.gave_up():
        return _resize(view, group.size, history)
    return None, ""


def _restart(view: View, history: Sequence[Ended]) -> tuple[Operation | None, str]:
    """All engines, or all pods, are replaced for a new template."""
    group, ranks = view.group, view.observed.ranks
    running = group.operation if group is not None else None
    if running is not None and running.kind not in ("start", "recover"):
        return None, ""
    if view.serves_unseen():
        return None, ""
    last = _last(history, lambda one: one.operation.kind == "Restart")
    attempt = 1
    if last is not None and last.operation.revision == view.spec.revision:
        in_vain = ranks is not None and ranks.revision == view.spec.revision
        failed = in_vain or last.result in ("Failed", "Withdrawn")
        if failed and (held := _rests(view, last)):
            return None, held
        attempt = last.operation.attempt + 1
    phase: ops.Phase = "Update" if view.in_place() else "Drain"
    return _begin(view, "Restart", phase, group.size if group else 0, attempt), ""


def _taken_back(view: View, history: Sequence[Ended]) -> bool:
    """The group is down because of a template that is no longer asked for."""
    last = _last(history, lambda one: one.operation.kind == "Restart")
    if last is None or not view.exhausted():
        return False
    return last.result == "Failed" and last.operation.revision != view.spec.revision


def _resize(view: View, now: int, history: Sequence[Ended]) -> tuple[Operation | None, str]:
    """From the size that serves now to the one that is asked for."""
    size = view.spec.size
    last = _last(history, lambda one: one.operation.kind in ("ScaleUp", "ScaleDown"))
    attempt = 1
    if last is not None and last.operation.to_size == size:
        if last.result == "Withdrawn" and size > now and not view.joiners_ready(size):
            return None, last.message
        if last.result == "Failed":
            if held := _rests(view, last):
                return None, held
            attempt = last.operation.attempt + 1
    if not now:
        return _begin(view, "Start", "Start", 0, attempt), ""
    if size > now:
        return _begin(view, "ScaleUp", "CreatePods", now, attempt), ""
    if size < now:
        return _begin(view, "ScaleDown", "Resize", now, attempt), ""
    # A resize that was asked for is called off.
    return _begin(view, "ScaleUp", "Resize", now, attempt), ""


def _last(history: Sequence[Ended], which: Callable[[Ended], bool]) -> Ended | None:
    return next((one for one in reversed(history) if which(one)), None)


def _rests(view: View, last: Ended) -> str:
    """Why it is too early to try again, "" when it is not."""
    pause = min(RETRY_MAX_S, RETRY_S * 2.0 ** min(last.operation.attempt - 1, 10))
    if view.now - last.at >= pause:
        return ""
    why = last.message or "pods or engines are still not of the spec's revision"
    return f"{why}; it is tried again after {pause:.0f} s"


def _begin(
    view: View, kind: ops.Kind, phase: ops.Phase, from_size: int, attempt: int = 1
) -> Operation:
    revision = view.spec.revision if kind in ("Start", "Restart") else ""
    return ops.begin(
        kind, phase, from_size, view.spec.size, view.now, attempt=attempt, revision=revision
    )
