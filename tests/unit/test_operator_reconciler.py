"""One look after another at one deployment, against APIs that keep what they are told."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from elasticmoe_operator.builders.common import Platform
from elasticmoe_operator.reconciler import Children, Look, Reconciler
from elasticmoe_operator.settings import Settings
from support.operator_apis import Cluster, Coordinator
from support.operator_world import (
    DELETED,
    body,
    group,
    look,
    other_template,
    ran,
    ranks,
    spare,
    spec,
)

SETTINGS = Settings(platform=Platform(image="elasticmoe:1", namespace="operators"))


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def operator(cluster: Cluster) -> Reconciler:
    return Reconciler(
        cluster,  # type: ignore[arg-type]
        Coordinator(cluster),  # type: ignore[arg-type]
        SETTINGS,
        lambda: cluster.children,
        lambda: cluster.now,
    )


def current(cluster: Cluster, replicas: int = 3, **changes: Any) -> dict[str, Any]:
    return {**body(replicas, **changes), "status": copy.deepcopy(cluster.status)}


async def settled(cluster: Cluster) -> Reconciler:
    """An operator that has said all there is to say."""
    found = operator(cluster)
    for _ in range(2):
        await found.look(current(cluster))
    cluster.calls.clear()
    return found


def joiner_ready(cluster: Cluster) -> None:
    cluster.group = group(3, spares=1)
    cluster.children = Children(ranks=ranks(4), pods=look(3, spares=1).pods)


def reasons(found: Look) -> list[str]:
    return [one.reason for one in found.events]


# --- the status ----------------------------------------------------------------------------------


async def test_the_scale_subresource_works_before_anything_else_is_done():
    cluster = Cluster()
    cluster.children = Children()
    await operator(cluster).look(current(cluster))
    assert cluster.verbs[0] == "merge status"
    first = cluster.calls[0][2]["status"]
    assert first["replicas"] == 0
    assert first["selector"] == "elasticmoe.io/deployment=moe,elasticmoe.io/active=true"


async def test_the_intent_is_written_before_it_is_acted_on(cluster: Cluster):
    found = await settled(cluster)
    joiner_ready(cluster)
    await found.look(current(cluster, 4))
    assert cluster.verbs[-2:] == ["merge status", "put target"]
    written = cluster.status["operation"]
    assert cluster.told("put", "target") == [(written["id"], 4)]


@pytest.mark.parametrize("size", [2, 4])
async def test_nothing_is_done_when_the_status_could_not_be_written(cluster: Cluster, size: int):
    found = await settled(cluster)
    cluster.refuses = {"status"}
    await found.look(current(cluster, size))
    assert cluster.verbs == ["get group", "merge status"]
    cluster.refuses = set()
    await found.look(current(cluster, size))
    assert cluster.status["operation"]["to"] == size


async def test_a_new_operator_goes_on_with_the_operation_of_the_status(cluster: Cluster):
    await (await settled(cluster)).look(current(cluster, 4))
    id = cluster.status["operation"]["id"]
    joiner_ready(cluster)
    cluster.now += 100
    await operator(cluster).look(current(cluster, 4))
    assert cluster.told("put", "target") == [(id, 4)]


async def test_nothing_is_written_when_nothing_changed(cluster: Cluster):
    found = await settled(cluster)
    cluster.now += 60
    result = await found.look(current(cluster))
    assert cluster.verbs == ["get group"]
    assert (result.events, result.pause) == ([], SETTINGS.calm)


async def test_only_what_changed_is_written(cluster: Cluster):
    found = await settled(cluster)
    assert cluster.group is not None
    cluster.group = replace(cluster.group, generation=2)
    await found.look(current(cluster))
    assert cluster.told("merge", "status") == [{"status": {"engineGeneration": 2}}]


async def test_a_group_that_changes_is_looked_at_soon(cluster: Cluster):
    found = await settled(cluster)
    assert (await found.look(current(cluster, 4))).pause == SETTINGS.busy
    cluster.group = None
    assert (await found.look(current(cluster, 3))).pause == SETTINGS.busy


async def test_the_coordinator_is_not_asked_before_there_is_one():
    cluster = Cluster()
    cluster.children = Children()
    await operator(cluster).look(current(cluster))
    assert "get group" not in cluster.verbs
    assert cluster.verbs[-1] == "apply StatefulSet"


# --- events --------------------------------------------------------------------------------------


async def test_events_tell_what_changed_and_only_once(cluster: Cluster):
    found = await settled(cluster)
    assert reasons(await found.look(current(cluster, 4))) == ["ScaleUpBegan"]
    assert reasons(await found.look(current(cluster, 4))) == []


async def test_an_event_is_told_also_when_the_action_after_it_fails(cluster: Cluster):
    found = await settled(cluster)
    cluster.refuses = {"target"}
    assert reasons(await found.look(current(cluster, 2))) == ["ScaleDownBegan"]
    assert reasons(await found.look(current(cluster, 2))) == []


async def test_an_operation_that_ended_is_told_with_its_times(cluster: Cluster):
    found = await settled(cluster)
    await found.look(current(cluster, 4))
    cluster.now += 7
    cluster.group = group(4)
    seen = look(4)
    cluster.children = Children(ranks=seen.ranks, pods=seen.pods)
    (event,) = (await found.look(current(cluster, 4))).events
    assert (event.reason, event.warning) == ("ScaleUpSucceeded", False)
    assert event.message.startswith("ScaleUp 3 -> 4 succeeded after 7.0 s (CreatePods 7.0")


async def test_a_failure_is_a_warning(cluster: Cluster):
    found = await settled(cluster)
    joiner_ready(cluster)
    await found.look(current(cluster, 4))
    last = ran(
        cluster.status["operation"]["id"], to_size=4, state="failed", phase="", error="no peer"
    )
    cluster.group = group(3, spares=1, desired=4, reason="ResizeFailed", history=(last,))
    result = await found.look(current(cluster, 4))
    assert [(one.reason, one.warning) for one in result.events] == [
        ("ScaleUpFailed", True),
        ("ResizeFailed", True),
    ]


async def test_a_condition_that_turns_is_told_in_both_directions(cluster: Cluster):
    found = await settled(cluster)
    cluster.children = replace(cluster.children, pods=(spare(0), spare(1), spare(2)))
    down = await found.look(current(cluster))
    assert ("TooFewReady", True) in [(one.reason, one.warning) for one in down.events]
    cluster.children = replace(cluster.children, pods=look(3).pods)
    up = await found.look(current(cluster))
    assert ("MinimumRanksReady", False) in [(one.reason, one.warning) for one in up.events]


async def test_a_limited_size_is_said_once():
    cluster = Cluster(6)
    found = operator(cluster)
    await found.look(current(cluster, 6))
    assert reasons(await found.look(current(cluster, 9))) == ["SizeLimited"]
    assert reasons(await found.look(current(cluster, 9))) == []


async def test_replaced_probes_are_said_when_the_pods_are_made():
    cluster = Cluster()
    cluster.children = Children()
    engine = {"name": "engine", "image": "v", "args": ["m"], "livenessProbe": {"exec": {}}}
    given = {"spec": {"containers": [engine]}}
    result = await operator(cluster).look(current(cluster, template=given))
    assert "ProbesReplaced" in reasons(result)


# --- errors --------------------------------------------------------------------------------------


async def test_errors_back_off_and_are_forgotten(cluster: Cluster):
    found = await settled(cluster)
    cluster.refuses = {"target"}
    pauses = [(await found.look(current(cluster, 2))).pause for _ in range(8)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[1], pauses[-1]) == (1.0, 2.0, SETTINGS.calm)
    cluster.refuses = set()
    assert (await found.look(current(cluster, 2))).pause == SETTINGS.busy


async def test_a_coordinator_that_does_not_answer_is_no_error(cluster: Cluster):
    found = await settled(cluster)
    cluster.group = None
    assert (await found.look(current(cluster))).pause == SETTINGS.busy
    degraded = cluster.status["conditions"][2]
    assert (degraded["reason"], degraded["message"]) == (
        "CoordinatorUnavailable",
        "it does not answer",
    )
    assert cluster.status["replicas"] == 3


async def test_a_child_that_is_gone_is_made_again(cluster: Cluster):
    found = await settled(cluster)
    found.forget("Service", "moe")
    await found.look(current(cluster))
    assert cluster.verbs == ["get group", "apply Service"]


@pytest.mark.parametrize(
    ("template", "applied"),
    [
        (other_template(image="vllm:1", args=["some/model", "--seed", "1"]), []),
        (other_template(image="vllm:2"), ["apply Deployment"]),
    ],
    ids=["arguments", "image"],
)
async def test_a_coordinator_goes_with_its_pods_and_stays_with_them(
    cluster: Cluster, template: dict[str, Any], applied: list[str]
):
    old = spec(template=other_template(image="vllm:1"))
    cluster.children = Children(ranks=ranks(of=old), pods=cluster.children.pods)
    found = operator(cluster)
    for _ in range(2):
        await found.look(current(cluster, template=other_template(image="vllm:1")))
    cluster.calls.clear()
    # The group runs the new template now.
    cluster.children = Children(ranks=ranks(of=spec(template=template)), pods=cluster.children.pods)
    await found.look(current(cluster, template=template))
    assert [one for one in cluster.verbs if one == "apply Deployment"] == applied


# --- an invalid spec -----------------------------------------------------------------------------


async def test_an_invalid_spec_is_said_once_and_leaves_everything_alone(cluster: Cluster):
    found = await settled(cluster)
    before = copy.deepcopy(cluster.status)
    first = await found.look(current(cluster, minReplicas=1))
    assert [(one.reason, one.warning) for one in first.events] == [("InvalidSpec", True)]
    assert cluster.verbs == ["merge status"]
    assert {key for key in before if before[key] != cluster.status[key]} == {
        "conditions",
        "message",
    }
    second = await found.look(current(cluster, minReplicas=1))
    assert (second.events, cluster.verbs) == ([], ["merge status"])
    await found.look(current(cluster))
    assert cluster.status["conditions"] == before["conditions"]


async def test_an_invalid_spec_that_cannot_be_said_backs_off(cluster: Cluster):
    found = await settled(cluster)
    cluster.refuses = {"status"}
    result = await found.look(current(cluster, minReplicas=1))
    assert (result.pause, result.events) == (1.0, [])


async def test_an_invalid_deployment_can_be_deleted(cluster: Cluster):
    found = await settled(cluster)
    assert not (await found.look(current(cluster, minReplicas=1))).gone
    assert (await found.look(current(cluster, minReplicas=1, meta=DELETED))).gone


# --- deletion ------------------------------------------------------------------------------------


async def test_a_deleted_deployment_waits_for_its_pods(cluster: Cluster):
    found = await settled(cluster)
    assert not (await found.look(current(cluster, meta=DELETED))).gone
    assert cluster.verbs[-1] == "delete StatefulSet"
    cluster.children = Children(pods=look(1).pods)
    assert not (await found.look(current(cluster, meta=DELETED))).gone
    cluster.children = Children()
    cluster.calls.clear()
    assert (await found.look(current(cluster, meta=DELETED))).gone
    assert "apply" not in " ".join(cluster.verbs)


async def test_a_deletion_does_not_wait_for_ever(cluster: Cluster):
    found = await settled(cluster)
    await found.look(current(cluster, meta=DELETED))
    cluster.now += 3600
    assert (await found.look(current(cluster, meta=DELETED))).gone


# --- the finalizer -------------------------------------------------------------------------------


async def test_the_finalizer_is_there_before_any_child():
    cluster = Cluster()
    cluster.children = Children()
    found = operator(cluster)
    await found.look(current(cluster, meta={"finalizers": ["somebody/else"]}))
    assert cluster.calls[0] == (
        "merge",
        "ElasticMoEDeployment",
        {
            "metadata": {
                "finalizers": ["somebody/else", "elasticmoe.io/drain"],
                "resourceVersion": "7",
            }
        },
    )
    cluster.calls.clear()
    await found.look(current(cluster, meta={"finalizers": []}))  # seen before the patch came back
    assert not cluster.told("merge", "ElasticMoEDeployment")


async def test_the_finalizer_goes_when_nothing_is_left(cluster: Cluster):
    found = await settled(cluster)
    await found.look(current(cluster, meta=DELETED))
    assert not cluster.told("merge", "ElasticMoEDeployment")
    cluster.children = Children()
    assert (await found.look(current(cluster, meta=DELETED))).gone
    (patch,) = cluster.told("merge", "ElasticMoEDeployment")
    assert patch["metadata"] == {"finalizers": [], "resourceVersion": "7"}


async def test_a_deployment_that_was_let_go_is_left_alone(cluster: Cluster):
    result = await operator(cluster).look(current(cluster, meta={**DELETED, "finalizers": []}))
    assert result.gone
    assert cluster.calls == []
