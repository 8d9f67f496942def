"""The highest ranks leave: lame_duck -> close -> prepare -> commit -> retire.

A request that was accepted before the fence is never cut, unless the drain policy says so.
"""

from __future__ import annotations

from dataclasses import replace

from elasticmoe_protocol.messages import Fence, GateReport, Member

from elasticmoe_coordinator.core.operations import resize
from elasticmoe_coordinator.core.view import Order, View

RETIRE_LIMIT = 60.0
"""Seconds after which a retired engine that does not end gets SIGKILL."""


class ScaleDown:
    """lame_duck -> close -> prepare -> commit -> retire."""

    down: frozenset[str] = frozenset()
    still = frozenset({"commit"})

    def advance(self, view: View) -> None:
        """See `Operation`."""
        book = view.book
        phase = book.running.phase
        if phase == "lame_duck":
            self._lame_duck(view)
        elif phase == "close":
            gates = view.gates(_leaving(view))
            cut = view.config.drain_policy == "abort" and _drain_is_over(view)
            closed = all(gate and gate.fence == "closed" for gate in gates)
            busy = any(_requests(gate) for gate in gates)
            if closed and (cut or not busy) and view.all_up():
                book.enter("prepare", view.now)
            elif (busy or closed) and not cut and _drain_is_over(view):
                book.end("withdrawn", view.now, _timeout_line(view))
        elif phase in ("prepare", "commit"):
            if resize.advance(view):
                record, size = book.record, book.running.to_size
                book.update(members=record.members[:size], joining=record.members[size:])
                book.enter("retire", view.now)
        elif all(self._ended(view, one) for one in book.record.joining):
            book.end("succeeded", view.now)

    def order(self, view: View, name: str, order: Order) -> Order | None:
        """See `Operation`."""
        book = view.book
        phase = book.running.phase
        if phase == "retire":
            return self._retire(view, name, order)
        if phase in ("prepare", "commit"):
            order = resize.order(view, name, order)
        if name not in {one.instance for one in _leaving(view)}:
            return order
        fence: Fence = "lame_duck" if phase == "lame_duck" else "closed"
        return replace(order, ready=False, fence=fence)

    def _lame_duck(self, view: View) -> None:
        book = view.book
        gates = view.gates(_leaving(view))
        quiet = all(
            gate and gate.fence == "lame_duck" and not _requests(gate) and not gate.open_connections
            for gate in gates
        )
        if quiet:
            if view.waited() >= view.config.lame_duck:
                book.enter("close", view.now)
        elif _drain_is_over(view):
            if view.config.drain_policy == "abort":
                book.enter("close", view.now)
            else:
                book.end("withdrawn", view.now, _timeout_line(view))

    def _retire(self, view: View, name: str, order: Order) -> Order | None:
        leaver = next((one for one in view.book.record.joining if one.instance == name), None)
        if leaver is None:
            return order
        gate = view.gate(leaver)
        late = view.waited() > RETIRE_LIMIT
        if late or gate is None or gate.retired:
            return replace(order, launch=None, kill=late, ready=False)
        spec = view.specs.get(leaver.launch)
        return None if spec is None else replace(order, launch=spec, fence="closed", ready=False)

    def _ended(self, view: View, leaver: Member) -> bool:
        """Its engine is gone, or nobody can reach it and it can't be waited for."""
        late = view.waited() > RETIRE_LIMIT
        return view.gone(leaver.instance) or (late and view.unreachable(leaver.instance))


def _leaving(view: View) -> tuple[Member, ...]:
    return view.book.record.members[view.book.running.to_size :]


def _drain_is_over(view: View) -> bool:
    """The limit counts from the beginning of the drain."""
    return view.now - view.book.running.started > view.book.running.drain_timeout_s


def _requests(gate: GateReport | None) -> bool:
    return gate is None or gate.in_flight > 0 or gate.held > 0


def _timeout_line(view: View) -> str:
    return (
        f"requests still ran after {view.book.running.drain_timeout_s} s (drain timeout): the "
        "ranks serve on and leave later"
    )
