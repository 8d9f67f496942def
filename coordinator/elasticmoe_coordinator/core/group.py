"""One group: what is known of its instances, what it should be, and the operation under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
from elasticmoe_protocol.messages import Hello, OperationRecord, Refused, Report

from elasticmoe_coordinator.core import describe, loss, reconcile
from elasticmoe_coordinator.core.book import Book
from elasticmoe_coordinator.core.config import GroupConfig
from elasticmoe_coordinator.core.courier import Courier
from elasticmoe_coordinator.core.learning import Learning, Memory
from elasticmoe_coordinator.core.members import Instance, Roster
from elasticmoe_coordinator.core.operations import KINDS, restart
from elasticmoe_coordinator.core.outbox import (
    Level,
    Note,
    Outbox,
    Probe,
    ProbeAnswer,
    Rejected,
    TargetRequest,
)
from elasticmoe_coordinator.core.status import GroupStatus, OperationStatus
from elasticmoe_coordinator.core.view import PROBE_EVERY, Order, View

STOOD_STILL = 1.0
"""Seconds between two turns from which the coordinator itself was away (frozen, starved)."""
FORGET_AFTER = 30.0
"""Seconds of silence after which an instance that is no part of the layout is forgotten."""
TURNS = 8
"""At most so many phases end in one turn of the clock."""


class Group:
    """Everything in, everything out; no clock, no socket, no chance of its own.

    Times (`now`) are Unix seconds. `new_id` makes ids for operations and launches. term: the lowest
    that may be used; what the sidecars have seen raises it. memory: what the coordinator before
    this one wrote down, if that is there.
    """

    def __init__(
        self,
        config: GroupConfig,
        *,
        term: int,
        now: float,
        new_id: Callable[[], str],
        memory: Memory | None = None,
    ) -> None:
        self.config = config
        self._new_id = new_id
        self._roster = Roster(silence=config.suspect_after * config.heartbeat)
        self._learning: Learning | None = Learning(config, term - 1, now, memory)
        self._book = Book(self._learning.record(), new_id, config.history)
        self._courier = self._new_courier()
        self._stall = loss.Stall(now)
        self._outbox = Outbox()
        self._ticked = now
        self._asked_directly: dict[str, float] = {}
        self._loss = ""
        self._crowd: tuple[int, float] = (0, now)

    # --- what comes in --------------------------------------------------------------------------

    def hello(self, message: Hello, now: float) -> str:
        """An instance introduces itself; returns why it is refused, or ""."""
        refusal = self._roster.hello(message, now)
        if refusal:
            return refusal
        accepted = message.accepted
        term, leader = (accepted.term, accepted.leader) if accepted else (-1, "")
        if self._learning is None and self._courier.foreign(term, leader):
            self._learn_again(term, now)
            self._roster.hello(message, now)
        if self._learning is not None:
            self._learning.heard(accepted)
        instance = self._roster.get(message.instance)
        if instance is not None:
            self._courier.learn(instance)
        return ""

    def report(self, message: Report, now: float) -> bool:
        """An instance says what is; False when it has to say Hello first."""
        if not self._roster.note(message, now):
            return False
        if self._learning is not None:
            self._learning.passed(message.term)
        elif self._courier.foreign(message.term, message.leader):
            self._learn_again(message.term, now)
        return True

    def refused(self, instance: str, message: Refused, now: float) -> None:
        """An instance does not do as it was told: it obeys a newer coordinator."""
        if self._learning is not None:
            self._learning.passed(message.term)
        elif message.term > self._courier.term:
            self._say(
                "warning", f"{instance} obeys a newer coordinator: {message.reason}", instance
            )
            self._learn_again(message.term, now)

    def probed(self, answer: ProbeAnswer, now: float) -> None:
        """A silent instance's launcher was asked directly."""
        self._roster.probed(answer, now)

    # --- what people ask for --------------------------------------------------------------------

    def set_target(self, request: TargetRequest, now: float) -> tuple[OperationStatus | None, bool]:
        """Have the group become this size.

        Returns the operation that brings it there (None: there is nothing to do) and whether this
        call began it. Raises Rejected.
        """
        config, book = self.config, self._book
        if config.policy == "follow":
            line = "this group follows who is there: start or stop instances instead"
            raise Rejected("invalid", line)
        if not config.min_size <= request.size <= config.max_size:
            line = (
                f"size {request.size} is not between {config.min_size} and {config.max_size}: "
                "choose one that is, or start the group with other limits"
            )
            raise Rejected("invalid", line)
        known = self._known(request, now)
        if known is not None:
            return known, False
        running = book.operation
        if running is not None:
            if running.phase in ("wait", "kill", "replace") and running.kind != "scale_up":
                book.update(desired=request.size)
                book.amend(to_size=request.size)
            elif running.to_size != request.size:
                raise self._conflict(running)
            return describe.operation(book.running, now), False
        if self._loss:
            raise Rejected("not_ready", f"a rank is lost ({self._loss}): ask for a restart first")
        book.update(desired=request.size)
        return self._begin(request, now)

    def restart(self, request: TargetRequest, now: float) -> tuple[OperationStatus, bool]:
        """Restart all engines warm, drained first; a size of 0 keeps the size. Raises Rejected."""
        config, book = self.config, self._book
        if request.size and not config.min_size <= request.size <= config.max_size:
            line = f"size {request.size} is not between {config.min_size} and {config.max_size}"
            raise Rejected("invalid", line)
        known = self._known(request, now)
        if known is not None:
            return known, False
        if book.operation is not None:
            raise self._conflict(book.operation)
        desired = book.record.desired
        if request.size and config.policy == "declared":
            book.update(desired=request.size)
        view = self._view(now)
        layout = reconcile.wanted(view)
        if self._loss:
            book.begin(
                "recover",
                "kill",
                now,
                to_size=book.record.desired,
                reason=self._loss,
                operation_id=request.operation_id,
            )
        elif book.size and len(layout) >= config.min_size:
            limit = request.drain_timeout
            restart.begin(
                book,
                now,
                layout,
                "somebody asked for it",
                operation_id=request.operation_id,
                drain_timeout=config.drain_timeout if limit is None else limit,
            )
        elif not book.size and book.record.desired:
            self._begin(request, now)
        if book.operation is None:
            line = f"there is nothing to restart: {self.status(now).message or 'no group'}"
            book.update(desired=desired)
            raise Rejected("not_ready", line)
        book.amend(asked=request.size)
        return describe.operation(book.running, now), True

    def operation(self, operation_id: str, now: float) -> OperationStatus | None:
        """An operation, running or one of the last that ended."""
        found = self._book.find(operation_id)
        return describe.operation(found, now) if found else None

    def status(self, now: float) -> GroupStatus:
        """What the group is and does."""
        missing = None if self._learning is None else self._learning.missing(self._roster, now)
        return describe.group(
            self._view(now), term=self._courier.term, missing=missing, loss=self._loss
        )

    @property
    def memory(self) -> Memory | None:
        """What to write down before anything is sent; None while there is nothing to add."""
        if self._learning is not None:
            return None
        return Memory(self._courier.term, self._book.record)

    # --- a turn ---------------------------------------------------------------------------------

    def tick(self, now: float) -> Outbox:
        """Look at everything once; returns what has to be sent."""
        away = now - self._ticked
        self._ticked = now
        if away > STOOD_STILL:
            self._roster.shift(away, now)
            self._stall.shift(away, now)
            if self._learning is not None:
                self._learning.shift(away, now)
        if self._learning is not None and self._learning.complete(self._roster, now):
            self._lead(self._learning)
        if self._learning is None:
            self._act(now)
            self._forget(now)
        self._ask_silent(now)
        outbox, self._outbox = self._outbox, Outbox()
        return outbox

    def _act(self, now: float) -> None:
        view = self._view(now)
        before = self._book.operation
        self._judge(view)
        for _ in range(TURNS):
            record = self._book.record
            if record.operation is not None:
                KINDS[record.operation.kind].advance(view)
            elif self._loss or reconcile.failed(self._book) is not None:
                pass  # a person decides
            elif self._settled(view):
                reconcile.begin_next(view)
            if self._book.record is record:
                break
        self._tell_progress(before)
        for instance in self._roster:
            if instance.report is None:
                continue
            order = self._order(self._view(now), instance)
            if order is None:
                continue
            goal = self._courier.goal(instance, order, self._book.record, now)
            if goal is not None:
                self._outbox.goals.append(goal)

    def _judge(self, view: View) -> None:
        """Notice a loss; with the policy for it, begin the recovery."""
        book = self._book
        running = book.operation
        kind = KINDS[running.kind] if running else None
        down = kind is not None and running is not None and running.phase in kind.down
        still = kind is not None and running is not None and running.phase in kind.still
        stalled = self._stall.judge(view, still)
        if down:
            self._loss = ""
            return
        gone = [loss.gone(view, member) for member in book.record.members]
        # What was found first is the cause; what is seen later may be its remains.
        found = self._loss or "; ".join(reason for reason in gone if reason) or stalled
        if not found:
            return
        if found != self._loss:
            self._say("error", f"lost: {found}", book.running.id if running else "")
        if running is not None:
            book.end("failed", view.now, found)
        if self.config.loss_policy == "none":
            self._loss = found
            return
        self._loss = ""
        book.begin("recover", "kill", view.now, to_size=book.record.desired, reason=found)

    def _settled(self, view: View) -> bool:
        """Whether it may act. A group that follows wants to be as many as are there, and waits
        until nobody came or went for a while."""
        if self.config.policy != "follow":
            return True
        there = len(view.candidates() if self._book.size else view.starters())
        there += len(view.unheard())
        if there != self._crowd[0]:
            self._crowd = (there, view.now)
        if view.now - self._crowd[1] < self.config.settle:
            return False
        size = min(max(there, self.config.min_size), self.config.max_size)
        if size != self._book.record.desired:
            self._book.update(desired=size)
        return True

    def _order(self, view: View, instance: Instance) -> Order | None:
        """What this instance should be now."""
        record = self._book.record
        member = next((one for one in record.members if one.instance == instance.name), None)
        if member is None:
            order = Order(kill=True, released=instance.leaving and view.gone(instance.name))
        else:
            spec = view.spec(member, record.members, joiner=False)
            if spec is None:
                return None
            if self._loss:
                lost = bool(loss.gone(view, member))
                order = Order(launch=None if lost else spec, kill=lost, ready=False)
            else:
                order = Order(launch=spec, ready=instance.runs(member.launch))
        running = record.operation
        if running is None:
            return order
        decided = KINDS[running.kind].order(view, instance.name, order)
        joins = any(one.instance == instance.name for one in record.joining)
        return replace(decided, released=False) if decided is not None and joins else decided

    # --- parts ----------------------------------------------------------------------------------

    def _view(self, now: float) -> View:
        return View(
            config=self.config,
            roster=self._roster,
            book=self._book,
            now=now,
            specs=self._courier.specs,
            knowing={one.name: self._courier.knows(one) for one in self._roster},
            ready=frozenset(one.name for one in self._roster if self._courier.was_ready(one)),
        )

    def _begin(self, request: TargetRequest, now: float) -> tuple[OperationStatus | None, bool]:
        limit = request.drain_timeout
        asked = reconcile.Asked(
            request.operation_id, self.config.drain_timeout if limit is None else limit
        )
        reconcile.begin_next(self._view(now), asked)
        if self._book.operation is None:
            return None, False
        self._book.amend(asked=request.size)
        self._tell_progress(None)
        return describe.operation(self._book.running, now), True

    def _known(self, request: TargetRequest, now: float) -> OperationStatus | None:
        """The operation of this id. Raises Rejected for an id used for something else."""
        if self._learning is not None:
            raise Rejected("not_ready", "the coordinator is learning who is there: ask again soon")
        known = self._book.find(request.operation_id)
        if known is None:
            return None
        asked = known.asked or known.to_size
        if request.size and asked != request.size:
            if known.ended is None:
                raise self._conflict(known)
            line = f"operation id {known.id} was used for size {asked}: use another one"
            raise Rejected("conflict", line, known.id)
        return describe.operation(known, now)

    def _conflict(self, running: OperationRecord) -> Rejected:
        line = (
            f"operation {running.id} ({running.kind.replace('_', ' ')} to {running.to_size}, phase "
            f"{running.phase}) is running: wait until it ended, then ask again"
        )
        return Rejected("conflict", line, running.id)

    def _lead(self, learning: Learning) -> None:
        """Enough is learnt: take the group over with a term of its own."""
        self._learning = None
        record = learning.record()
        if self.config.policy == "declared" and not record.desired and self.config.size:
            record = msgspec.structs.replace(record, desired=self.config.size)
        self._book = Book(record, self._new_id, self.config.history)
        self._courier.term = learning.term + 1
        size = len(record.members)
        self._say("info", f"term {self._courier.term}: {size} ranks, desired {record.desired}")

    def _new_courier(self) -> Courier:
        return Courier(self.config.deployment, 0, self._new_id(), 2 * self.config.heartbeat)

    def _learn_again(self, term: int, now: float) -> None:
        """Another coordinator was here meanwhile: all that is known may be old."""
        self._say("warning", f"term {term} was seen: this coordinator learns everything again")
        self._learning = Learning(self.config, term, now)
        self._book = Book(self._learning.record(), self._new_id, self.config.history)
        self._outbox.introduce.extend(self._roster.instances)
        self._outbox.goals.clear()
        self._roster.instances.clear()
        self._courier = self._new_courier()
        self._stall = loss.Stall(now)
        self._loss = ""

    def _forget(self, now: float) -> None:
        record = self._book.record
        inside = {one.instance for one in (*record.members, *record.joining)}
        for one in list(self._roster):
            silent = now - max(one.seen, one.probed)
            limit = 2 * self._roster.silence if one.leaving else FORGET_AFTER
            if one.name not in inside and silent > limit:
                self._roster.forget(one.name)
                self._courier.forget(one.name)
                self._asked_directly.pop(one.name, None)
                self._say("info", f"{one.name} is gone", one.name)

    def _ask_silent(self, now: float) -> None:
        """Who is silent is asked directly: its sidecar may just be away."""
        for one in self._roster:
            due = now - self._asked_directly.get(one.name, 0.0) >= PROBE_EVERY
            if self._roster.silent(one.name, now) and due:
                self._asked_directly[one.name] = now
                self._outbox.probes.append(Probe(one.name, one.facts.address, one.facts.probe_port))

    def _tell_progress(self, before: OperationRecord | None) -> None:
        """Log lines for what operations did in this turn."""
        ended = [one for one in self._book.record.history if one.ended is not None]
        told = before.id if before else ""
        for one in ended:
            if one.id == told:
                took = (one.ended or one.started) - one.started
                line = f"{_words(one)} {one.state} after {took:.1f} s"
                level: Level = "info" if one.state == "succeeded" else "error"
                self._say(level, f"{line}: {one.error}" if one.error else line, one.id)
        now = self._book.operation
        if now is not None and (before is None or (now.id, now.phase) != (before.id, before.phase)):
            reason = f" ({now.reason})" if now.reason and now.id != told else ""
            self._say("info", f"{_words(now)}: {now.phase}{reason}", now.id)

    def _say(self, level: Level, text: str, about: str = "") -> None:
        self._outbox.notes.append(Note(level, text, about))


def _words(record: OperationRecord) -> str:
    return f"{record.kind.replace('_', ' ')} {record.from_size} -> {record.to_size}"
