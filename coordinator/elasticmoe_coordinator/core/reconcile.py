"""Which operation should begin now, given what is and what is desired. Level-triggered."""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_protocol.messages import OperationRecord

from elasticmoe_coordinator.core.book import Book
from elasticmoe_coordinator.core.layout import choose, plan
from elasticmoe_coordinator.core.operations import restart
from elasticmoe_coordinator.core.view import View


@dataclass(frozen=True)
class Asked:
    """A person or the operator asks for it: no waiting after an earlier failure."""

    operation_id: str
    drain_timeout: int


def failed(book: Book) -> OperationRecord | None:
    """The recovery that gave up; a person has to look."""
    last = book.record.history[-1] if book.record.history else None
    gave_up = last is not None and last.kind == "recover" and last.state == "failed"
    return last if gave_up and not book.record.members else None


def wanted(view: View) -> list[str]:
    """The layout that the group should have, of those who are there, in rank order.

    Growth is all or nothing: as long as the desired size can't be had, the old one serves.
    """
    book, candidates = view.book, view.candidates()
    if view.unheard():
        return book.names  # a fault is never a shrink: the rules of loss decide about them
    layout = choose(candidates, book.names, book.record.desired)
    if len(layout) < book.record.desired and book.size:
        staying = sum(1 for one in candidates if one.name in book.names)
        layout = choose(candidates, book.names, staying)
    return layout


def begin_next(view: View, asked: Asked | None = None) -> None:
    """Begin the operation that is due, if one is."""
    book, config = view.book, view.config
    asked_id = asked.operation_id if asked else ""
    drain_timeout = asked.drain_timeout if asked else config.drain_timeout
    if not book.size:
        enough = len(view.starters()) >= config.min_size
        if book.record.desired >= config.min_size and (enough or asked):
            book.begin(
                "start", "wait", view.now, to_size=book.record.desired, operation_id=asked_id
            )
        return
    layout = wanted(view)
    leaving = [name for name in book.names if (one := view.roster.get(name)) and one.leaving]
    if not asked and not _may_try_again(view, bool(leaving)):
        return
    if len(layout) < config.min_size:
        if leaving:
            reason = (
                f"{', '.join(leaving)} leaves and {len(layout)} would be left, under the smallest "
                f"size {config.min_size}: the group stops"
            )
            restart.begin(
                book, view.now, [], reason, operation_id=asked_id, drain_timeout=drain_timeout
            )
        return
    inelastic = "" if book.record.elastic else book.record.inelastic_reason or "not elastic"
    change = plan(book.names, layout, inelastic)
    if change.change == "restart":
        restart.begin(
            book,
            view.now,
            layout,
            change.reason,
            operation_id=asked_id,
            drain_timeout=drain_timeout,
        )
    elif change.change != "none":
        book.begin(
            change.change,
            "wait" if change.change == "scale_up" else "lame_duck",
            view.now,
            to_size=len(layout),
            operation_id=asked_id,
            drain_timeout=drain_timeout,
        )
    elif asked and book.record.desired > book.size:
        book.begin(
            "scale_up",
            "wait",
            view.now,
            to_size=book.record.desired,
            operation_id=asked_id,
            drain_timeout=drain_timeout,
        )


def held_back(book: Book) -> OperationRecord | None:
    """The failed resize to the desired size that is not tried again before somebody asks."""
    if book.size == book.record.desired:
        return None
    resizes = [one for one in book.record.history if one.from_size != one.to_size]
    last = resizes[-1] if resizes else None
    held = last is not None and last.state == "failed" and last.to_size == book.record.desired
    return last if held else None


def _may_try_again(view: View, somebody_leaves: bool) -> bool:
    """Withdrawn operations are tried again with back-off, failed ones only when asked for."""
    if held_back(view.book) and not somebody_leaves:
        return False
    withdrawn = 0
    for record in reversed(view.book.record.history):
        if record.state != "withdrawn":
            break
        withdrawn += 1
    if not withdrawn:
        return True
    ended = view.book.record.history[-1].ended or 0.0
    pause = min(view.config.backoff_max, view.config.backoff * 2.0 ** min(withdrawn - 1, 16))
    return view.now - ended >= pause
