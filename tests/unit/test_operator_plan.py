"""What the operator does next: every phase, every branch, every rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from elasticmoe_operator.core import operation as ops
from elasticmoe_operator.core.actions import (
    ApplyCommand,
    ApplyRanks,
    DeleteRanks,
    ForgetPod,
    LabelPod,
    NudgePod,
    RestartGroup,
    ScaleRanks,
    SetTarget,
)
from elasticmoe_operator.core.due import RETRY_MAX_S, RETRY_S
from elasticmoe_operator.core.observed import Group, Observed, Problem
from elasticmoe_operator.core.operation import Ended, Operation
from elasticmoe_operator.core.plan import Plan, plan
from support.operator_world import (
    DELETED,
    NOW,
    group,
    instance,
    look,
    other_template,
    pod,
    ran,
    ranks,
    spare,
    spec,
    standby,
)

ARGUMENTS = other_template("vllm:1", ["some/model", "--seed=1"])


def op(kind: str = "ScaleUp", phase: str = "CreatePods", **changes: Any) -> Operation:
    known: dict[str, Any] = {"id": "op", "kind": kind, "phase": phase, "from_size": 3}
    known |= {"to_size": 4, "started": NOW - 10, "since": NOW - 10}
    if kind in ("Start", "Restart"):
        known["revision"] = spec().revision
    return Operation(**{**known, **changes})


def ended(result: ops.Result, kind: str = "ScaleUp", to_size: int = 4, **changes: Any) -> Ended:
    ago = changes.pop("ago", 1.0)
    return Ended(
        operation=op(kind, "Resize", to_size=to_size, **changes),
        result=result,
        at=NOW - ago,
        message="why it ended",
    )


def outcome(found: Plan) -> list[str]:
    return [one.result for one in found.ended]


def phase(found: Plan) -> str:
    return found.operation.phase if found.operation else ""


def asked(found: Plan) -> list[int]:
    return [one.size for one in found.actions if isinstance(one, SetTarget)]


def replicas(found: Plan) -> list[int]:
    return [one.replicas for one in found.actions if isinstance(one, ScaleRanks)]


def learning() -> Group:
    return group(0, state="Learning", reason="Learning", instances=())


# --- nothing to do -------------------------------------------------------------------------------


def test_a_group_as_it_should_be_is_left_alone():
    assert plan(spec(3), look(3), None) == Plan()


def test_an_operator_upgrade_plans_nothing():
    """The StatefulSet says which image its pods have; another platform image is no input here."""
    old = look(3, ranks=ranks(3, image="elasticmoe:0.1"))
    assert plan(spec(3), old, None) == Plan()


@pytest.mark.parametrize("unknown", [None, learning()], ids=["away", "learning"])
@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_begun_while_the_group_is_unknown(unknown: Group | None, size: int):
    assert plan(spec(size), look(3, group=unknown), None) == Plan()


def test_nothing_is_begun_while_the_coordinator_runs_an_operation():
    busy = group(3, operation=ran(kind="recover", phase="start", from_size=3, to_size=3))
    assert plan(spec(2), look(3, group=busy), None).operation is None


# --- the first start -----------------------------------------------------------------------------


def test_without_a_stateful_set_it_is_made():
    found = plan(spec(3), Observed(now=NOW), None)
    assert found.actions == (ApplyRanks(replicas=3),)
    assert found.operation is not None
    assert (found.operation.kind, phase(found)) == ("Start", "CreatePods")


def test_warm_standbys_are_pods_beyond_the_size():
    wanted = spec(3, scaling={"warmStandby": 2})
    assert plan(wanted, Observed(now=NOW), None).actions == (ApplyRanks(replicas=5),)


def test_a_deleted_stateful_set_is_made_again_covering_all_existing_pods():
    found = plan(spec(2), look(5, ranks=None), None)
    assert found.actions == (ApplyRanks(replicas=5),)


@pytest.mark.parametrize("phase", ["CreatePods", "Resize", "Ready", "RemovePods"])
def test_a_stateful_set_deleted_in_the_middle_of_a_resize_is_made_again(phase: str):
    kind = "ScaleDown" if phase == "RemovePods" else "ScaleUp"
    running = op(kind, phase, to_size=4)
    found = plan(spec(4), look(3, spares=1, ranks=None), running)
    assert ApplyRanks(replicas=4) in found.actions


@pytest.mark.parametrize("kind", ["Start", "Restart"])
def test_a_stateful_set_whose_application_was_lost_is_applied_again(kind: str):
    """The status said so, then the operator ended or the API refused."""
    running = op(kind, "CreatePods", from_size=0, to_size=3)
    old = None if kind == "Start" else ranks(0, spec(template=other_template()))
    found = plan(spec(3), Observed(now=NOW, ranks=old, group=group(0, desired=0)), running)
    assert found.actions == (ApplyRanks(replicas=3),)
    assert phase(found) == "CreatePods"


def test_pods_are_made_before_anybody_is_told_a_size():
    running = op("Start", from_size=0, to_size=3)
    found = plan(spec(3), Observed(now=NOW, ranks=ranks(3)), running)
    assert (found.actions, phase(found)) == ((), "CreatePods")


def test_once_the_coordinator_answers_it_is_told_the_first_size():
    running = op("Start", from_size=0, to_size=3)
    new = group(0, state="Waiting", reason="NoTarget", desired=0)
    found = plan(spec(3), Observed(now=NOW, ranks=ranks(3), group=new), running)
    assert found.actions == (SetTarget(operation_id="op", size=3),)
    assert phase(found) == "Start"


def test_a_start_takes_another_size_under_another_id_while_it_waits():
    waits = group(0, desired=3, operation=ran("op", "start", phase="wait"), state="Starting")
    running = op("Start", "Start", from_size=0, to_size=3)
    found = plan(spec(2), look(0, ranks=ranks(3), group=waits), running)
    assert found.operation is not None
    assert (found.operation.to_size, found.operation.id != "op") == (2, True)
    assert SetTarget(operation_id=found.operation.id, size=2) in found.actions


def test_a_start_that_launches_engines_is_not_disturbed_by_another_size():
    launches = group(0, desired=3, operation=ran("op", "start", phase="start"), state="Starting")
    running = op("Start", "Start", from_size=0, to_size=3)
    assert not asked(plan(spec(2), look(0, ranks=ranks(3), group=launches), running))


def test_a_start_succeeds_when_every_rank_is_ready():
    running = op("Start", "Start", from_size=0, to_size=3)
    assert outcome(plan(spec(3), look(3), running)) == ["Succeeded"]
    late = look(3, pods=(pod(0), pod(1), pod(2, ready=False)))
    assert outcome(plan(spec(3), late, running)) == []


def test_a_start_with_fewer_ranks_than_asked_for_says_how_many():
    fewer = look(2, group=group(2, desired=3, reason="TooFewInstances", message="start more"))
    found = plan(spec(3), fewer, op("Start", "Start", from_size=0, to_size=3))
    assert [(one.result, one.operation.to_size) for one in found.ended] == [("Succeeded", 2)]


def test_a_start_says_what_the_group_waits_for():
    waits = group(0, desired=3, state="Waiting", reason="BelowMinReplicas", message="1 of 3")
    found = plan(spec(3), look(0, group=waits), op("Start", "Start", from_size=0, to_size=3))
    assert found.operation is not None
    assert found.operation.message == "1 of 3"


def test_another_template_ends_a_start_that_does_not_come_up():
    waits = group(0, desired=3, state="Starting", operation=ran("op", "start", phase="wait"))
    seen = look(0, spares=3, group=waits)
    found = plan(spec(3, template=other_template()), seen, op("Start", "Start", to_size=3))
    assert outcome(found) == ["Superseded"]
    assert found.operation is not None
    assert (found.operation.kind, phase(found)) == ("Restart", "Drain")
    assert replicas(found) == [0]


def test_a_group_that_nobody_told_a_size_is_told_one():
    new = look(0, spares=3, group=group(0, spares=3, desired=0, state="Waiting", reason="NoTarget"))
    found = plan(spec(3), new, None)
    assert (found.operation.kind if found.operation else "", phase(found)) == ("Start", "Start")


# --- a scale-up ----------------------------------------------------------------------------------


def test_a_scale_up_makes_pods_first_and_tells_nobody():
    found = plan(spec(4), look(3), None)
    assert found.operation is not None
    assert (found.operation.kind, phase(found)) == ("ScaleUp", "CreatePods")
    assert found.actions == (ScaleRanks(replicas=4),)


READY = look(3, spares=1)


def joiner(**changes: Any) -> Observed:
    """Three ranks and one more, about which the coordinator says this."""
    every = (*(instance(n) for n in range(3)), standby(3, **changes))
    return replace(READY, group=group(3, instances=every))


NOT_YET: dict[str, Observed] = {
    "no pod": look(3, ranks=ranks(4)),
    "not registered": look(3, pods=READY.pods, ranks=ranks(4)),
    "silent": joiner(registered=False),
    "not warm": joiner(warm=False),
    "unfit": joiner(reason="another model"),
    "leaving": joiner(leaving=True),
    "an earlier pod": joiner(uid="older"),
    "deleting": replace(READY, pods=(*READY.pods[:3], spare(3, deleting=True))),
}


@pytest.mark.parametrize("seen", NOT_YET.values(), ids=NOT_YET)
def test_the_target_is_not_sent_before_all_joiners_are_registered_and_warm(seen: Observed):
    found = plan(spec(4), seen, op())
    assert (asked(found), phase(found)) == ([], "CreatePods")


def test_the_target_is_sent_when_all_joiners_are_registered_and_warm():
    found = plan(spec(4), READY, op())
    assert found.actions == (SetTarget(operation_id="op", size=4),)
    assert phase(found) == "Resize"


def test_the_operation_says_what_each_missing_joiner_lacks():
    seen = replace(
        look(3, ranks=ranks(6)),
        pods=(
            *READY.pods[:3],
            spare(3, problem=Problem(reason="Unschedulable", message="moe-3: no GPU")),
            spare(4),
            spare(5),
        ),
        group=group(3, instances=(*group(3).instances, standby(5, warm=False))),
    )
    found = plan(spec(6), seen, op(to_size=6))
    assert found.operation is not None
    assert found.operation.message == (
        "3 of 6 pods can serve; moe-3: no GPU; moe-4: its sidecar has not registered yet; "
        "moe-5: it is not warm yet"
    )


def test_joiners_that_are_late_withdraw_the_resize_and_the_old_size_serves():
    late = op(since=NOW - 601)
    found = plan(spec(4), look(3, ranks=ranks(4)), late)
    assert outcome(found) == ["Withdrawn"]
    assert (found.operation, asked(found), replicas(found)) == (None, [], [])
    assert found.held == "3 of 4 pods can serve"


def test_what_was_withdrawn_waits_for_its_joiners():
    history = (ended("Withdrawn"),)
    waits = plan(spec(4), look(3, ranks=ranks(4)), None, history)
    assert (waits.operation, waits.held) == (None, "why it ended")
    assert phase(plan(spec(4), READY, None, history)) == "Resize"


def test_a_lower_target_after_a_withdrawn_one_takes_the_waiting_pods_away():
    found = plan(spec(3), look(3, spares=1), None, (ended("Withdrawn"),))
    assert found == Plan(actions=(ScaleRanks(replicas=3),))


def test_another_size_before_the_target_is_sent_supersedes_it():
    found = plan(spec(5), look(3, ranks=ranks(4)), op())
    assert outcome(found) == ["Superseded"]
    assert found.operation is not None
    assert (found.operation.to_size, found.operation.id != "op") == (5, True)
    assert replicas(found) == [5]


def test_the_old_size_before_the_target_is_sent_calls_it_off():
    found = plan(spec(3), look(3, spares=1), op())
    assert (outcome(found), found.operation, asked(found)) == (["Superseded"], None, [])
    assert replicas(found) == [3]


def running(**changes: Any) -> Observed:
    """The group grows from 3 to 4."""
    busy = ran("op", from_size=3, to_size=4, **changes)
    every = (*group(3).instances, standby(3, state="joining", safe_to_delete=False))
    return replace(
        READY,
        group=group(3, desired=4, state="Resizing", operation=busy, instances=every),
    )


@pytest.mark.parametrize("size", [2, 3, 5])
def test_an_operation_that_was_sent_is_waited_for_whatever_is_asked_for(size: int):
    found = plan(spec(size), running(), op(phase="Resize"))
    assert found.operation is not None
    assert (found.operation.id, outcome(found), asked(found)) == ("op", [], [])
    assert not [one for one in replicas(found) if one < 4]


def test_nothing_is_sent_while_another_operation_runs():
    other = replace(running(), group=replace(running().group, operation=ran("own", to_size=5)))
    assert not asked(plan(spec(4), other, op(phase="Resize")))


def test_the_same_target_is_not_sent_again_while_it_is_the_coordinators():
    waits = look(3, spares=1, group=group(3, spares=1, desired=4, reason="TooFewInstances"))
    assert not asked(plan(spec(4), waits, op(phase="Resize")))


def test_a_target_that_did_not_arrive_is_sent_again_under_the_same_id():
    found = plan(spec(4), READY, op(phase="Resize"))
    assert found.actions == (SetTarget(operation_id="op", size=4),)


def test_a_resize_is_over_when_the_group_has_the_size_and_all_ranks_are_ready():
    seen = look(4, pods=(*READY.pods[:3], pod(3, ready=False)))
    found = plan(spec(4), seen, op(phase="Resize"))
    assert (phase(found), outcome(found)) == ("Ready", [])
    assert outcome(plan(spec(4), look(4), op(phase="Ready"))) == ["Succeeded"]


def test_a_resize_that_succeeded_is_over_though_a_rank_was_lost_since():
    done = ran("op", from_size=3, to_size=4, state="succeeded", phase="")
    after = group(3, desired=4, reason="TooFewInstances", history=(done,))
    found = plan(spec(2), look(3, group=after), op(phase="Resize"))
    assert outcome(found) == ["Succeeded"]
    assert asked(found) == [2]


@pytest.mark.parametrize("size", [3, 5])
def test_ready_is_not_waited_for_when_another_size_is_asked_for(size: int):
    late = look(4, pods=(*READY.pods[:3], pod(3, ready=False)))
    assert "Succeeded" in outcome(plan(spec(size), late, op(phase="Ready")))


# --- what fails ----------------------------------------------------------------------------------


def failed(**changes: Any) -> Observed:
    last = ran("op", from_size=3, to_size=4, state="failed", phase="", error="prepare failed")
    told = group(3, spares=1, desired=4, reason="ResizeFailed", history=(last,), **changes)
    return replace(READY, group=told)


def test_a_failed_resize_ends_and_is_not_sent_again_at_once():
    found = plan(spec(4), failed(), op(phase="Resize"))
    assert [(one.result, one.message) for one in found.ended] == [("Failed", "prepare failed")]
    assert (found.operation, asked(found)) == (None, [])
    assert found.held == "prepare failed; it is tried again after 30 s"


def test_a_failed_resize_ends_after_the_recovery_that_follows_it():
    mends = ran("own", "recover", phase="start", from_size=3, to_size=3)
    found = plan(spec(4), failed(operation=mends), op(phase="Resize"))
    assert (outcome(found), phase(found)) == ([], "Resize")


@pytest.mark.parametrize(
    ("attempt", "pause"), [(1, RETRY_S), (2, 2 * RETRY_S), (3, 4 * RETRY_S), (20, RETRY_MAX_S)]
)
def test_a_failed_resize_is_tried_again_with_back_off(attempt: int, pause: float):
    early = (ended("Failed", attempt=attempt, ago=pause - 1),)
    assert plan(spec(4), failed(), None, early).operation is None
    due = plan(spec(4), failed(), None, (ended("Failed", attempt=attempt, ago=pause),))
    assert due.operation is not None
    assert due.operation.attempt == attempt + 1
    assert due.operation.id != "op"
    assert asked(due) == [4]


def test_another_size_after_a_failed_one_waits_for_nothing():
    assert phase(plan(spec(5), failed(), None, (ended("Failed"),))) == "CreatePods"
    assert asked(plan(spec(2), failed(), None, (ended("Failed"),))) == [2]
    assert asked(plan(spec(3), failed(), None, (ended("Failed"),))) == [3]


def test_a_failure_of_an_attempt_of_the_coordinators_own_is_tried_again_too():
    """The operator's was withdrawn; the coordinator tried again by itself and failed."""
    found = plan(spec(4), failed(), None, (ended("Withdrawn"),))
    assert asked(found) == [4]


def withdrawn(**changes: Any) -> Observed:
    last = ran("op", from_size=3, to_size=4, state="withdrawn", phase="", error="no memory")
    told = group(3, spares=1, desired=4, reason="Postponed", message="no memory", history=(last,))
    return replace(READY, group=replace(told, **changes))


def test_the_coordinator_tries_a_withdrawn_resize_again_by_itself():
    found = plan(spec(4), withdrawn(), op(phase="Resize"))
    assert (phase(found), asked(found), outcome(found)) == ("Resize", [], [])
    assert found.operation is not None
    assert found.operation.message == "no memory"


@pytest.mark.parametrize("history", [None, ()], ids=["known", "forgotten since"])
def test_a_resize_that_is_withdrawn_for_too_long_ends(history: Any):
    seen = withdrawn() if history is None else withdrawn(history=())
    found = plan(spec(4), seen, op(phase="Resize", since=NOW - 601))
    assert [(one.result, one.message) for one in found.ended] == [("Withdrawn", "no memory")]


def test_another_size_supersedes_a_withdrawn_resize():
    found = plan(spec(2), withdrawn(), op(phase="Resize"))
    assert (outcome(found), asked(found)) == (["Superseded"], [2])


# --- a scale-down --------------------------------------------------------------------------------


def test_a_scale_down_tells_the_coordinator_and_takes_no_pod():
    found = plan(spec(2), look(4), None)
    assert found.operation is not None
    assert found.operation.kind == "ScaleDown"
    assert found.actions == (SetTarget(operation_id=found.operation.id, size=2),)


def shrunk(*safe: int) -> Observed:
    """The group has gone from 4 to 2; these are safe to delete."""
    every = [instance(0), instance(1)]
    every += [standby(n, state="retired", safe_to_delete=n in safe) for n in (2, 3)]
    return replace(look(4), group=group(2, instances=tuple(every)))


@pytest.mark.parametrize(
    ("safe", "wanted"), [((), []), ((2,), []), ((3,), [3]), ((2, 3), [2])], ids=str
)
def test_replicas_never_go_below_a_rank_that_is_not_safe_to_delete(
    safe: tuple[int, ...], wanted: list[int]
):
    found = plan(spec(2), shrunk(*safe), op("ScaleDown", "RemovePods", from_size=4, to_size=2))
    assert replicas(found) == wanted


@pytest.mark.parametrize("unknown", [None, learning()], ids=["away", "learning"])
@pytest.mark.parametrize(
    "running",
    [
        None,
        op("ScaleDown", "Resize", to_size=2),
        op("ScaleDown", "RemovePods", to_size=2),
        op("Restart", "Drain", to_size=2),
    ],
    ids=lambda one: one.phase if one else "idle",
)
def test_replicas_are_never_lowered_while_the_group_is_unknown(
    unknown: Group | None, running: Operation | None
):
    found = plan(spec(2), look(4, group=unknown), running)
    assert replicas(found) == []


def test_replicas_are_raised_while_the_group_is_unknown():
    found = plan(spec(4), look(3, group=None), op())
    assert replicas(found) == [4]


def test_a_ready_pod_that_the_coordinator_does_not_know_is_not_taken():
    """Its sidecar did not answer a coordinator that was started anew."""
    forgetful = look(4, group=group(2))
    assert replicas(plan(spec(2), forgetful, None)) == []


def test_joiners_of_a_size_that_is_desired_still_are_not_taken():
    assert replicas(plan(spec(3), withdrawn(), op(phase="Resize"))) == []


def test_a_scale_down_is_over_when_the_pods_are_gone():
    down = op("ScaleDown", "RemovePods", from_size=4, to_size=2)
    leaving = (pod(0), pod(1), spare(2, deleting=True))
    assert outcome(plan(spec(2), look(2, pods=leaving), down)) == []
    assert outcome(plan(spec(2), look(2), down)) == ["Succeeded"]


def test_another_size_does_not_wait_for_pods_that_leave():
    down = op("ScaleDown", "RemovePods", from_size=4, to_size=2)
    found = plan(spec(3), look(2, spares=1, ranks=ranks(2)), down)
    assert outcome(found) == ["Succeeded"]
    assert found.operation is not None
    assert found.operation.kind == "ScaleUp"


def test_a_warm_standby_stays_when_the_group_shrinks():
    wanted = spec(2, scaling={"warmStandby": 1})
    assert replicas(plan(wanted, shrunk(2, 3), None)) == [3]


# --- paused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize(
    "template", [None, ARGUMENTS, other_template()], ids=["same", "args", "image"]
)
def test_paused_neither_size_nor_revision_change(size: int, template: Any):
    more = {"template": template} if template else {}
    assert plan(spec(size, paused=True, **more), look(3, ranks=ranks(3)), None) == Plan()


def test_paused_a_resize_that_was_not_sent_is_not_sent():
    found = plan(spec(4, paused=True), READY, op())
    assert (outcome(found), asked(found), replicas(found)) == (["Superseded"], [], [])


def test_paused_an_operation_that_was_sent_is_waited_for():
    found = plan(spec(3, paused=True), running(), op(phase="Resize"))
    assert (phase(found), outcome(found)) == ("Resize", [])


def test_paused_labels_are_kept_up():
    seen = look(3, pods=(pod(0), pod(1), pod(2, active=False)))
    found = plan(spec(3, paused=True), seen, None)
    assert found.actions == (LabelPod(name="moe-2", uid="uid-2", active=True),)


# --- another revision ----------------------------------------------------------------------------


def test_another_image_drains_all_pods_first():
    found = plan(spec(3, template=other_template()), look(3), None)
    assert found.operation is not None
    assert (found.operation.kind, phase(found)) == ("Restart", "Drain")
    assert found.actions == (ScaleRanks(replicas=0),)


def test_new_pods_are_made_only_when_all_old_ones_are_gone():
    wanted = spec(3, template=other_template())
    drains = op("Restart", "Drain", to_size=3, revision=wanted.revision)
    leaving = look(1, ranks=ranks(0), pods=(spare(0, deleting=True),), group=group(0))
    assert plan(wanted, leaving, drains).actions == ()
    empty = look(0, ranks=ranks(0), group=group(0, desired=3, state="Waiting"))
    found = plan(wanted, empty, drains)
    assert (found.actions, phase(found)) == ((ApplyRanks(replicas=3),), "CreatePods")


def test_a_restart_starts_the_size_that_is_asked_for_by_then():
    wanted = spec(5, template=other_template())
    empty = look(0, ranks=ranks(0), group=group(0, desired=3, state="Waiting"))
    found = plan(wanted, empty, op("Restart", "Drain", to_size=3))
    assert found.operation is not None
    assert (found.operation.to_size, found.actions) == (5, (ApplyRanks(replicas=5),))


def test_a_drain_goes_on_without_its_stateful_set():
    orphans = look(3, ranks=None)
    found = plan(spec(3, template=other_template()), orphans, op("Restart", "Drain"))
    assert found.actions == (ApplyRanks(replicas=0),)


def test_a_template_is_not_applied_while_a_resize_runs():
    found = plan(spec(4, template=other_template()), running(), op(phase="Resize"))
    assert phase(found) == "Resize"
    assert not [one for one in found.actions if isinstance(one, ApplyRanks)]


def test_a_template_is_not_applied_while_the_coordinator_resizes_by_itself():
    found = plan(spec(4, template=other_template()), running(), None)
    assert found == Plan()


def test_a_template_is_applied_although_a_recovery_waits():
    waits = ran("own", "recover", phase="replace", from_size=3, to_size=3)
    down = look(0, spares=3, group=group(0, desired=3, state="Recovering", operation=waits))
    assert phase(plan(spec(3, template=other_template()), down, None)) == "Drain"


@pytest.mark.parametrize("unknown", [None, learning()], ids=["away", "learning"])
def test_a_template_waits_while_ranks_serve_unseen(unknown: Group | None):
    assert plan(spec(3, template=other_template()), look(3, group=unknown), None) == Plan()


def test_a_template_is_applied_without_a_coordinator_when_nothing_serves():
    dark = look(0, spares=3, group=None)
    assert phase(plan(spec(3, template=other_template()), dark, None)) == "Drain"


def test_pods_of_another_template_are_replaced_whatever_the_stateful_set_says():
    """It was deleted without its pods, and made again with a newer template."""
    old = look(3, pods=(pod(0), pod(1, revision="older"), pod(2)))
    assert phase(plan(spec(3), old, None)) == "Drain"


# --- the same in place ---------------------------------------------------------------------------


def told(command: str, next_command: str, nudged: str = "", **changes: Any) -> Observed:
    """Three ranks that run one command and would start with another."""
    every = tuple(
        instance(n, command=command, next_command=next_command, **changes) for n in range(3)
    )
    return look(
        3, pods=tuple(pod(n, command=nudged) for n in range(3)), group=group(3, instances=every)
    )


WANTED = spec(3, template=ARGUMENTS)
OLD, NEW = spec(3).revision, WANTED.revision


def update(phase: str = "Update", **changes: Any) -> Operation:
    return op("Restart", phase, **{"to_size": 3, "revision": NEW, **changes})


def test_other_arguments_go_to_all_pods_before_anything_is_restarted():
    found = plan(WANTED, told(OLD, OLD), None)
    assert phase(found) == "Update"
    nudges = [NudgePod(name=f"moe-{n}", uid=f"uid-{n}", command=NEW) for n in range(3)]
    assert found.actions == (ApplyCommand(), *nudges)


def test_pods_are_nudged_once():
    found = plan(WANTED, told(OLD, OLD, NEW), update())
    assert found.actions == (ApplyCommand(),)
    assert found.operation is not None
    assert found.operation.message.startswith("the new command has not come to moe-0")


def test_the_group_is_restarted_when_all_pods_have_the_command():
    found = plan(WANTED, told(OLD, NEW, NEW), update())
    assert phase(found) == "Restart"
    assert RestartGroup(operation_id="op") in found.actions


def test_arguments_that_cannot_be_end_the_restart_before_anything_happens():
    seen = told(OLD, NEW, NEW, next_command_problem="--foo: vLLM knows no such option")
    found = plan(WANTED, seen, update())
    assert [(one.result, one.message) for one in found.ended] == [
        ("Failed", "moe-0: --foo: vLLM knows no such option")
    ]
    assert not [one for one in found.actions if isinstance(one, RestartGroup)]


def test_a_refusal_of_the_arguments_before_is_not_one_of_these():
    seen = told(OLD, "refused", next_command_problem="--foo: vLLM knows no such option")
    found = plan(WANTED, seen, None)
    assert (phase(found), found.ended) == ("Update", ())
    assert ApplyCommand() in found.actions


def test_an_update_that_fails_where_it_begins_is_held_at_once():
    seen = told(OLD, NEW, next_command_problem="--foo: vLLM knows no such option")
    found = plan(WANTED, seen, None)
    assert (outcome(found), found.operation) == (["Failed"], None)
    assert found.held == "moe-0: --foo: vLLM knows no such option; it is tried again after 30 s"


def test_a_failed_update_is_tried_again_with_back_off_and_reverting_heals():
    history = (ended("Failed", "Restart", 3, revision=NEW),)
    held = plan(WANTED, told(OLD, OLD), None, history)
    assert (held.operation, held.actions) == (None, ())
    assert held.held == "why it ended; it is tried again after 30 s"
    assert plan(spec(3), told(OLD, OLD), None, history) == Plan()


def restarted(state: str, **changes: Any) -> Observed:
    last = ran("op", "restart", from_size=3, to_size=3, state=state, phase="", error="too long")
    seen = told(NEW, NEW, NEW)
    assert seen.group is not None
    return replace(seen, group=replace(seen.group, history=(last,)), **changes)


def test_what_was_restarted_is_written_down_and_over_then():
    found = plan(WANTED, restarted("succeeded"), update("Restart"))
    assert found.actions == (ApplyRanks(replicas=3, same_pods=True),)
    done = restarted("succeeded", ranks=ranks(3, WANTED))
    assert outcome(plan(WANTED, done, update("Restart"))) == ["Succeeded"]


@pytest.mark.parametrize(("state", "result"), [("failed", "Failed"), ("withdrawn", "Withdrawn")])
def test_a_restart_that_did_not_work_ends(state: str, result: str):
    assert outcome(plan(WANTED, restarted(state), update("Restart"))) == [result]


def test_arguments_that_were_taken_back_too_late_are_restarted_again():
    """The engines run what the StatefulSet does not say."""
    found = plan(spec(3), told(NEW, NEW), None)
    assert phase(found) == "Update"


def test_engines_that_do_not_take_the_command_are_not_restarted_in_a_loop():
    again = Ended(operation=update(revision=OLD), result="Succeeded", at=NOW - 1)
    found = plan(spec(3), told(NEW, NEW), None, (again,))
    assert found.operation is None
    assert found.held == (
        "pods or engines are still not of the spec's revision; it is tried again after 30 s"
    )


def exhausted(*instances: Any) -> Group:
    return replace(
        group(0), state="Failed", reason="RestartsExhausted", desired=3, instances=instances
    )


def test_a_group_that_gave_up_is_asked_to_start_with_its_new_pods():
    ready = tuple(instance(n, active=False) for n in range(3))
    seen = look(
        3, pods=tuple(spare(n) for n in range(3)), group=exhausted(*ready), ranks=ranks(3, WANTED)
    )
    starts = op("Restart", "Start", to_size=3, revision=NEW)
    found = plan(WANTED, seen, starts)
    assert [one for one in found.actions if isinstance(one, SetTarget)] == [
        SetTarget(operation_id="op", size=3)
    ]


@pytest.mark.parametrize(
    ("tried", "due"), [(NEW, "Drain"), (OLD, "")], ids=["another template", "this template"]
)
def test_a_template_that_brought_the_group_down_can_be_taken_back(tried: str, due: str):
    down = look(3, pods=tuple(spare(n) for n in range(3)), group=exhausted())
    history = (ended("Failed", "Restart", 3, revision=tried),)
    assert phase(plan(spec(3), down, None, history)) == due


def test_a_change_that_takes_new_pods_now_ends_the_update():
    wanted = spec(3, template=other_template("vllm:9"))
    found = plan(wanted, told(OLD, OLD), update())
    assert (outcome(found), phase(found)) == (["Superseded"], "Drain")


# --- labels and lost pods ------------------------------------------------------------------------


def test_only_active_ranks_are_labelled():
    seen = look(2, spares=1, pods=(pod(0), pod(1, active=False), spare(2, active=True)))
    labels = [one for one in plan(spec(2), seen, None).actions if isinstance(one, LabelPod)]
    assert labels == [
        LabelPod(name="moe-1", uid="uid-1", active=True),
        LabelPod(name="moe-2", uid="uid-2", active=False),
    ]


def test_a_label_is_only_for_the_pod_of_the_same_uid():
    newer = look(3, pods=(pod(0), pod(1), spare(2, uid="newer")))
    assert not [one for one in plan(spec(3), newer, None).actions if isinstance(one, LabelPod)]


def test_labels_stay_while_the_group_is_unknown():
    assert plan(spec(3), look(3, group=learning()), None).actions == ()


@pytest.mark.parametrize(
    "others",
    [(), (instance(1, state="lost", active=False, registered=False),)],
    ids=["not known yet", "not heard"],
)
def test_the_label_stays_on_a_ready_pod_that_the_coordinator_does_not_hear(others: Any):
    heard = group(2, instances=(instance(0), *others))
    assert plan(spec(2), look(2, group=heard), None).actions == ()
    unready = look(2, group=heard, pods=(pod(0), pod(1, ready=False)))
    assert LabelPod(name="moe-1", uid="uid-1", active=False) in plan(spec(2), unready, None).actions


@pytest.mark.parametrize("deleted", [False, True], ids=["kept", "deleted"])
@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("silent", [False, True])
def test_pods_are_forgotten_only_when_evicted_and_silent(
    evicted: bool, silent: bool, deleted: bool
):
    every = (instance(0), instance(1), instance(2, registered=not silent))
    gone = pod(2, deleting=True, evicted=evicted)
    seen = look(3, pods=(pod(0), pod(1), gone), group=group(3, instances=every))
    found = plan(spec(3, meta=DELETED if deleted else {}), seen, None)
    forgotten = [one for one in found.actions if isinstance(one, ForgetPod)]
    expected = [ForgetPod(name="moe-2", uid="uid-2")] if evicted and silent else []
    assert forgotten == expected


# --- deletion ------------------------------------------------------------------------------------


def test_a_deletion_deletes_the_stateful_set_once():
    gone = spec(3, meta=DELETED)
    assert plan(gone, look(3), op()).actions == (DeleteRanks(),)
    assert plan(gone, look(3, ranks=ranks(3, deleting=True)), None).actions == ()
    assert plan(gone, Observed(now=NOW), None).actions == ()
