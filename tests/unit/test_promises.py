"""The six promises, as far as coordinator and sidecars keep them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.rules import (
    Cuts,
    engine,
    engines,
    group,
    last,
    posted,
    restart,
    steps,
    story,
    until,
    until_ended,
    until_serving,
)
from support.virtual import World

# --- what happens -------------------------------------------------------------------------------


def grow(world: World) -> int:
    world.put(4, "op")
    return 4


def shrink(world: World) -> int:
    world.put(2, "op")
    return 2


def start_again(world: World) -> int:
    restart(world, operation="op")
    return 3


def middle_leaves(world: World) -> int:
    world.hosts["h1"].leaving = True
    return 3


CHANGES: list[Callable[[World], int]] = [grow, shrink, start_again, middle_leaves]
"""Each begins at three ranks and one standby, and returns the size at which it ends."""


def over(world: World, size: int, change: Callable[[World], int]) -> bool:
    if change is middle_leaves:
        return world.serving(size) and world.hosts["h1"].goal.released
    return world.serving(size) and any(one.id == "op" for one in world.status.history)


def length(change: Callable[[World], int]) -> int:
    """Steps that it takes undisturbed."""
    world = group(3, instances=4)
    size, count = change(world), 0
    while not over(world, size, change):
        world.step()
        count += 1
    return count


MOMENTS = [(change, moment) for change in CHANGES for moment in range(0, length(change), 2)]


def named(value: object) -> str:
    return getattr(value, "__name__", str(value))


# --- promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_promise_1_no_rank_is_called_safe_to_delete_before_its_engine_retired(change):
    world = group(3, instances=4)
    size = change(world)
    early, called = [], set()

    def look() -> None:
        for one in world.status.instances:
            found = world.hosts[one.instance].engine
            if one.safe_to_delete:
                called.add(one.instance)
                computes = found is not None and found.there and found.topology is not None
                if computes and not found.retired:
                    early.append((world.now, one.instance))
            if world.hosts[one.instance].goal and world.hosts[one.instance].goal.released:
                assert found is None or found.retired

    steps(world, look, lambda: over(world, size, change))
    world.run(1)
    look()
    assert not early
    assert called == {"h3"} | {one for one in world.hosts if one not in engines(world)}


def test_promise_1_a_leaver_is_called_safe_to_delete_in_the_end():
    world = group(3)
    world.put(2)
    until_serving(world, 2)
    safe = {one.instance: one.safe_to_delete for one in world.status.instances}
    assert safe == {"h0": False, "h1": False, "h2": True}


@pytest.mark.parametrize("moment", range(16))
@pytest.mark.parametrize("change", [grow, shrink], ids=named)
def test_promise_2_no_second_resize_while_one_is_unresolved_and_none_twice(change, moment):
    """Whatever is asked for in between, by however many coordinators."""
    world = group(3, instances=4)
    change(world)
    world.run(moment / 2)
    for size in (2, 3, 4):
        world.try_put(size)
    world.restart_coordinator()
    sent: dict[str, list[str]] = {}

    def look() -> None:
        world.try_put(2 if change is grow else 4)
        running = [one.operation for one in engines(world).values() if one.operation]
        assert len({one.operation for one in running if one.state == "running"}) <= 1
        for name, found in posted(world).items():
            sent.setdefault(f"{name} {engine(world, name).spec.launch}", []).clear()
            sent[f"{name} {engine(world, name).spec.launch}"] += found

    steps(world, look, lambda: world.serving(2 if change is grow else 4))
    assert all(len(found) == len(set(found)) for found in sent.values())
    assert any(sent.values())
    assert not world.broken


def unfit(world: World) -> None:
    world.hosts["h3"].unfit = "its weights can't be read"


def exits(world: World) -> None:
    world.faults.joiner = "exit"


def refused(world: World) -> None:
    world.faults.resize = "refuse"


def prepare_fails(world: World) -> None:
    world.faults.resize = "fail_prepare"


def joiner_is_gone(world: World) -> None:
    world.run(1)
    world.remove("h3")


@pytest.mark.parametrize("fault", [unfit, exits, refused, prepare_fails, joiner_is_gone], ids=named)
def test_promise_3_a_failed_grow_leaves_the_old_size_serving(fault):
    world = group(3, instances=4)
    before = {name: one.spec.launch for name, one in engines(world).items()}
    cuts = Cuts(world)
    if fault is not joiner_is_gone:
        fault(world)
    operation = world.put(4)
    if fault is joiner_is_gone:
        fault(world)
    steps(world, cuts.look, lambda: last(world).id == operation)
    assert last(world).state in ("failed", "withdrawn")
    assert last(world).error
    assert world.status.message
    for _ in range(4):
        world.step()
        cuts.look()
        assert all(world.hosts[name].ready for name in before)
    present = {name: one.spec.launch for name, one in engines(world).items()}
    assert before.items() <= present.items()
    assert world.status.size == 3
    assert cuts.found == []


@pytest.mark.parametrize("requests_s", [0.0, 7.0, 45.0])
@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_promise_4_no_request_fails_because_of_a_planned_change(change, requests_s):
    """45 s are more than the drain limit: it is postponed."""
    world = group(3, instances=4)
    world.long_request_until = world.now + requests_s
    cuts = Cuts(world)
    size = change(world)
    steps(world, cuts.look, lambda: over(world, size, change))
    end = max(world.now, world.long_request_until) + 5
    steps(world, cuts.look, lambda: world.now >= end and world.serving(size))
    assert cuts.found == []
    assert not world.broken
    assert sum(one.completed for one in engines(world).values()) > 0


def coordinator_dies(world: World) -> None:
    world.restart_coordinator()


def coordinator_freezes(world: World) -> None:
    world.freeze_coordinator(8.0)


def sidecars_die(world: World) -> None:
    for name in world.hosts:
        world.restart_sidecar(name)


def a_sidecar_dies(world: World) -> None:
    world.restart_sidecar("h1", away=6.0)


def a_sidecar_freezes(world: World) -> None:
    world.freeze_sidecar("h2", 6.0)


def all_die(world: World) -> None:
    world.restart_coordinator()
    for name in world.hosts:
        world.restart_sidecar(name, away=2.0)


DEATHS = [
    coordinator_dies,
    coordinator_freezes,
    sidecars_die,
    a_sidecar_dies,
    a_sidecar_freezes,
    all_die,
]


@pytest.mark.parametrize("death", DEATHS, ids=named)
@pytest.mark.parametrize(("change", "moment"), MOMENTS, ids=named)
def test_promise_5_any_part_may_die_or_freeze_at_any_instant(change, moment, death):
    """No engine restarts that need not, no stream is cut, and it ends right by itself."""
    world = group(3, instances=4)
    cuts = Cuts(world)
    size = change(world)
    for _ in range(moment + 1):
        world.step()
        cuts.look()
    launches = {name: one.spec.launch for name, one in engines(world).items()}
    death(world)
    steps(world, cuts.look, lambda: over(world, size, change))
    assert cuts.found == [], story(world)
    assert not world.broken, story(world)
    if change in (grow, shrink):
        present = {name: one.spec.launch for name, one in engines(world).items()}
        stay = [f"h{rank}" for rank in range(min(size, 3))]
        assert all(present[name] == launches[name] for name in stay), story(world)
        assert world.status.generation == 1
    else:
        assert world.status.generation == 2, story(world)
    assert not any(one.kind == "recover" for one in world.status.history), story(world)


@pytest.mark.parametrize("seed", range(12))
def test_promise_6_any_size_any_number_of_times_ends_at_that_size(seed):
    chance = random.Random(seed)
    world = group(2, instances=4, ordinals=seed % 2 == 0)
    size = 2
    for _ in range(12):
        size = chance.randint(2, 4)
        world.try_put(size)
        world.run(chance.choice([0.5, 1.0, 2.0, 4.0]))
    until(world, lambda: world.try_put(size))
    until_serving(world, size)
    assert world.status.reason == "AsDesired"
    assert not world.broken
    assert world.status.generation == 1


def start_fails(world: World) -> None:
    world.faults.start = "exit"


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "state", ["starting", "recovering", "restarting", "resizing", "inelastic", "failed"]
)
def test_promise_6_in_any_state(state, size):
    world = group(3, instances=4, restart_limit=2)
    if state == "starting":
        world.restart_coordinator()
    elif state == "recovering":
        world.kill_engine("h1")
        world.run(1)
    elif state == "restarting":
        restart(world)
    elif state == "resizing":
        world.put(2)
    elif state == "inelastic":
        world.faults.resize = "fail_prepare"
        until_ended(world, world.put(4))
    else:
        world.kill_engine("h1")
        steps(world, lambda: start_fails(world), lambda: world.status.state == "Failed")
        world.faults.start = ""
    until(world, lambda: world.try_put(size))
    until_serving(world, size)
    assert world.status.reason in ("AsDesired", "NotElastic")


def test_promise_6_without_capacity_the_old_size_serves_and_the_status_says_why():
    world = group(2, instances=3)
    world.put(4)
    world.run(60)
    status = world.status
    assert (status.state, status.size, status.desired) == ("Serving", 2, 4)
    assert status.reason in ("TooFewInstances", "Postponed")
    assert "more instance" in status.message
    assert all(world.hosts[name].ready for name in ("h0", "h1"))
    world.add("h3")
    until_serving(world, 4)
