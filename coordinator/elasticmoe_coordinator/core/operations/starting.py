"""All engines start together as a new generation: the end of start, restart and recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elasticmoe_protocol.messages import Member

from elasticmoe_coordinator.core import fitness
from elasticmoe_coordinator.core.layout import choose, slots_per_rank
from elasticmoe_coordinator.core.view import Order, View


def gather(view: View) -> list[str]:
    """Who would start now, in rank order: all that is desired, or, after `replacement` seconds,
    what can be had. Empty: wait."""
    starters = view.starters()
    chosen = choose(starters, view.book.names, view.book.record.desired)
    if mismatch(view, chosen):
        return []
    if len(chosen) >= view.book.record.desired > 0:
        return chosen
    enough = len(chosen) >= view.config.min_size
    return chosen if enough and view.waited() > view.config.replacement else []


def mismatch(view: View, layout: Sequence[str]) -> str:
    """Why the engines of this layout can't start together, "" when they can."""
    found = [one for name in layout if (one := view.roster.get(name)) is not None]
    for one in found:
        if why := fitness.difference(one, found[0]):
            return f"{one.name}: {why}"
        if why := fitness.too_few_slots(one, view.book.record.slots, len(layout)):
            return why
    return ""


def begin(view: View, layout: Sequence[str] | Sequence[Member]) -> None:
    """Write the new layout down and go to phase `start`."""
    book = view.book
    record = book.record
    seats = tuple(one for one in layout if isinstance(one, Member)) or book.seats(
        one for one in layout if isinstance(one, str)
    )
    slots = record.slots
    if not slots:
        first = view.roster.get(seats[0].instance)
        slots = slots_per_rank(first.facts.num_experts if first else 0, view.config.min_size)
    book.enter("start", view.now)
    book.amend(to_size=len(seats))
    book.update(
        generation=record.generation + 1,
        members=seats,
        joining=(),
        slots=slots,
        elastic=True,
        inelastic_reason="",
    )


def failure(view: View) -> str:
    """Why this start can't succeed any more, "" while it can."""
    for member in view.book.record.members:
        known = view.roster.get(member.instance)
        if known is not None and known.replaced_at > view.book.phase_since():
            return f"{member.instance} was replaced by another one while it started"
        found = view.fresh(member.instance)
        if found is None:
            continue
        engine = found.engine
        if engine.phase == "exited" and engine.launch == member.launch:
            reason = engine.exit.reason if engine.exit else "its engine ended"
            return f"{member.instance} (rank {member.rank}): {reason}"
        if error := changed(view, member):
            return error
    # A restarted coordinator does not know what it told those that have begun.
    if error := mismatch(view, view.book.names):
        return error
    if view.waited() > view.config.start_limit:
        late = [m.instance for m in view.book.record.members if not view.up(m)]
        return f"{', '.join(late)} not up after {view.config.start_limit:g} s: see the engine's log"
    return ""


def changed(view: View, member: Member) -> str:
    """Its command changed before it began its engine, which its launcher then refuses to begin."""
    found, spec = view.fresh(member.instance), view.specs.get(member.launch)
    if found is None or spec is None or found.engine.launch == member.launch:
        return ""
    facts = found.facts
    same = (spec.fingerprint or facts.fingerprint) == facts.fingerprint
    if spec.command and facts.command:
        same = same and spec.command == facts.command
    return "" if same else f"{member.instance} got another command just before its start"


def order(view: View, name: str, order: Order, *, ready: bool) -> Order | None:
    """A member starts its engine; `ready` says whether its readiness stays as it was."""
    record = view.book.record
    member = next((one for one in record.members if one.instance == name), None)
    if member is None:
        return order
    spec = view.spec(member, record.members, joiner=False)
    return None if spec is None else replace(order, launch=spec, fence="open", ready=ready)
