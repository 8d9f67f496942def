"""A new command comes to each launcher's file in its own time; a group starts with one of them."""

from __future__ import annotations

from dataclasses import replace as replaced

import pytest
from elasticmoe_coordinator.core.fitness import difference, too_few_slots, upcoming
from elasticmoe_coordinator.core.members import Roster
from msgspec.structs import replace
from support.rules import (
    engines,
    group,
    instance,
    last,
    member,
    restart,
    story,
    until,
    until_ended,
    until_phase,
    until_serving,
)
from support.virtual import World
from support.words import hello, report


def commands(world: World) -> set[str]:
    """Of the engines that are there."""
    return {one.command for one in engines(world).values()}


def told(world: World, name: str) -> tuple[str, str]:
    found = member(world, name)
    return found.command, found.next_command


def with_commands(size: int = 3, **more: object) -> World:
    """A group whose engines run with command a."""
    world = group(size, **more)  # type: ignore[arg-type]
    world.write_command("a")
    restart(world, operation="first")
    until_ended(world, "first")
    until_serving(world, size)
    assert commands(world) == {"a"}
    return world


def test_a_restart_starts_the_new_command_everywhere():
    world = with_commands()
    generation = world.status.generation
    world.write_command("b")
    until(world, lambda: told(world, "h2") == ("a", "b"))
    assert [told(world, name) for name in world.hosts] == [("a", "b")] * 3
    assert world.status.reason == "AsDesired", "nothing happens by itself"
    restart(world)
    ended = until_ended(world, "restart")
    assert ended.state == "succeeded"
    assert [told(world, name) for name in world.hosts] == [("b", "")] * 3
    assert commands(world) == {"b"}
    assert world.status.generation == generation + 1
    assert not world.broken


def test_a_restart_waits_for_the_last_launcher_before_anything_is_drained():
    world = with_commands()
    world.write_command("b", "h0", "h1")
    until(world, lambda: told(world, "h1") == ("a", "b"))
    restart(world)
    world.run(10)
    assert until_phase(world, "restart", "preflight")
    assert {one.fence for one in engines(world).values()} == {"open"}
    world.write_command("b", "h2")
    assert until_ended(world, "restart").state == "succeeded"
    assert commands(world) == {"b"}
    assert not world.broken


def test_a_restart_is_withdrawn_when_a_launcher_never_gets_it():
    world = with_commands()
    world.write_command("b", "h0", "h1")
    until(world, lambda: told(world, "h1") == ("a", "b"))
    restart(world)
    ended = until_ended(world, "restart")
    assert ended.state == "withdrawn"
    assert ended.error == (
        "the next engines would start with different commands (h0: b, h1: b, h2: a): "
        "see each one's file"
    )
    assert world.serving(3)
    assert commands(world) == {"a"}


def test_a_launcher_that_can_not_use_it_keeps_the_old_one_and_counts_so():
    world = with_commands()
    world.write_command("b", "h0", "h1")
    odd = world.hosts["h2"]
    odd.facts = replace(odd.facts, next_command="b", next_problem="leave out --headless")
    assert upcoming(instance("x", command="a", next_command="b", next_problem="no")) == "a"
    odd.file = ""
    restart(world)
    assert until_ended(world, "restart").state == "withdrawn"
    assert world.serving(3)


def test_a_problem_of_the_next_command_is_no_fault():
    world = with_commands()
    odd = world.hosts["h1"]
    odd.file = ""  # what comes now stays as it is said
    odd.facts = replace(odd.facts, next_command="", next_problem="it is no JSON")
    odd.greeted = False
    until(world, lambda: member(world, "h1").next_command_problem == "it is no JSON")
    world.run(20)
    found = member(world, "h1")
    assert (found.active, found.ready, found.reason) == (True, True, "")
    assert world.serving(3)
    assert last(world).id == "first"


@pytest.mark.parametrize("late", ["h0", "h2"])
def test_a_recovery_starts_the_new_one_when_the_last_launcher_has_it(late: str):
    world = with_commands(replacement=30.0)
    world.write_command("b", *(name for name in world.hosts if name != late))
    world.kill_engine("h1")
    until_phase(world, "recover", "replace")
    world.run(5)
    assert not engines(world)
    status = world.status
    assert "until its file has the same" in status.message or "'s is b" in status.message, status
    world.write_command("b", late)
    until_serving(world, 3)
    assert commands(world) == {"b"}
    assert not world.broken


def test_a_recovery_goes_on_without_a_launcher_that_never_gets_it():
    world = with_commands()
    world.write_command("b", "h0", "h1")
    world.kill_engine("h1")
    until_serving(world, 2)
    assert commands(world) == {"b"}
    assert member(world, "h2").state == "standby"
    assert "its command is a, h0's is b" in member(world, "h2").reason
    world.write_command("b", "h2")
    until_serving(world, 3)
    assert commands(world) == {"b"}
    assert not world.broken


def test_a_standby_that_has_it_already_joins_after_the_restart():
    world = with_commands(2, instances=3)
    world.write_command("b")
    until(world, lambda: told(world, "h2") == ("b", ""))
    assert "until the next restart" in member(world, "h2").reason
    assert world.try_put(3)
    world.run(5)
    assert world.status.size == 2
    until(world, lambda: world.status.operation is None)
    restart(world)
    until_ended(world, "restart")
    until_serving(world, 3)
    assert commands(world) == {"b"}
    assert not world.broken


def test_a_command_that_comes_between_decision_and_start_is_never_mixed_in():
    """At any instant of a restart, to one launcher or to all."""
    for steps in range(24):
        for names in (("h0",), ("h2",), ()):
            world = with_commands()
            restart(world)
            world.run(steps * 0.5)
            world.write_command("b", *names)
            until(world, lambda world=world: world.status.operation is None)
            world.write_command("b")
            world.run(2)
            if world.status.size < 3:  # it went on without one, whose command is another one now
                restart(world, operation="again")
            until(world, lambda world=world: world.serving(3), 200)
            assert not world.broken, story(world)
            assert len(commands(world)) == 1


@pytest.mark.parametrize("steps", range(12))
def test_a_restarted_coordinator_mixes_no_commands(steps: int):
    """One engine has begun; the pod of another one is replaced and reads a newer file."""
    world = with_commands(2)
    world.kill_engine("h0")
    until_phase(world, "recover", "start")
    world.run(steps * 0.5)
    world.write_command("b", "h0")
    world.replace_host("h0")
    world.restart_coordinator()
    world.run(2)
    world.write_command("b")
    until(world, lambda: world.serving(2), 200)
    assert not world.broken, story(world)


def test_another_model_with_more_experts_than_slots_is_not_started():
    world = group(2)
    for host in world.hosts.values():
        host.facts, host.greeted = replace(host.facts, num_experts=32, model="large"), False
    world.kill_engine("h1")
    until_phase(world, "recover", "replace")
    world.run(40)
    status = world.status
    assert (status.state, status.reason) == ("Recovering", "BelowMinReplicas")
    assert (
        "large has 32 experts, 2 ranks with 4 slots hold 8: slots are fixed for a group's life, "
        "start a new group for this model"
    ) in status.message
    assert not engines(world)
    for host in world.hosts.values():
        host.facts, host.greeted = replace(host.facts, num_experts=8, model="m"), False
    until_serving(world, 2)


# --- facts that change ---------------------------------------------------------------------------


def test_changed_facts_are_those_of_the_same_instance():
    roster = Roster(silence=1.5)
    first = hello(number=1)
    assert roster.hello(first, 0.0) == ""
    assert roster.note(report(seq=1, hello=1), 1.0)
    changed = replace(first, facts=replace(first.facts, command="b"), number=2)
    assert roster.hello(changed, 2.0) == ""
    found = roster.get("i0")
    assert found is not None
    assert (found.facts.command, found.registered_at, found.replaced_at) == ("b", 0.0, 0.0)
    assert found.report is not None
    assert roster.hello(first, 3.0) == ""
    assert found.facts.command == "b", "said earlier, heard later"


def test_a_report_of_facts_that_were_not_heard_is_not_taken():
    roster = Roster(silence=1.5)
    roster.hello(hello(number=1), 0.0)
    assert not roster.note(report(seq=1, hello=2), 1.0)
    assert roster.hello(hello(number=3), 1.0) == ""
    assert roster.note(report(seq=2, hello=3), 1.0)
    assert roster.note(report(seq=3), 1.0), "an older sidecar says no number"


def test_a_command_in_a_file_is_compared_with_one_in_a_file():
    one, other = instance("one", command="a"), instance("other", command="b")
    assert difference(one, other) == (
        "its command is a, other's is b: wait until its file has the same"
    )
    assert difference(one, replaced(other, facts=replace(other.facts, command=""))) == ""
    later = replaced(other, facts=replace(other.facts, next_command="a"))
    assert difference(one, later) == (
        "its command is a, other's is b until the next restart: ask for one"
    )


@pytest.mark.parametrize(("slots", "size", "fits"), [(4, 2, True), (4, 1, False), (0, 1, True)])
def test_experts_need_slots(slots: int, size: int, fits: bool):
    assert (too_few_slots(instance("one"), slots, size) == "") is fits
