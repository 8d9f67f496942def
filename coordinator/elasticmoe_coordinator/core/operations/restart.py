"""A planned warm restart: drain, stop, start. No request fails whose client waits as long.

The new layout, with its launches, is in the record's `joining` from the beginning. Readiness stays
true for who serves before and after: connections wait in the kernel's backlog.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elasticmoe_coordinator.core import fitness
from elasticmoe_coordinator.core.book import Book
from elasticmoe_coordinator.core.operations import preflight, starting
from elasticmoe_coordinator.core.view import Order, View

STOP_LIMIT = 60.0
"""Seconds after which a stop goes on with SIGKILL."""


def begin(
    book: Book,
    now: float,
    layout: Sequence[str],
    reason: str,
    *,
    operation_id: str = "",
    drain_timeout: int,
) -> None:
    """Begin a planned restart into this layout (instances in rank order; none: stop the group)."""
    book.begin(
        "restart",
        "preflight",
        now,
        to_size=len(layout),
        reason=reason,
        operation_id=operation_id,
        drain_timeout=drain_timeout,
    )
    book.update(joining=book.seats(layout))


def instead(book: Book, now: float, layout: Sequence[str], reason: str) -> None:
    """The running resize, of which nobody was told yet, is done as a planned restart."""
    book.enter("preflight", now)
    book.amend(kind="restart", reason=reason)
    book.update(joining=book.seats(layout))


class Restart:
    """preflight -> drain -> stop -> start."""

    down = frozenset({"stop", "start"})
    still = down

    def advance(self, view: View) -> None:
        """See `Operation`."""
        book = view.book
        phase = book.running.phase
        if book.running.urgent and phase in ("preflight", "drain") and _shut(view):
            # The resize that was given up had got further: its gates never open again.
            error = "a commit that can't end had begun"
            book.give_up(view.now, error)
        elif phase == "preflight":
            newcomers = _newcomers(view)
            unheard = [one.instance for one in book.record.members if not view.up(one)]
            late = _unheard_line(unheard) if unheard else _command_missing(view)
            ready = preflight.passed(view, newcomers) and (not late or book.running.urgent)
            if error := preflight.failure(view, newcomers):
                book.end("withdrawn", view.now, late or error)
            elif ready:
                book.enter("drain", view.now)
        elif phase == "drain":
            self._drain(view)
        elif phase == "stop":
            self._stop(view)
        elif view.all_up():
            book.end("succeeded", view.now)
        elif error := starting.failure(view):
            book.give_up(view.now, error)

    def order(self, view: View, name: str, order: Order) -> Order | None:
        """See `Operation`."""
        book = view.book
        phase = book.running.phase
        stays = {one.instance for one in book.record.joining}
        if phase == "preflight":
            return preflight.order(view, name, order, _newcomers(view))
        if phase == "start":
            return starting.order(view, name, order, ready=view.was_ready(name))
        if name not in book.names:
            return order
        order = replace(order, ready=name in stays and view.was_ready(name))
        if phase == "drain":
            return replace(order, fence="paused")
        return replace(order, launch=None, kill=view.waited() > STOP_LIMIT)

    def _drain(self, view: View) -> None:
        book = view.book
        gates = view.gates(book.record.members)
        if all(gate and gate.fence == "paused" and not _busy(gate) for gate in gates):
            book.enter("stop", view.now)
            return
        if view.waited() <= book.running.drain_timeout_s:
            return
        running = book.running
        if running.urgent or view.config.drain_policy == "abort":
            book.enter("stop", view.now)
            return
        asked = running.requested and running.from_size == running.to_size
        error = (
            f"requests still ran after {running.drain_timeout_s} s (drain timeout): "
            f"{'ask again for the restart' if asked else 'the restart is tried again later'}"
        )
        book.end("withdrawn", view.now, error)

    def _stop(self, view: View) -> None:
        book = view.book
        if view.waited() > 2 * STOP_LIMIT:
            error = "an engine could not be stopped"
            book.give_up(view.now, error)
            return
        layout = [one.instance for one in book.record.joining]
        if not all(view.gone(name) for name in {*book.names, *layout}):
            return
        if error := starting.mismatch(view, layout):
            if view.waited() > min(view.config.replacement, STOP_LIMIT):
                book.give_up(view.now, error)
        elif layout:
            starting.begin(view, book.record.joining)
        else:
            book.update(members=())
            book.end("succeeded", view.now)


def _newcomers(view: View) -> list[str]:
    names = view.book.names
    return [one.instance for one in view.book.record.joining if one.instance not in names]


def _command_missing(view: View) -> str:
    """Launchers get a new command one after the other. Nothing is stopped before all have it."""
    layout = [view.roster.get(one.instance) for one in view.book.record.joining]
    known = {one.name: found for one in layout if one and (found := fitness.upcoming(one))}
    if len(set(known.values())) < 2:
        return ""
    told = ", ".join(f"{name}: {revision}" for name, revision in known.items())
    return f"the next engines would start with different commands ({told}): see each one's file"


def _shut(view: View) -> bool:
    """A gate is shut for a commit."""
    return any(gate is not None and gate.scaling for gate in view.gates(view.book.record.members))


def _unheard_line(names: Sequence[str]) -> str:
    """A drain without a rank's word would end at its limit, with every gate shut until then."""
    return f"nothing is heard from {', '.join(names)}: see whether its host and sidecar run"


def _busy(gate: object) -> bool:
    return any(getattr(gate, name) for name in ("in_flight", "held", "open_connections"))
