"""The first start, and each start from nothing: wait for instances, start them all."""

from __future__ import annotations

from elasticmoe_coordinator.core.operations import starting
from elasticmoe_coordinator.core.view import Order, View


class Start:
    """wait -> start."""

    down = frozenset({"wait", "start"})
    still = down

    def advance(self, view: View) -> None:
        """See `Operation`."""
        book = view.book
        if book.running.phase == "wait":
            layout = starting.gather(view)
            if layout and not view.strays(layout):
                starting.begin(view, layout)
        elif view.all_up():
            book.end("succeeded", view.now)
        elif error := starting.failure(view):
            book.give_up(view.now, error)

    def order(self, view: View, name: str, order: Order) -> Order | None:
        """See `Operation`."""
        if view.book.running.phase == "wait":
            return order
        return starting.order(view, name, order, ready=False)
