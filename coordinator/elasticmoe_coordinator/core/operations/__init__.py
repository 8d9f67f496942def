"""One file for each kind of operation. Each is a small state machine over the record's `phase`."""

from __future__ import annotations

from typing import Protocol

from elasticmoe_coordinator.core.operations import recover, restart, scale_down, scale_up, start
from elasticmoe_coordinator.core.view import Order, View


class Operation(Protocol):
    """What a kind of operation is. Without state of its own: the record has it all.

    A turn may end the operation or begin another one (through the view's book).
    """

    down: frozenset[str]
    """Phases in which members' engines may be gone: nothing is a loss then."""
    still: frozenset[str]
    """Phases in which no progress is expected of running requests."""

    def advance(self, view: View) -> None:
        """Look whether the running phase is over, and go on."""

    def order(self, view: View, name: str, order: Order) -> Order | None:
        """What an instance should be now; `order` is what it would be without the operation.

        None: nothing can be said yet, it stays as it is.
        """


KINDS: dict[str, Operation] = {
    "start": start.Start(),
    "scale_up": scale_up.ScaleUp(),
    "scale_down": scale_down.ScaleDown(),
    "restart": restart.Restart(),
    "recover": recover.Recover(),
}
