"""Prepare and commit: every old rank is told once, then the engines are watched. For up and down.

vLLM 0.33 (measured): a failed prepare leaves the old ranks serving but inelastic; a joiner that
hangs half-way kills them after 300 s; a failed commit leaves a topology that nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from elasticmoe_protocol.messages import GateReport, Member, ScaleOrder, ScaleOutcome

from elasticmoe_coordinator.core.operations import restart
from elasticmoe_coordinator.core.view import Order, View

State = Literal["going", "done", "refused", "prepare_failed", "commit_failed", "late"]
ENGINE_LIMIT = 300
"""Seconds that vLLM gives a prepare; its own drain limit has to end before."""
ENGINE_COMMIT_LIMIT = 600
"""Seconds that vLLM gives a commit."""


def participants(view: View) -> tuple[Member, ...]:
    """Who has to know of the operation before anything is sent: all old ranks and the joiners."""
    return view.book.record.members + view.book.record.joining


def committing(view: View) -> bool:
    """Whether the engines have begun to commit."""
    gates = view.gates(view.book.record.members)
    return view.book.running.phase == "commit" or any(_committing(gate) for gate in gates)


def judge(view: View) -> tuple[State, str]:
    """How the resize stands, and the first error that an engine gave.

    A failure is judged by what all ranks say in the end: one that failed in commit keeps its gate
    shut for ever, but the first that is heard of it may have been asked a moment before.
    """
    operation = view.book.running
    gates = view.gates(view.book.record.members)
    outcomes = [_outcome(gate, operation.id) for gate in gates]
    ended = [one for one in outcomes if one is not None and one.state != "running"]
    failed = next((one for one in ended if one.state == "failed"), None)
    succeeded = any(one.state == "succeeded" for one in ended)
    in_commit = committing(view)
    limit = view.config.commit_limit if in_commit else view.config.prepare_limit
    if failed is None and len(ended) == len(gates):
        return "done", ""
    if failed is not None:
        error = f"the engines refused with status {failed.status}: {failed.error}"
        if in_commit or succeeded:
            return "commit_failed", error
        if len(ended) == len(gates):
            return ("refused" if failed.status == 400 else "prepare_failed"), error
    phase_error = next((g.phase_error for g in gates if g and g.phase == "failed"), None)
    if phase_error is not None and in_commit:
        return "commit_failed", f"the engines gave up: {phase_error or 'no reason given'}"
    if view.waited() > limit and not (in_commit and _only_unheard(view, outcomes)):
        return ("commit_failed" if in_commit else "late"), f"not done after {limit:g} s"
    return "going", ""


def advance(view: View) -> bool:
    """One turn in `prepare` or `commit`; True when all old ranks are done."""
    book = view.book
    operation = book.running
    gates = view.gates(book.record.members)
    if any(gate and gate.scale and gate.scale.operation == operation.id for gate in gates):
        book.told = operation.id  # by the coordinator before this one, if it was not this one
    if operation.phase == "prepare" and book.told != operation.id:
        names = [one.instance for one in participants(view)]
        if view.all_know(names):
            book.told = operation.id
        elif view.waited() > view.config.prepare_limit:
            error = "not every rank could be told in time"
            if book.not_sent:
                book.end("withdrawn", view.now, error)
            else:
                restart_old(view, error)
        return False
    if operation.phase == "prepare" and any(_committing(gate) for gate in gates):
        book.enter("commit", view.now)
    state, error = judge(view)
    if state == "done":
        return True
    if state == "refused":
        book.end("failed", view.now, error)
    elif state == "prepare_failed":
        book.update(elastic=False, inelastic_reason=f"a resize failed in prepare: {error}")
        book.end("failed", view.now, error)
    elif state == "late":
        restart_old(view, error)
    elif state == "commit_failed":
        commit_failed(view, error)
    return False


def commit_failed(view: View, error: str) -> None:
    """Nobody knows the topology any more: all engines are started anew."""
    book = view.book
    book.give_up(view.now, error, f"failed in commit: {error}")


def restart_old(view: View, error: str) -> None:
    """Before the engines die of a prepare that hangs, who stays in any case is restarted."""
    book = view.book
    stay = book.names[: book.running.to_size]
    spent = view.waited()
    # Until they were restarted they take no other resize, and the drain may last too long for that.
    book.update(elastic=False, inelastic_reason=f"a resize did not end in prepare: {error}")
    book.end("failed", view.now, error)
    restart.begin(
        book,
        view.now,
        stay,
        f"prepare did not end ({error}): vLLM's engines would die of it",
        drain_timeout=max(1, int(ENGINE_LIMIT - 20 - spent)),
    )
    book.amend(urgent=True)


def order(view: View, name: str, order: Order) -> Order:
    """Old ranks get the resize once everybody knows of it."""
    operation = view.book.running
    order = replace(order, watch=True)
    if name not in view.book.names or view.book.told != operation.id:
        return order
    scale = ScaleOrder(
        operation=operation.id,
        target=operation.to_size,
        drain_timeout_s=max(1, min(operation.drain_timeout_s, 60)),
    )
    return replace(order, scale=scale)


def _only_unheard(view: View, outcomes: Sequence[ScaleOutcome | None]) -> bool:
    """Who is not known to be done has a sidecar that is away, and no engine known to be gone.

    A commit is one step of all ranks: the outcome is there when the sidecar is back.
    """
    pairs = zip(view.book.record.members, outcomes, strict=True)
    unfinished = [one.instance for one, found in pairs if not found or found.state == "running"]
    return view.waited() <= ENGINE_COMMIT_LIMIT and all(
        view.roster.get(name) is None or (view.fresh(name) is None and not view.unreachable(name))
        for name in unfinished
    )


def _outcome(gate: GateReport | None, operation: str) -> ScaleOutcome | None:
    if gate is None or gate.scale is None or gate.scale.operation != operation:
        return None
    return gate.scale


def _committing(gate: GateReport | None) -> bool:
    return gate is not None and (gate.scaling or gate.phase == "committing")
