"""After an unplanned loss: kill every engine of the old generation, start all again warm."""

from __future__ import annotations

from dataclasses import replace

from elasticmoe_coordinator.core.operations import starting
from elasticmoe_coordinator.core.view import Order, View


class Recover:
    """kill -> replace -> start, and again with back-off when the start fails."""

    down = frozenset({"kill", "replace", "start"})
    still = down

    def advance(self, view: View) -> None:
        """See `Operation`."""
        book = view.book
        phase = book.running.phase
        if phase == "kill":
            if self._killed(view):
                book.enter("replace", view.now)
        elif phase == "replace":
            self._replace(view)
        elif view.all_up():
            book.end("succeeded", view.now)
        elif error := starting.failure(view):
            self._again(view, error)

    def order(self, view: View, name: str, order: Order) -> Order | None:
        """See `Operation`."""
        if view.book.running.phase == "start":
            return starting.order(view, name, order, ready=False)
        return replace(order, launch=None, kill=True, ready=False, fence="open")

    def _killed(self, view: View) -> bool:
        """Nothing of the old generation is left. Who can't be reached is given up after a while."""
        old = {*view.book.names, *(one.instance for one in view.book.record.joining)}
        old |= {one.name for one in view.roster if not view.roster.silent(one.name, view.now)}
        patient = view.waited() <= view.config.replacement
        return all(view.gone(name) or (view.unreachable(name) and not patient) for name in old)

    def _replace(self, view: View) -> None:
        book = view.book
        tries = _recent(view)
        if len(tries) >= view.config.restart_limit:
            minutes = view.config.restart_window / 60
            error = (
                f"{len(tries)} restarts in {minutes:g} minutes did not help, the last reason: "
                f"{book.running.error or book.running.reason}. Mend it, then ask for a restart"
            )
            # Only who mended it asks again, and then what was before counts no more.
            book.update(members=(), restarts=())
            book.end("failed", view.now, error)
            return
        if view.now < _not_before(view, tries):
            return
        layout = starting.gather(view)
        # Who can't be reached was given up when the others were killed.
        if layout and all(view.unreachable(name) for name in view.strays(layout)):
            book.update(restarts=(*tries, view.now))
            starting.begin(view, layout)

    def _again(self, view: View, error: str) -> None:
        book = view.book
        book.enter("kill", view.now)
        book.amend(attempt=book.running.attempt + 1, error=error)


def _recent(view: View) -> tuple[float, ...]:
    """Unplanned restarts that still count."""
    since = view.now - view.config.restart_window
    return tuple(when for when in view.book.record.restarts if when > since)


def _not_before(view: View, tries: tuple[float, ...]) -> float:
    """Back-off: the first restart comes at once, each further one waits twice as long."""
    if not tries:
        return 0.0
    pause = view.config.backoff * 2.0 ** (len(tries) - 1)
    return tries[-1] + float(min(pause, view.config.backoff_max))
