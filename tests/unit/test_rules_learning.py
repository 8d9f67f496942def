"""A new coordinator: it learns first, then takes over whatever is under way."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from elasticmoe_coordinator.core.group import Group
from elasticmoe_coordinator.core.outbox import Rejected
from elasticmoe_protocol.messages import Goal
from elasticmoe_sidecar.journal import stale
from support.rules import (
    Cuts,
    engine,
    engines,
    group,
    last,
    posted,
    ranks,
    request,
    restart,
    story,
    until,
    until_ended,
    until_phase,
    until_serving,
)
from support.virtual import World, small_config

# --- before it leads ----------------------------------------------------------------------------


def goals(world: World) -> dict[str, Goal | None]:
    return {name: host.goal for name, host in world.hosts.items()}


def test_nothing_is_changed_before_everybody_recorded_has_answered():
    world = group(3)
    world.freeze_sidecar("h1", 4)
    before = goals(world)
    world.restart_coordinator()
    while world.now < world.hosts["h1"].frozen_until - 1:
        world.step()
        assert world.status.state == "Learning"
        assert goals(world) == before
    assert "waiting for h1" in world.status.message
    until_serving(world, 3)
    assert world.status.term == 2
    assert world.starts == 3


@pytest.mark.parametrize("policy", ["declared", "follow"])
@pytest.mark.parametrize("name", ["h0", "h1", "h2"])
def test_who_is_silent_past_the_limit_is_neither_waited_for_nor_lost_nor_replaced(name, policy):
    world = group(3, instances=4 if policy == "declared" else 3, policy=policy)
    began = world.now
    world.freeze_sidecar(name, 60)
    world.restart_coordinator()
    until(world, lambda: world.status.state != "Learning")
    limit = world.config.learn_limit
    assert limit <= world.now - began <= limit + 1
    history = len(world.status.history)
    world.run(50)
    status = world.status
    assert (status.state, status.size, status.desired) == ("Serving", 3, 3), story(world)
    assert len(status.history) == history
    assert engine(world, name).there
    world.run(10)
    assert world.serving(3)
    assert world.starts == 3


@pytest.mark.parametrize("size", [2, 4])
def test_a_size_asked_for_while_a_member_is_unheard_waits_for_it(size):
    world = group(3, instances=4)
    world.freeze_sidecar("h1", 30)
    world.restart_coordinator()
    until(world, lambda: world.try_put(size))
    until_serving(world, size)
    assert world.status.generation == 1
    assert world.starts == 3 + (size == 4)
    assert not world.broken


def test_nobody_takes_the_place_of_a_member_that_is_unheard():
    world = group(2, instances=4)
    world.freeze_sidecar("h1", 15)
    world.restart_coordinator()
    until(world, lambda: world.try_put(3))
    until_serving(world, 3)
    assert ranks(world) == {0: "h0", 1: "h1", 2: "h2"}
    assert world.status.generation == 1


def test_joiners_are_waited_for_too():
    world = group(2, instances=3)
    world.put(3)
    until_phase(world, "scale_up", "prepare")
    world.freeze_sidecar("h2", 4)
    world.restart_coordinator()
    world.run(3)
    assert world.status.state == "Learning"
    assert "waiting for h2" in world.status.message


def test_without_any_record_it_waits_a_moment_for_who_may_have_one():
    world = World(small_config())
    world.add("h0")
    world.add("h1")
    world.run(4 * world.config.heartbeat - 0.5)
    assert world.status.state == "Learning"
    until_serving(world, 2)
    assert world.status.term == 1


def test_a_sidecar_that_answers_later_than_one_without_a_memory_is_still_heard():
    world = group(2, instances=3)
    for name in ("h0", "h1"):
        world.freeze_sidecar(name, 1.5)
    world.hosts["h2"].goal = None
    world.restart_coordinator()
    until_serving(world, 2)
    assert world.starts == 2
    assert world.status.generation == 1


def test_requests_of_people_wait_until_it_has_learnt():
    world = group(2, instances=3)
    world.restart_coordinator()
    world.run(0.5)
    for ask in (lambda: world.put(3), lambda: restart(world)):
        with pytest.raises(Rejected, match="ask again soon") as refusal:
            ask()
        assert refusal.value.code == "not_ready"
    until(world, lambda: world.try_put(3))
    until_serving(world, 3)


def test_the_newest_journal_counts():
    world = group(2, instances=3)
    operation = world.put(3)
    until_ended(world, operation)
    old = world.hosts["h1"].goal
    world.run(1)
    world.put(2)
    until_serving(world, 2)
    world.hosts["h1"].goal = old
    world.restart_coordinator()
    until_serving(world, 2)
    assert world.status.desired == 2
    assert last(world).kind == "scale_down"


def test_each_coordinator_has_a_higher_term_than_any_before():
    world = group(2)
    for term in (2, 3, 4):
        world.restart_coordinator()
        until_serving(world, 2)
        assert world.status.term == term
        assert {host.goal.term for host in world.hosts.values()} == {term}


def test_engines_are_wanted_in_the_same_words_as_before():
    world = group(2, instances=3)
    until_ended(world, world.put(3))
    world.run(1)
    before = {name: host.goal.launch for name, host in world.hosts.items()}
    world.restart_coordinator()
    until_serving(world, 3)
    world.run(1)
    assert {host.goal.term for host in world.hosts.values()} == {2}
    assert {name: host.goal.launch for name, host in world.hosts.items()} == before


def test_what_was_asked_of_the_one_before_is_known_by_its_id():
    world = group(2, instances=3)
    operation = world.put(3)
    until_ended(world, operation)
    world.run(1)
    world.restart_coordinator()
    until_serving(world, 3)
    found, began = world.group.set_target(request(operation, 3), world.now)
    assert (found.id, found.state, began) == (operation, "succeeded", False)


# --- the one before -----------------------------------------------------------------------------


def test_sidecars_refuse_the_coordinator_before_and_it_learns_again():
    world = group(2, instances=3)
    old = world.group
    assert isinstance(old, Group)
    world.restart_coordinator()
    until_serving(world, 2)
    new = world.group
    # Nothing told the old one that it is over: it still has somebody ask for a resize.
    old.set_target(request("stale", 3), world.now)
    world.group = old
    world.run(1.5)
    assert all(host.goal.term == 2 for host in world.hosts.values())
    assert world.status.state == "Learning"
    assert not any(posted(world).values())
    world.group = new
    world.run(20)
    assert world.starts == 2
    assert world.serving(2)


def test_goals_of_the_coordinator_before_come_too_late():
    world = group(3)
    old = world.group
    old.set_target(request("stale", 2), world.now)
    world.restart_coordinator()
    until_serving(world, 3)
    late = old.tick(world.now).goals
    assert {goal.record.operation.id for goal in late} == {"stale"}
    for goal in late:
        assert stale(goal, world.hosts[goal.instance].goal)


# --- in the middle of everything ----------------------------------------------------------------


def starting(phase: str) -> World:
    world = World(small_config(size=3))
    for number in range(2 if phase == "wait" else 3):
        world.add(f"h{number}")
    return world


def growing(phase: str) -> World:
    return group(2, instances=2 if phase == "wait" else 3)


def shrinking(phase: str) -> World:
    return group(3)


def restarting(phase: str) -> World:
    """With a newcomer, so that there is something to check, and with a request that runs on."""
    world = group(2, instances=3)
    world.long_request_until = world.now + 3
    return world


def recovering(phase: str) -> World:
    world = group(3)
    world.remove("h1")
    until(world, lambda: world.status.state == "Recovering")
    return world


SCENES: dict[str, tuple[Callable[[str], World], tuple[str, ...], int]] = {
    "start": (starting, ("wait", "start"), 3),
    "scale_up": (growing, ("wait", "preflight", "launch", "prepare", "commit", "settle"), 3),
    "scale_down": (shrinking, ("lame_duck", "close", "prepare", "commit", "retire"), 2),
    "restart": (restarting, ("preflight", "drain", "stop", "start"), 3),
    "recover": (recovering, ("kill", "replace", "start"), 2),
}
"""What makes each kind of operation run, its phases, and the size at which it ends."""

PHASES = [(kind, phase) for kind, (_, phases, _) in SCENES.items() for phase in phases]
TOLD = ["all", "none", "first", "last"]


def ask(world: World, kind: str) -> None:
    """What a person or the operator asks for, in the same words each time."""
    if kind.startswith("scale"):
        world.put(SCENES[kind][2], "op")
    elif kind == "restart":
        restart(world, SCENES[kind][2], "op")


def scene(kind: str, phase: str, told: str = "all") -> World:
    """A group in the very moment in which this phase was entered.

    told: whose sidecars have journaled that.
    """
    world = SCENES[kind][0](phase)
    ask(world, kind)
    to_phase(world, kind, phase, told)
    return world


def go_on(world: World, kind: str, phase: str) -> None:
    """The new coordinator has learnt: it is asked again, and what was waited for comes."""
    until(world, lambda: world.status.state != "Learning")
    ask(world, kind)
    if phase == "wait":
        world.add("h2")


def to_phase(world: World, kind: str, phase: str, told: str) -> None:
    """Let time pass until the phase was entered. told: whose sidecars journaled that."""
    for _ in range(400):
        before = {name: (host.goal, host.confirmed) for name, host in world.hosts.items()}
        if (kind, phase) == ("scale_up", "settle") and _committing(world):
            # The joiner's sidecar is away as the commit ends, so that there is a wait for it.
            world.freeze_sidecar("h2", 2)
        world.step()
        running = world.status.operation
        if running is not None and (running.kind, running.phase) == (kind, phase):
            break
    else:
        raise AssertionError(story(world))
    names = list(world.hosts)
    deaf = {"all": [], "none": names, "first": names[1:], "last": names[:-1]}[told]
    for name in deaf:
        if name in before:
            world.hosts[name].goal, world.hosts[name].confirmed = before[name]


def _committing(world: World) -> bool:
    running = world.status.operation
    return running is not None and running.phase == "commit"


def ended_right(world: World, kind: str) -> bool:
    size = SCENES[kind][2]
    return world.serving(size) and any(one.kind == kind for one in world.status.history)


def undisturbed(kind: str, phase: str) -> int:
    """How many engines are started when nothing gets in the way."""
    world = scene(kind, phase)
    go_on(world, kind, phase)
    until(world, lambda: ended_right(world, kind))
    return world.starts


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize(("kind", "phase"), PHASES)
def test_a_new_coordinator_takes_over_in_every_phase(kind, phase, told):
    """The operation ends right by itself, nothing is sent twice and nobody is started twice."""
    world = scene(kind, phase, told)
    before = {name: one.spec.launch for name, one in engines(world).items()}
    cuts = Cuts(world)
    world.restart_coordinator()
    go_on(world, kind, phase)
    until(world, lambda: (cuts.look(), ended_right(world, kind))[1])
    world.run(10)
    assert ended_right(world, kind), story(world)
    assert not world.broken, story(world)
    assert world.starts == undisturbed(kind, phase), story(world)
    assert sorted(ranks(world)) == list(range(SCENES[kind][2]))
    if kind in ("scale_up", "scale_down", "restart"):
        assert [one.id for one in world.status.history].count("op") == 1
        assert last(world).id == "op"
        assert cuts.found == []
    if kind.startswith("scale"):
        after = {name: one.spec.launch for name, one in engines(world).items()}
        assert all(after[name] == before[name] for name in ("h0", "h1"))
        assert all(engine(world, name).posted == ["op"] for name in ("h0", "h1"))


@pytest.mark.parametrize("away", [3.0, 12.0])
@pytest.mark.parametrize("how", ["restarts", "freezes"])
@pytest.mark.parametrize(("kind", "phase"), PHASES)
def test_a_coordinator_that_is_away_for_a_while_finds_its_way(kind, phase, how, away):
    world = scene(kind, phase)
    world.freeze_coordinator(away)
    if how == "restarts":
        world.restart_coordinator()
    world.run(away + 0.5)
    go_on(world, kind, phase)
    until(world, lambda: ended_right(world, kind))
    assert not world.broken, story(world)
    assert world.starts == undisturbed(kind, phase), story(world)


def test_coordinators_that_die_again_and_again_get_there():
    world = group(2, instances=4)
    world.put(4, "op")
    for pause in itertools.cycle((3.0, 4.5, 6.0)):
        world.run(pause)
        if world.serving(4):
            break
        world.restart_coordinator()
    assert not world.broken
    assert world.starts == 4
    assert last(world).id == "op"
