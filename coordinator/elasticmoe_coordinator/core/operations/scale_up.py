"""Ranks join at the end: preflight -> launch -> prepare -> commit -> settle."""

from __future__ import annotations

from dataclasses import replace

from elasticmoe_coordinator.core.layout import choose, plan
from elasticmoe_coordinator.core.operations import preflight, resize, restart, starting
from elasticmoe_coordinator.core.view import Order, View

ATTEMPTS = 5
"""So often joiners may be replaced before the operation is withdrawn."""


class ScaleUp:
    """wait (for instances) -> preflight -> launch -> prepare -> commit -> settle."""

    down: frozenset[str] = frozenset()
    still = frozenset({"commit", "settle"})

    def advance(self, view: View) -> None:
        """See `Operation`."""
        book = view.book
        phase = book.running.phase
        joining = [one.instance for one in book.record.joining]
        if phase in ("preflight", "launch") and self._replaced(view):
            self._wait_again(view)
        elif phase == "wait":
            self._wait(view)
        elif phase == "preflight":
            if error := preflight.failure(view, joining):
                book.end("withdrawn", view.now, error)
            elif preflight.passed(view, joining) and view.all_up():
                book.enter("launch", view.now)
        elif phase == "launch":
            if error := self._lost_joiner(view):
                book.end("withdrawn", view.now, error)
            elif view.waited() > view.config.preflight_limit:
                book.end("withdrawn", view.now, "the joiners' launchers did not start them")
            elif all(_started(view, name) for name in joining) and view.all_up():
                book.enter("prepare", view.now)
        elif phase in ("prepare", "commit"):
            error = self._lost_joiner(view)
            if error and resize.committing(view):
                resize.commit_failed(view, error)
            elif error:
                self._joiner_died(view, error)
            elif resize.advance(view):
                record = book.record
                book.update(members=record.members + record.joining, joining=())
                book.enter("settle", view.now)
        elif view.all_up():
            book.end("succeeded", view.now)
        elif view.waited() > view.config.start_limit:
            error = "a joiner did not answer after the resize"
            book.give_up(view.now, error)

    def order(self, view: View, name: str, order: Order) -> Order | None:
        """See `Operation`."""
        book = view.book
        phase, record = book.running.phase, book.record
        if phase == "preflight":
            return preflight.order(view, name, order, [one.instance for one in record.joining])
        if phase in ("launch", "prepare", "commit"):
            layout = record.members + record.joining
            joiner = next((one for one in record.joining if one.instance == name), None)
            if joiner is not None:
                spec = view.spec(joiner, layout, joiner=True)
                if spec is None:
                    return None
                order = replace(order, launch=spec)
            return resize.order(view, name, order) if phase != "launch" else order
        return order

    def _wait(self, view: View) -> None:
        book = view.book
        wanted = choose(view.candidates(), book.names, book.running.to_size)
        if len(wanted) == book.running.to_size and not view.unheard():
            inelastic = "" if book.record.elastic else book.record.inelastic_reason or "not elastic"
            change = plan(book.names, wanted, inelastic)
            if change.change == "restart":
                restart.instead(book, view.now, wanted, change.reason)
            else:
                book.update(joining=book.seats(wanted[book.size :], book.size))
                book.enter("preflight", view.now)
        elif view.waited() > view.config.replacement:
            missing = book.running.to_size - len(wanted)
            error = (
                f"{missing} more instance{'s' * (missing > 1)} needed: start them, they join then"
            )
            if unheard := view.unheard():
                error = f"nothing was heard from {', '.join(unheard)} yet"
            book.end("withdrawn", view.now, error)

    def _replaced(self, view: View) -> bool:
        """A joiner is another one than at the beginning; nobody was told of it yet."""
        known = [view.roster.get(one.instance) for one in view.book.record.joining]
        return any(one is not None and one.replaced_at > view.book.phase_since() for one in known)

    def _wait_again(self, view: View) -> None:
        book = view.book
        if book.running.attempt >= ATTEMPTS:
            names = ", ".join(one.instance for one in book.record.joining)
            book.end("withdrawn", view.now, f"{names}: replaced again and again, see why it ends")
            return
        book.enter("wait", view.now)
        book.amend(attempt=book.running.attempt + 1)
        book.update(joining=())

    def _joiner_died(self, view: View, error: str) -> None:
        """Nobody can take its place in the same operation, and the engines may die of it."""
        book = view.book
        if book.not_sent:
            book.end("withdrawn", view.now, error)
        else:
            resize.restart_old(view, error)

    def _lost_joiner(self, view: View) -> str:
        for member in view.book.record.joining:
            known = view.roster.get(member.instance)
            found = view.fresh(member.instance)
            if known is not None and known.replaced_at > view.book.began("launch"):
                return f"{member.instance} was replaced by another one"
            if found is None:
                continue
            engine = found.engine
            if engine.phase == "exited" and engine.launch == member.launch:
                reason = engine.exit.reason if engine.exit else "its engine ended"
                return f"{member.instance} (joining as rank {member.rank}): {reason}"
            if view.book.running.phase == "launch" and (error := starting.changed(view, member)):
                return error
            knows = view.knowing.get(member.instance, ("", ""))[0] == view.book.running.id
            if view.book.running.phase != "launch" and knows and engine.phase == "absent":
                return f"{member.instance} (joining as rank {member.rank}): its engine is gone"
        return ""


def _started(view: View, name: str) -> bool:
    found = view.fresh(name)
    member = next(one for one in view.book.record.joining if one.instance == name)
    return (
        found is not None
        and found.engine.launch == member.launch
        and found.engine.phase in ("starting", "running")
    )
