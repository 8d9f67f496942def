"""The group's status out of what is known. Pure."""

from __future__ import annotations

from elasticmoe_protocol.messages import OperationKind, OperationRecord

from elasticmoe_coordinator.core.layout import redundant_experts
from elasticmoe_coordinator.core.members import Instance
from elasticmoe_coordinator.core.reconcile import failed, held_back, wanted
from elasticmoe_coordinator.core.status import (
    GroupState,
    GroupStatus,
    InstanceState,
    InstanceStatus,
    OperationStatus,
    PhaseTime,
    Reason,
)
from elasticmoe_coordinator.core.view import View

_RUNNING: dict[OperationKind, tuple[GroupState, Reason]] = {
    "start": ("Starting", "Start"),
    "scale_up": ("Resizing", "ScaleUp"),
    "scale_down": ("Resizing", "ScaleDown"),
    "restart": ("Restarting", "Restart"),
    "recover": ("Recovering", "Recover"),
}


def operation(record: OperationRecord, now: float) -> OperationStatus:
    """An operation; the running phase counts until now."""
    phases = [PhaseTime(phase=one.phase, seconds=one.seconds) for one in record.phases]
    if record.ended is None:
        since = record.started + sum(one.seconds for one in record.phases)
        phases.append(PhaseTime(phase=record.phase, seconds=max(0.0, now - since)))
    return OperationStatus(
        id=record.id,
        kind=record.kind,
        from_size=record.from_size,
        to_size=record.to_size,
        phase=record.phase,
        state=record.state,
        started=record.started,
        ended=record.ended,
        attempt=record.attempt,
        reason=record.reason,
        error=record.error,
        phases=tuple(phases),
    )


def group(view: View, *, term: int, missing: list[str] | None, loss: str) -> GroupStatus:
    """missing: whom a learning coordinator waits for, None when it has learnt."""
    book, config, record = view.book, view.config, view.book.record
    state, reason, message = _state(view, missing, loss)
    gates = [gate for gate in view.gates(record.members) if gate is not None]
    reference = view.reference()
    experts = max(0, reference.facts.num_experts) if reference else 0
    desired = set(wanted(view))
    return GroupStatus(
        deployment=config.deployment,
        state=state,
        reason=reason,
        message=message,
        term=term,
        generation=record.generation,
        policy=config.policy,
        size=book.size,
        desired=record.desired,
        min_size=config.min_size,
        max_size=config.max_size,
        num_experts=experts,
        slots_per_rank=record.slots,
        redundant_experts=redundant_experts(experts, record.slots, book.size),
        elastic=record.elastic,
        inelastic_reason=record.inelastic_reason,
        engine_epoch=next((gate.epoch for gate in gates if gate.epoch), ""),
        pause_mode=next((gate.pause_mode for gate in gates if gate.pause_mode), ""),
        model=reference.facts.model if reference else "",
        operation=operation(record.operation, view.now) if record.operation else None,
        history=tuple(operation(one, view.now) for one in record.history),
        instances=tuple(_instance(view, one, one.name in desired) for one in view.roster),
    )


def _state(view: View, missing: list[str] | None, loss: str) -> tuple[GroupState, Reason, str]:
    book = view.book
    record = book.record
    if missing is not None:
        who = f": waiting for {', '.join(missing)}" if missing else ""
        return "Learning", "Learning", f"the coordinator asks who is there{who}"
    running = record.operation
    if running is not None:
        waits = running.phase in ("wait", "replace")
        message = _too_few(view) if waits else running.error or running.reason
        state, reason = _RUNNING[running.kind]
        below = waits and _present(view) < view.config.min_size
        return state, "BelowMinReplicas" if below else reason, message
    if gave_up := failed(book):
        return "Failed", "RestartsExhausted", gave_up.error
    if loss:
        advice = "the policy for losses leaves it to a person: ask for a restart"
        return "Failed", "RankLost", f"{loss}; {advice}"
    if not book.size:
        if not record.desired:
            return "Waiting", "NoTarget", "no size was asked for yet: PUT a target"
        return "Waiting", "BelowMinReplicas", _too_few(view)
    return ("Serving", *_why_not_desired(view))


def _why_not_desired(view: View) -> tuple[Reason, str]:
    book, record = view.book, view.book.record
    last = record.history[-1] if record.history else None
    if held := held_back(book):
        again = f"ask for {record.desired} again to have it tried once more"
        return "ResizeFailed", f"{held.error}; {again}"
    silent = [name for name in book.names if view.roster.silent(name, view.now)]
    if silent:
        who = ", ".join(silent)
        return "RanksSuspect", f"nothing is heard from {who}: see whether its host and sidecar run"
    if last is not None and last.state == "withdrawn" and book.names != wanted(view):
        late = "drain timeout" in last.error
        return "DrainTimeout" if late else "Postponed", last.error
    if book.size < record.desired:
        return "TooFewInstances", _too_few(view)
    if not record.elastic:
        return "NotElastic", f"{record.inelastic_reason}; the next resize is a warm restart"
    return "AsDesired", ""


def _present(view: View) -> int:
    return len(view.starters() if view.down else view.candidates())


def _too_few(view: View) -> str:
    desired = view.book.record.desired
    there = _present(view)
    text = f"{min(there, desired)} of {desired} instances can serve"
    unfit = [(one.name, view.objection(one)) for one in view.roster if not one.leaving]
    serving = [] if view.down else view.book.names
    unfit = [(name, why) for name, why in unfit if why and name not in serving]
    if unfit:
        return f"{text}; " + "; ".join(f"{name}: {why}" for name, why in unfit[:3])
    return text if there >= desired else f"{text}: start more instances"


def _instance(view: View, one: Instance, desired: bool) -> InstanceStatus:
    record, gate, load = view.book.record, one.gate, one.load
    member = next((m for m in record.members if m.instance == one.name), None)
    joining = next((m for m in record.joining if m.instance == one.name), None)
    silent = view.roster.silent(one.name, view.now)
    state = _instance_state(view, one)
    active = state == "active"
    idle = view.gone(one.name)
    seat = member or joining
    return InstanceStatus(
        instance=one.name,
        incarnation=one.incarnation,
        ordinal=one.facts.ordinal,
        address=one.facts.address,
        rank=seat.rank if seat else None,
        state=state,
        desired=desired,
        registered=not silent,
        suspect=silent,
        standby=state == "standby",
        active=active,
        ready=active and view.was_ready(one.name),
        fenced=gate is not None and gate.fence != "open",
        fence=gate.fence if gate else "",
        retired=gate is not None and gate.retired,
        safe_to_delete=member is None and joining is None and idle,
        leaving=one.leaving,
        warm=one.report is not None and one.report.warm,
        in_flight=gate.in_flight if gate else 0,
        held=gate.held if gate else 0,
        open_connections=gate.open_connections if gate else 0,
        late_refused=gate.late_refused if gate else 0,
        hold_refused=gate.hold_refused if gate else 0,
        waiting=load.waiting,
        running=load.running,
        kv_cache=load.kv_cache,
        serving_port=one.facts.serving_port,
        probe_port=one.facts.probe_port,
        engine_version=one.facts.engine_version,
        model=one.facts.model,
        command=one.facts.command,
        next_command=one.facts.next_command,
        next_command_problem=one.facts.next_problem,
        reason=_reason(view, one, member is not None),
    )


def _instance_state(view: View, one: Instance) -> InstanceState:
    record, phase = view.book.record, one.engine.phase
    member = next((m for m in record.members if m.instance == one.name), None)
    running = record.operation
    if phase == "exited":
        return "exited"
    if member is not None:
        if view.roster.silent(one.name, view.now) and view.unreachable(one.name):
            return "lost"
        if phase == "running":
            down = running is not None and running.kind == "scale_down"
            leaves = down and running is not None and member.rank >= running.to_size
            return "leaving" if leaves else "active"
        return "starting" if phase in ("starting", "absent") else "stopping"
    if any(m.instance == one.name for m in record.joining):
        if running is not None and running.kind == "scale_down":
            return "retired"
        return "joining" if phase in ("starting", "running") else "standby"
    if view.roster.silent(one.name, view.now):
        return "lost"
    return "standby" if phase == "absent" else "stopping"


def _reason(view: View, one: Instance, member: bool) -> str:
    if view.roster.silent(one.name, view.now):
        return f"nothing was heard from it for {view.now - one.seen:.0f} s"
    if one.engine.phase == "exited" and one.engine.exit is not None:
        return one.engine.exit.reason
    if one.report is not None and one.report.error:
        return one.report.error
    return "" if member else view.objection(one)
