"""What an ElasticMoEDeployment's status says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from elasticmoe_operator.core import conditions, status
from elasticmoe_operator.core import operation as ops
from elasticmoe_operator.core.conditions import Condition
from elasticmoe_operator.core.observed import Observed, Problem, pod_problem
from elasticmoe_operator.core.operation import Ended, Operation
from elasticmoe_operator.core.plan import Plan
from elasticmoe_operator.core.spec import Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operator_world import (
    DELETED,
    NOW,
    group,
    instance,
    look,
    merged,
    pod,
    ran,
    spare,
    spec,
    standby,
)

CRD = Path(__file__).parents[2] / "charts/elasticmoe/files/crd.yaml"
UP = Operation(
    id="op",
    kind="ScaleUp",
    from_size=3,
    to_size=4,
    phase="CreatePods",
    started=NOW - 5,
    since=NOW - 5,
    message="3 of 4 pods can serve",
)


def said(kind: str, one: Spec, seen: Observed, plan: Plan | None = None) -> Condition:
    every = conditions.conditions(one, seen, plan or Plan())
    return next(found for found in every if found.type == kind)


def built(
    one: Spec | None = None, seen: Observed | None = None, plan: Plan | None = None, **before: Any
) -> dict[str, Any]:
    return status.build(one or spec(3), seen or look(3), plan or Plan(), before)


# --- conditions ----------------------------------------------------------------------------------

NOT_READY = look(3, pods=(pod(0), pod(1, ready=False), pod(2, ready=False)))
NOTHING = Observed(now=NOW)
GONE = spec(3, meta=DELETED)

AVAILABLE = {
    "MinimumRanksReady": (spec(3), look(3), "True"),
    "NotStarted": (spec(3), NOTHING, "False"),
    "TooFewReady": (spec(3), NOT_READY, "False"),
    "Deleting": (GONE, NOT_READY, "False"),
}


@pytest.mark.parametrize("reason", AVAILABLE)
def test_available(reason: str):
    one, seen, expected = AVAILABLE[reason]
    found = said("Available", one, seen)
    assert (found.status, found.reason) == (expected, reason)


def test_available_while_at_least_the_smallest_size_is_ready():
    two = look(3, pods=(pod(0), pod(1), pod(2, ready=False)))
    assert said("Available", spec(3), two).status == "True"
    assert said("Available", GONE, look(3)).status == "True"


def own(kind: str, **changes: Any) -> Observed:
    return look(3, group=group(3, operation=ran("own", kind, **changes)))


SHORT = look(3, group=group(3, desired=4, reason="TooFewInstances", message="start more"))
PROGRESSING: dict[str, tuple[Spec, Observed, Plan, str, str]] = {
    "AsDesired": (spec(3), look(3), Plan(), "False", ""),
    "ScalingUp": (spec(4), look(3), Plan(operation=UP), "True", "3 -> 4 (CreatePods): 3 of 4"),
    "ScalingDown": (
        spec(2),
        look(3),
        Plan(operation=replace(UP, kind="ScaleDown", to_size=2, attempt=2, message="")),
        "True",
        "3 -> 2 (CreatePods, attempt 2)",
    ),
    "Starting": (spec(3), look(3), Plan(operation=replace(UP, kind="Start")), "True", "starting 4"),
    "Restarting": (
        spec(3),
        look(3),
        Plan(operation=replace(UP, kind="Restart", phase="Drain")),
        "True",
        "a new template: new pods",
    ),
    "Recovering": (spec(3), own("recover", reason="lost"), Plan(), "True", "2 -> 3: lost"),
    "Paused": (spec(4, paused=True), look(3), Plan(), "False", "spec.paused"),
    "Blocked": (spec(4), SHORT, Plan(), "False", "start more"),
    "SizeLimited": (spec(9), look(6), Plan(), "False", "replicas is 9, maxReplicas is 6"),
    "Deleting": (GONE, look(3), Plan(), "True", "leave"),
}


@pytest.mark.parametrize("reason", PROGRESSING)
def test_progressing(reason: str):
    one, seen, plan, expected, line = PROGRESSING[reason]
    found = said("Progressing", one, seen, plan)
    assert (found.status, found.reason) == (expected, reason)
    assert line in found.message


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("start", "Starting"),
        ("scale_up", "ScalingUp"),
        ("scale_down", "ScalingDown"),
        ("restart", "Restarting"),
        ("recover", "Recovering"),
    ],
)
def test_operations_of_the_group_progress_too(kind: str, reason: str):
    assert said("Progressing", spec(3), own(kind)).reason == reason


def test_an_update_in_place_says_so():
    running = replace(UP, kind="Restart", phase="Update")
    assert conditions.words(running).startswith("a new template: in place (Update)")


def test_what_is_held_is_blocked_and_degraded():
    held = Plan(held="no GPU; it is tried again")
    assert said("Progressing", spec(4), look(3), held).reason == "Blocked"
    found = said("Degraded", spec(4), look(3), held)
    assert (found.status, found.reason, found.message) == ("True", "JoinersNotReady", held.held)


STUCK = spare(3, problem=Problem(reason="Unschedulable", message="moe-3: no GPU"))
DEGRADED: dict[str, tuple[Observed, Plan]] = {
    "Healthy": (look(3), Plan()),
    "Unschedulable": (look(3, pods=(*look(3).pods, STUCK)), Plan()),
    "ResizeFailed": (
        look(3, group=group(3, desired=4, reason="ResizeFailed")),
        Plan(held="prepare failed"),
    ),
    "NotElastic": (look(3, group=group(3, reason="NotElastic", message="m")), Plan()),
    "RankLost": (look(3, group=group(3, state="Failed", reason="RankLost")), Plan()),
    "Recover": (look(3, group=group(3, state="Recovering", reason="Recover")), Plan()),
    "CoordinatorUnavailable": (look(3, group=None, group_error="no answer"), Plan()),
}


@pytest.mark.parametrize("reason", DEGRADED)
def test_degraded(reason: str):
    seen, plan = DEGRADED[reason]
    found = said("Degraded", spec(3), seen, plan)
    assert (found.status, found.reason) == ("False" if reason == "Healthy" else "True", reason)


def test_a_coordinator_that_cannot_be_made_is_degraded():
    quota = Problem(reason="FailedCreate", message="exceeded quota")
    found = said("Degraded", spec(3), look(3, coordinator_problem=quota))
    assert (found.reason, found.message) == ("CoordinatorUnavailable", "exceeded quota")


def test_a_pod_that_leaves_is_no_problem():
    leaving = replace(STUCK, deleting=True)
    assert said("Degraded", spec(3), look(3, pods=(*look(3).pods, leaving))).status == "False"


def test_nothing_is_degraded_while_it_is_deleted():
    assert said("Degraded", GONE, look(3, pods=(STUCK,))).status == "False"


WAITING = {
    "CrashLoopBackOff": "ContainerFailing",
    "ErrImagePull": "ImagePull",
    "ImagePullBackOff": "ImagePull",
    "InvalidImageName": "ImagePull",
    "CreateContainerConfigError": "CreateContainerConfigError",
}


@pytest.mark.parametrize(("waiting", "reason"), WAITING.items())
def test_why_a_container_waits(waiting: str, reason: str):
    state = {"waiting": {"reason": waiting, "message": "because"}}
    found = pod_problem("moe-1", {"containerStatuses": [{"name": "engine", "state": state}]})
    assert found is not None
    assert found.reason == reason
    assert found.message == f"moe-1: container engine: {waiting}: because"


def test_a_container_that_crashes_says_its_last_line_or_where_to_look():
    crashed: dict[str, Any] = {
        "name": "engine",
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 2, "message": "long\nno such model\n"}},
    }
    found = pod_problem("moe-1", {"containerStatuses": [crashed]})
    assert found is not None
    assert found.message.endswith("it ended with status 2: no such model")
    crashed["lastState"]["terminated"]["message"] = ""
    found = pod_problem("moe-1", {"initContainerStatuses": [crashed]})
    assert found is not None
    assert found.message.endswith("see `kubectl logs moe-1 -c engine`")


def test_a_pod_that_failed_or_finds_no_node_says_why():
    failed = pod_problem("moe-1", {"phase": "Failed", "reason": "Evicted"})
    assert failed == Problem(reason="PodFailed", message="moe-1: Evicted")
    stuck = [{"type": "PodScheduled", "reason": "Unschedulable", "message": "no GPU"}]
    assert pod_problem("moe-1", {"conditions": stuck}) == Problem(
        reason="Unschedulable", message="moe-1: no GPU"
    )
    assert pod_problem("moe-1", {"phase": "Pending"}) is None


def test_all_three_conditions_are_always_there():
    for seen in (NOTHING, look(3), SHORT):
        found = [one.type for one in conditions.conditions(spec(3), seen, Plan())]
        assert found == list(get_args(conditions.Type))
    assert [one.type for one in conditions.invalid("x")] == list(get_args(conditions.Type))


# --- times ---------------------------------------------------------------------------------------


def test_a_transition_time_stays_while_the_status_is_the_same():
    first = built()
    later = replace(NOT_READY, now=NOW + 60)
    second = built(seen=later, **first)
    times = [
        {one["type"]: one["lastTransitionTime"] for one in each["conditions"]}
        for each in (first, second)
    ]
    assert times[0]["Progressing"] == times[1]["Progressing"] == ops.time_text(NOW)
    assert times[1]["Available"] == ops.time_text(NOW + 60)
    reasons = {one["type"]: one["reason"] for one in second["conditions"]}
    assert reasons["Available"] == "TooFewReady"


def test_another_reason_alone_is_no_transition():
    first = built()
    second = built(spec(3, paused=True), look(3, now=NOW + 60), **first)
    (found,) = [one for one in second["conditions"] if one["type"] == "Progressing"]
    assert (found["reason"], found["lastTransitionTime"]) == ("Paused", ops.time_text(NOW))


def test_every_condition_and_the_status_say_which_generation_they_speak_of():
    found = built(spec(3, meta={"generation": 7}))
    assert found["observedGeneration"] == 7
    assert [one["observedGeneration"] for one in found["conditions"]] == [7, 7, 7]


def test_nothing_changes_while_nothing_changes():
    first = built()
    second = built(seen=look(3, now=NOW + 60), **first)
    assert status.difference(first, second) == {}


# --- widths --------------------------------------------------------------------------------------


def test_widths_side_by_side():
    every = (*group(3).instances, standby(3), instance(4, registered=False))
    seen = look(3, spares=3, group=group(3, instances=every))
    found = built(spec(5), seen)
    assert {key: value for key, value in found.items() if key.endswith("eplicas")} == {
        "desiredReplicas": 5,
        "createdReplicas": 6,
        "registeredReplicas": 4,
        "standbyReplicas": 1,
        "readyReplicas": 3,
        "replicas": 3,
    }


@pytest.mark.parametrize(
    "unknown", [None, group(0, state="Learning", reason="Learning")], ids=["away", "learning"]
)
def test_replicas_stay_while_the_group_is_unknown(unknown: Any):
    found = built(seen=look(3, group=unknown), replicas=3, elastic=True)
    assert found["replicas"] == 3
    assert "elastic" not in found


def test_the_selector_counts_active_ranks_only():
    assert status.initial(spec(3))["selector"].endswith("elasticmoe.io/active=true")
    assert status.initial(spec(3))["replicas"] == 0


def test_the_message_is_what_is_wrong_or_else_what_goes_on():
    assert built(plan=Plan(operation=UP))["message"] == "3 -> 4 (CreatePods): 3 of 4 pods can serve"
    assert built(plan=Plan(held="why"))["message"] == "why"
    assert built()["message"] == ""


def test_an_invalid_spec_leaves_all_else_as_it_was():
    before = built()
    found = {**before, **status.invalid(8, "minReplicas 1", NOW + 9, before)}
    changed = {"observedGeneration", "conditions", "message"}
    assert {key for key in found if found[key] != before.get(key)} == changed
    assert {one["reason"] for one in found["conditions"]} == {"InvalidSpec"}


# --- operations ----------------------------------------------------------------------------------

line = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
at = st.floats(0, 4e9).map(lambda value: round(value, 3))
spent = st.floats(0, 1e6).map(lambda value: round(value, 3))
operations = st.builds(
    Operation,
    id=line,
    kind=st.sampled_from(get_args(ops.Kind)),
    from_size=st.integers(0, 1024),
    to_size=st.integers(0, 1024),
    phase=st.sampled_from(get_args(ops.Phase)),
    started=at,
    since=at,
    attempt=st.integers(1, 99),
    message=line,
    revision=line,
    phases=st.lists(st.tuples(st.sampled_from(get_args(ops.Phase)), spent), max_size=6).map(tuple),
)
endings = st.builds(
    Ended,
    operation=operations,
    result=st.sampled_from(get_args(ops.Result)),
    at=at,
    message=line,
)


@settings(deadline=None)
@given(operations)
def test_an_operation_comes_back_out_of_the_status(operation: Operation):
    found = ops.from_status(json.loads(json.dumps(ops.to_status(operation))))
    near = {"started": pytest.approx(operation.started), "since": pytest.approx(operation.since)}
    assert {**vars(found)} == {**vars(operation), **near}


@settings(deadline=None)
@given(endings)
def test_what_a_retry_depends_on_comes_back_out_of_the_history(ended: Ended):
    found = ops.ended_from_status(json.loads(json.dumps(ops.ended_to_status(ended))))
    assert (found.result, found.message) == (ended.result, ended.message)
    assert found.at == pytest.approx(ended.at)
    for name in ("id", "kind", "from_size", "to_size", "attempt", "revision", "phases"):
        assert getattr(found.operation, name) == getattr(ended.operation, name)


@settings(deadline=None)
@given(st.lists(endings, max_size=4), st.integers(0, 9))
def test_the_history_has_the_last_five(fresh: list[Ended], known: int):
    before = [ops.ended_to_status(UP.end("Succeeded", NOW + n)) for n in range(min(known, 5))]
    found = built(plan=Plan(ended=tuple(fresh)), history=before)["history"]
    every = [*before, *(ops.ended_to_status(one) for one in fresh)]
    assert found == every[-5:]


def test_only_the_operators_own_operation_is_read_back():
    mine = built(plan=Plan(operation=UP), seen=own("scale_up", phase="commit"))
    assert mine["operation"]["groupPhase"] == "commit"
    assert status.read_operation(mine) == UP
    theirs = built(seen=own("recover", phase="start"))
    assert theirs["operation"]["kind"] == "RecoverByGroup"
    assert status.read_operation(theirs) is None
    assert status.read_operation(built()) is None


def test_phases_are_timed():
    later = UP.enter("Resize", NOW).enter("Ready", NOW + 12.5)
    assert later.phases == (("CreatePods", 5.0), ("Resize", 12.5))
    ended = later.end("Succeeded", NOW + 13)
    assert ended.operation.phases[-1] == ("Ready", 0.5)
    assert conditions.result_words(ended) == (
        "ScaleUp 3 -> 4 succeeded after 18.0 s (CreatePods 5.0, Resize 12.5, Ready 0.5)"
    )


# --- difference ----------------------------------------------------------------------------------

leaf = st.one_of(st.integers(0, 3), st.booleans(), st.sampled_from(["", "x"]))
value = st.one_of(
    leaf,
    st.lists(leaf, max_size=3),
    st.dictionaries(st.sampled_from("abc"), st.one_of(leaf, st.lists(leaf, max_size=2))),
)
statuses = st.dictionaries(st.sampled_from("uvwxyz"), value)


@settings(deadline=None)
@given(statuses, statuses, st.sets(st.sampled_from("uvwxyz")))
def test_the_difference_is_a_merge_patch_that_makes_the_one_out_of_the_other(
    before: dict[str, Any], after: dict[str, Any], none: set[str]
):
    wanted = {**after, **dict.fromkeys(none)}
    patch = status.difference(before, wanted)
    expected = {key: one for key, one in {**before, **wanted}.items() if one is not None}
    assert merged(before, json.loads(json.dumps(patch))) == expected
    assert set(patch) == {key for key in wanted if wanted[key] != before.get(key)}


# --- the CRD -------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    (version,) = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["status"]
    return found


TYPES = {
    "string": str,
    "integer": int,
    "boolean": bool,
    "number": (int, float),
    "array": list,
    "object": dict,
}


def misfits(given: Any, known: dict[str, Any], where: str = "status") -> list[str]:
    """Where a value is not as a structural schema says."""
    if given is None:
        return []  # in a merge patch: it is removed
    if not isinstance(given, TYPES[known["type"]]):  # type: ignore[arg-type]
        return [f"{where}: {given!r} is no {known['type']}"]
    found = []
    if isinstance(given, dict):
        fields = known.get("properties", {})
        found += [f"{where}.{one}: unknown" for one in given if one not in fields]
        found += [
            f"{where}.{one}: missing" for one in known.get("required", ()) if one not in given
        ]
        for name in given.keys() & fields.keys():
            found += misfits(given[name], fields[name], f"{where}.{name}")
    elif isinstance(given, list):
        if len(given) > known.get("maxItems", len(given)):
            found.append(f"{where}: too many")
        for number, one in enumerate(given):
            found += misfits(one, known["items"], f"{where}[{number}]")
    elif given not in known.get("enum", [given]):
        found.append(f"{where}: {given!r}")
    elif isinstance(given, str) and len(given) < known.get("minLength", 0):
        found.append(f"{where}: too short")
    return found


EXAMPLES = {
    "initial": status.initial(spec(3)),
    "as desired": built(),
    "growing": built(plan=Plan(operation=UP.enter("Resize", NOW)), seen=own("scale_up")),
    "recovering": built(seen=own("recover", reason="lost")),
    "ended": built(plan=Plan(ended=(UP.enter("Resize", NOW).end("Failed", NOW, "m"),) * 3)),
    "unknown": built(seen=NOTHING),
    "invalid": status.invalid(1, "m", NOW, {}),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_status_fits_the_crd(name: str):
    assert misfits(EXAMPLES[name], schema()) == []


def test_the_check_finds_what_does_not_fit():
    bad = {"replicas": "3", "foo": 1, "conditions": [{"type": "X"}]}
    assert len(misfits(bad, schema())) >= 3
