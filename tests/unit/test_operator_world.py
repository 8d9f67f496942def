"""Random histories of an operator, its cluster and its coordinator in virtual time.

Sizes, templates and capacity change at any instant; nodes vanish; resizes fail or are withdrawn;
coordinator and operator are restarted. Then all faults end, and the group has to end at the size
that is asked for, with a status that says so.
"""

from __future__ import annotations

import pytest
from elasticmoe_operator.core import status
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.operator_world import World, other_template

STEPS = 20
ordinal = st.integers(0, 5)


class Histories(RuleBasedStateMachine):
    world: World

    @initialize(seed=st.integers(0, 1 << 16), replicas=st.integers(1, 8), spare=st.integers(0, 1))
    def begin(self, seed: int, replicas: int, spare: int) -> None:
        self.world = World(replicas=replicas, seed=seed, spare_pods=spare)

    @rule(seconds=st.sampled_from([1, 2, 4, 8, 15, 50]))
    def time_passes(self, seconds: int) -> None:
        self.world.run(seconds)

    @rule(seconds=st.integers(1, 12))
    def operator_is_away(self, seconds: int) -> None:
        for _ in range(seconds):
            self.world.step()
        self.world.restart_operator()

    @rule(replicas=st.integers(1, 8))
    def scale(self, replicas: int) -> None:
        self.world.replicas = replicas
        self.world.operate()

    @rule(capacity=st.integers(1, 8))
    def capacity(self, capacity: int) -> None:
        self.world.capacity = capacity

    @rule(outcome=st.sampled_from(["failed", "failed_commit", "withdrawn"]))
    def the_next_operation_goes_wrong(self, outcome: str) -> None:
        self.world.outcomes = [outcome]

    @rule(away=st.sampled_from([0.0, 3.0, 20.0]), learns=st.sampled_from([1.0, 5.0]))
    def coordinator_restarts(self, away: float, learns: float) -> None:
        self.world.restart_coordinator(away, learns)

    @rule(fault=st.sampled_from(["write", "die", "half"]))
    def a_look_is_cut_short(self, fault: str) -> None:
        self.world.operate(fault)
        self.world.restart_operator()

    @rule(one=ordinal)
    def a_node_vanishes(self, one: int) -> None:
        self.world.lose_node(one)

    @rule(one=ordinal)
    def a_pod_is_deleted(self, one: int) -> None:
        self.world.delete_pod(one)

    @rule(image=st.sampled_from(["vllm:1", "vllm:2"]), seed=st.integers(0, 1))
    def template(self, image: str, seed: int) -> None:
        """Another image takes new pods, other arguments a restart in place."""
        self.world.template = other_template(image, ["some/model", f"--seed={seed}"])

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.world.paused = paused

    @rule()
    def the_stateful_set_is_deleted(self) -> None:
        self.world.ranks = None

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        story = "\n".join(world.log)
        assert not world.broken, story
        stored = world.stored
        assert len(stored.get("history") or []) <= 5
        if stored.get("operation"):
            status.read_operation(stored)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.capacity, world.outcomes, world.paused = 8, [], False
        world.say("all faults end")
        ended = world.until(world.settled, 1500.0)
        self.promises()
        told = f"wanted {world.spec.size}, status {world.stored}"
        assert ended, "\n".join([*world.log, told])


def test_promises_hold_in_random_histories(histories: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Histories,
        settings=settings(
            max_examples=max(50, histories // 8),
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


# --- stories --------------------------------------------------------------------------------------


def serving(size: int, **changes: object) -> World:
    world = World(replicas=size, **changes)  # type: ignore[arg-type]
    assert world.until(world.settled), world.log
    return world


def told(world: World, type: str) -> dict[str, str]:
    found: dict[str, str] = next(one for one in world.stored["conditions"] if one["type"] == type)
    return found


def uids(world: World) -> list[str]:
    return [one.uid for _, one in sorted(world.pods.items())]


def results(world: World) -> list[tuple[str, str]]:
    return [(one["kind"], one["result"]) for one in world.stored["history"]]


def test_every_size_is_reached_from_every_other():
    world = serving(2)
    for size in (3, 2, 4, 2, 5, 2, 6, 3, 4, 3, 5, 3, 6, 4, 5, 4, 6, 5, 6, 2):
        world.replicas = size
        assert world.until(world.settled), world.log
    assert not world.broken


def test_without_capacity_the_old_size_serves_and_the_status_says_why():
    world = serving(2, capacity=2)
    world.replicas = 4
    assert world.until(lambda: results(world)[-1] == ("ScaleUp", "Withdrawn"))
    world.run(60)
    assert len(world.members) == world.stored["replicas"] == 2
    assert (told(world, "Available")["status"], told(world, "Degraded")["status"]) == ("True",) * 2
    assert told(world, "Degraded")["reason"] == "Unschedulable"
    assert "no node has a free GPU" in world.stored["message"]


def test_later_capacity_heals_what_was_withdrawn():
    world = serving(2, capacity=2)
    world.replicas = 4
    assert world.until(lambda: ("ScaleUp", "Withdrawn") in results(world))
    world.capacity = 8
    assert world.until(world.settled, 60), world.log


def test_a_lower_target_heals_what_was_withdrawn():
    world = serving(2, capacity=2)
    world.replicas = 4
    assert world.until(lambda: ("ScaleUp", "Withdrawn") in results(world))
    world.replicas = 2
    assert world.until(world.settled, 30), world.log
    assert len(world.asked) == 1


def test_a_failed_resize_is_tried_again_under_another_id():
    world = serving(2, outcomes=["succeeded", "failed"])
    world.replicas = 3
    assert world.until(world.settled), world.log
    asked = [id for id, size in world.asked.items() if size == 3]
    assert len(asked) == len(set(asked)) == 2
    assert results(world)[-2:] == [("ScaleUp", "Failed"), ("ScaleUp", "Succeeded")]
    assert [one["attempt"] for one in world.stored["history"]][-2:] == [1, 2]


def test_other_arguments_restart_the_group_in_its_pods():
    world = serving(3)
    before = uids(world)
    world.template = other_template("vllm:1", ["some/model", "--seed=1"])
    assert not world.settled()
    assert world.until(world.settled), world.log
    assert uids(world) == before
    assert {one.command for one in world.pods.values()} == {world.spec.revision}


def test_another_image_takes_new_pods():
    world = serving(3)
    before = uids(world)
    world.template = other_template("vllm:2")
    assert world.until(world.settled), world.log
    assert not set(uids(world)) & set(before)
    phases = [one["name"] for one in world.stored["history"][-1]["phases"]]
    assert phases == ["Drain", "CreatePods", "Start"]


def test_arguments_that_are_taken_back_during_the_restart_are_not_what_runs_in_the_end():
    world = serving(3)
    first = world.template
    world.template = other_template("vllm:1", ["some/model", "--seed=1"])

    def starting() -> bool:
        return world.operation is not None and world.operation.phase == "start"

    assert world.until(starting)
    world.template = first
    assert world.until(world.settled), world.log
    world.run(60)
    assert world.settled()
    assert {one.command for one in world.pods.values()} == {world.spec.revision}


@pytest.mark.parametrize("fault", ["write", "die", "half"])
def test_an_operator_that_ends_in_any_look_of_a_resize_loses_nothing(fault: str):
    for moment in range(1, 24):
        world = serving(2)
        world.replicas = 4
        for _ in range(moment - 1):
            world.step()
            world.operate()
        world.step()
        world.operate(fault)
        world.restart_operator()
        assert world.until(world.settled, 100), world.log
        assert not world.broken


@pytest.mark.parametrize("fault", ["write", "die", "half"])
def test_an_operator_that_ends_in_any_look_of_the_first_start_loses_nothing(fault: str):
    for moment in range(16):
        world = World(replicas=3)
        for _ in range(moment):
            world.step()
            world.operate()
        world.step()
        world.operate(fault)
        world.restart_operator()
        assert world.until(world.settled, 100), world.log


def test_a_coordinator_that_is_away_changes_neither_pods_nor_replicas_of_the_status():
    world = serving(4)
    before = uids(world)
    world.restart_coordinator(away=30, learns=10)
    world.replicas = 2
    world.run(38)
    assert (uids(world), world.stored["replicas"]) == (before, 4)
    assert told(world, "Degraded")["reason"] in ("CoordinatorUnavailable", "Healthy")
    assert world.until(world.settled), world.log
    assert not world.broken


def test_a_new_template_waits_for_a_coordinator_that_is_away_while_ranks_serve():
    world = serving(3)
    before = uids(world)
    world.restart_coordinator(away=60, learns=5)
    world.template = other_template()
    world.run(50)
    assert uids(world) == before
    assert world.until(world.settled), world.log


def test_a_broken_first_template_can_be_mended():
    world = World(replicas=3, capacity=0)
    world.run(60)
    assert not world.members
    world.template = other_template()
    world.run(20)
    world.capacity = 8
    assert world.until(world.settled), world.log


def test_paused_nothing_is_resized_and_the_status_says_so():
    world = serving(2)
    world.paused, world.replicas = True, 4
    world.run(60)
    assert len(world.pods) == 2
    assert told(world, "Progressing")["reason"] == "Paused"
    world.paused = False
    assert world.until(world.settled), world.log


def test_a_resize_that_was_not_sent_is_not_sent_while_paused():
    world = serving(2)
    world.replicas = 4
    world.run(2)
    assert world.stored["operation"]["phase"] == "CreatePods"
    world.paused = True
    world.run(60)
    assert len(world.members) == 2
    assert told(world, "Progressing")["reason"] == "Paused"
