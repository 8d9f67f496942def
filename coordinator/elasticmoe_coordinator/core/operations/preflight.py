"""Newcomers are checked before any running rank is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elasticmoe_protocol.messages import PreflightSpec

from elasticmoe_coordinator.core.view import Order, View


def failure(view: View, newcomers: Sequence[str]) -> str:
    """Why the newcomers can't be used, "" while they may."""
    for name in newcomers:
        found = view.fresh(name)
        known = view.roster.get(name)
        if known is not None and known.leaving:
            return f"{name} left before it could join"
        outcome = found.report.preflight if found and found.report else None
        if outcome is not None and outcome.check == _check(view, name) and not outcome.ok:
            return f"{name}: {outcome.reason}"
    if view.waited() > view.config.preflight_limit:
        late = [name for name in newcomers if not _ok(view, name)]
        what = "; ".join(_lateness(view, name) for name in late) or _stray_line(view)
        return f"{what} in {view.config.preflight_limit:g} s"
    return ""


def passed(view: View, newcomers: Sequence[str]) -> bool:
    """All newcomers are fit and no engine is where none should be."""
    return all(_ok(view, name) for name in newcomers) and not view.strays(view.book.names)


def order(view: View, name: str, order: Order, newcomers: Sequence[str]) -> Order:
    """Have a newcomer checked, once there is nothing to say against it (it is warm)."""
    newcomer = view.fresh(name)
    if name not in newcomers or newcomer is None or view.objection(newcomer):
        return order
    record = view.book.record
    master = view.roster.get(record.members[0].instance)
    if master is None:
        return order
    facts = master.facts
    return replace(
        order,
        preflight=PreflightSpec(
            check=_check(view, name),
            slots=record.slots,
            master_address=facts.address,
            master_probe_port=facts.probe_port,
            engine_version=facts.engine_version,
            model=facts.model,
            fingerprint=facts.fingerprint,
            flags=facts.flags,
        ),
    )


def _check(view: View, name: str) -> str:
    """Id of a check: one for each newcomer of an operation."""
    return f"{view.book.running.id}/{name}"


def _ok(view: View, name: str) -> bool:
    found = view.fresh(name)
    outcome = found.report.preflight if found and found.report else None
    return outcome is not None and outcome.check == _check(view, name) and outcome.ok


def _lateness(view: View, name: str) -> str:
    known = view.roster.get(name)
    why = view.objection(known) if known else ""
    return f"{name} did not pass the check ({why or 'no answer'})"


def _stray_line(view: View) -> str:
    return f"the engine of {', '.join(view.strays(view.book.names))} did not stop"
