"""After a loss: all engines of the old generation are killed, then all start again."""

from __future__ import annotations

import itertools

import pytest
from support.rules import (
    engine,
    engines,
    group,
    last,
    ranks,
    request,
    restart,
    steps,
    story,
    until,
    until_ended,
    until_phase,
    until_serving,
)
from support.virtual import World, small_config


def launches(world: World) -> set[str]:
    return {one.spec.launch for one in engines(world).values()}


def starts_fail(world: World) -> None:
    world.faults.start = "exit"


def until_failed(world: World) -> None:
    steps(world, lambda: starts_fail(world), lambda: world.status.state == "Failed")
    world.faults.start = ""


@pytest.mark.parametrize("name", ["h0", "h1", "h2"])
def test_everything_old_is_gone_before_anything_starts(name):
    world = group(3)
    before = launches(world)
    world.kill_engine(name)
    mixed = []

    def look() -> None:
        present = launches(world)
        if present & before and present - before:
            mixed.append(world.now)

    steps(world, look, lambda: world.serving(3))
    assert not mixed
    assert not before & launches(world)
    assert world.status.generation == 2
    assert ranks(world) == {0: "h0", 1: "h1", 2: "h2"}


def test_the_kill_waits_for_no_answer_of_an_api_server():
    world = group(3)
    for name in ("h0", "h2"):
        engine(world, name).frozen = True
    world.kill_engine("h1")
    lost = world.now
    until(world, lambda: not engines(world))
    assert world.now - lost <= 2.0
    until_serving(world, 3)


def test_nothing_starts_while_an_old_engine_may_still_run():
    """Its sidecar is away but its launcher says that the engine is there."""
    world = group(3)
    away = world.now + 40
    world.freeze_sidecar("h1", 40)
    world.run(3)
    world.kill_engine("h0")
    starts = world.starts
    until_phase(world, "recover", "kill")
    while world.now < away:
        assert world.starts == starts, story(world)
        world.step()
    until_serving(world, 3)
    assert world.status.generation == 2


def test_nobody_is_ready_while_engines_start():
    world = group(3)
    world.kill_engine("h1")
    until_phase(world, "recover", "start")
    world.run(0.5)
    assert not any(host.ready for host in world.hosts.values())
    until_serving(world, 3)


def test_a_loss_is_no_shrink():
    world = group(3)
    world.remove("h1")
    until_serving(world, 2)
    assert world.status.desired == 3
    assert world.status.reason == "TooFewInstances"
    world.add("h1")
    until_serving(world, 3)


def test_a_missing_instance_is_waited_for():
    world = group(3, ordinals=True, replacement=20.0)
    world.remove("h1")
    until_phase(world, "recover", "replace")
    world.run(10)
    assert world.status.operation.phase == "replace"
    assert "2 of 3 instances can serve" in world.status.message
    world.add("h1", 1)
    until_serving(world, 3)
    assert world.status.generation == 2


def test_after_the_wait_the_group_goes_on_with_dense_ranks_of_who_is_there():
    world = group(4, ordinals=True)
    world.remove("h1")
    began = until_phase(world, "recover", "replace")
    entered = world.now
    until_phase(world, "recover", "start")
    assert world.now - entered >= world.config.replacement
    until_serving(world, 3)
    assert ranks(world) == {0: "h0", 1: "h2", 2: "h3"}
    assert (last(world).id, last(world).from_size, last(world).to_size) == (began.id, 4, 3)
    assert {one.spec.rank for one in engines(world).values()} == {0, 1, 2}
    assert {one.spec.size for one in engines(world).values()} == {3}


def test_a_standby_takes_the_place_of_a_missing_instance_without_more_waiting():
    world = group(3, instances=4)
    world.remove("h1")
    until_serving(world, 3)
    ended = last(world)
    replaced = sum(one.seconds for one in ended.phases if one.phase == "replace")
    assert (ended.kind, ended.to_size) == ("recover", 3)
    assert replaced < world.config.replacement
    assert ranks(world) == {0: "h0", 1: "h2", 2: "h3"}


def test_with_fewer_than_the_smallest_size_it_waits_and_says_so():
    world = group(3)
    world.remove("h1")
    until_phase(world, "recover", "replace")
    world.remove("h2")
    world.run(60)
    status = world.status
    assert (status.state, status.reason) == ("Recovering", "BelowMinReplicas")
    assert "1 of 3 instances can serve: start more instances" in status.message
    assert engines(world) == {}
    world.add("h3")
    until_serving(world, 2)


def test_another_pod_of_the_name_is_a_loss_and_takes_the_place():
    world = group(3, ordinals=True)
    world.replace_host("h0")
    until_serving(world, 3)
    assert world.status.generation == 2
    assert ranks(world) == {0: "h0", 1: "h1", 2: "h2"}


def test_a_launcher_that_was_started_anew_is_a_loss():
    world = group(3)
    world.restart_launcher("h2")
    until(world, lambda: world.status.state == "Recovering", 5)
    until_serving(world, 3)
    assert world.status.generation == 2


@pytest.mark.parametrize("phase", ["kill", "replace", "start"])
def test_another_loss_in_any_phase_of_a_recovery_is_recovered_too(phase):
    world = group(3)
    if phase == "replace":
        world.remove("h1")
    else:
        world.freeze_sidecar("h2", 3)  # so that the kill takes a while
        world.kill_engine("h1")
    until_phase(world, "recover", phase)
    if phase == "start":
        until(world, lambda: "h2" in engines(world))
    world.kill_engine("h2")
    if phase == "replace":
        world.add("h1")
    until_serving(world, 3)
    assert last(world).kind == "recover"


def test_a_failing_start_is_tried_again_with_growing_pauses():
    world = group(2, restart_limit=5, backoff=2.0, backoff_max=100.0)
    world.kill_engine("h1")
    began: list[float] = []

    def look() -> None:
        starts_fail(world)
        running = world.status.operation
        started = [] if running is None else [p for p in running.phases if p.phase == "start"]
        if running is not None and running.phase == "start" and len(started) == len(began) + 1:
            began.append(world.now)

    steps(world, look, lambda: len(began) == 5)
    pauses = [after - before for before, after in itertools.pairwise(began)]
    for number, pause in enumerate(pauses):
        least = 2.0 * 2**number
        assert least <= pause <= least + 3.0, pauses
    world.faults.start = ""
    until_serving(world, 2)
    assert last(world).attempt == 5


def test_restarts_are_bounded_and_then_a_person_has_to_look():
    world = group(2, restart_limit=3)
    world.kill_engine("h1")
    starts = world.starts
    until_failed(world)
    status = world.status
    assert (status.state, status.reason) == ("Failed", "RestartsExhausted")
    assert "3 restarts" in status.message
    assert "CUDA out of memory" in status.message
    assert "ask for a restart" in status.message
    assert world.starts - starts <= 3 * 2
    tried = world.starts
    world.run(120)
    assert world.starts == tried
    assert engines(world) == {}
    assert world.status.state == "Failed"


def test_failed_stays_so_for_the_next_coordinator():
    world = group(2, restart_limit=2)
    world.kill_engine("h1")
    until_failed(world)
    why = world.status.message
    world.restart_coordinator()
    world.run(60)
    status = world.status
    assert (status.state, status.reason, status.message) == ("Failed", "RestartsExhausted", why)
    assert engines(world) == {}


@pytest.mark.parametrize("how", ["restart", "another size"])
def test_a_person_has_the_failed_group_try_again(how):
    world = group(2, instances=3, restart_limit=2)
    world.kill_engine("h1")
    until_failed(world)
    world.run(30)
    if how == "restart":
        restart(world, operation="mended")
        assert until_ended(world, "mended").state == "succeeded"
        until_serving(world, 2)
    else:
        world.put(3, "mended")
        assert until_ended(world, "mended").state == "succeeded"
        until_serving(world, 3)


def test_who_mends_a_failed_group_has_all_restarts_again():
    world = group(2, restart_limit=3)
    world.kill_engine("h1")
    until_failed(world)
    world.put(2, "mended")
    until_serving(world, 2)
    world.kill_engine("h1")
    until(world, lambda: world.status.state == "Recovering")
    until_serving(world, 2)


def test_the_bound_counts_only_what_was_lately():
    world = group(2, restart_limit=2, restart_window=60.0)
    for _ in range(4):
        world.kill_engine("h1")
        until(world, lambda: world.status.state == "Recovering")
        until_serving(world, 2)
        world.run(40)
    assert world.status.generation == 5


def test_the_bound_survives_a_new_coordinator():
    world = group(2, restart_limit=2)
    for _ in range(2):
        world.kill_engine("h1")
        until(world, lambda: world.status.state == "Recovering")
        until_serving(world, 2)
        world.restart_coordinator()
        until_serving(world, 2)
    world.kill_engine("h1")
    until(world, lambda: world.status.state == "Failed")
    assert "killed by signal 9" in world.status.message


def test_a_size_asked_for_while_the_group_is_down_is_started_straight_away():
    world = group(2, instances=4)
    world.remove("h1")
    until_phase(world, "recover", "kill")
    found, began = world.group.set_target(request("op", 3), world.now)
    assert (found.kind, found.to_size, began) == ("recover", 3, False)
    until_serving(world, 3)
    assert world.status.generation == 2


def test_a_first_start_that_fails_is_recovered():
    world = World(small_config(size=3))
    for number in range(3):
        world.add(f"h{number}")
    world.faults.start = "exit"
    until(world, lambda: bool(world.status.history))
    first = world.status.history[0]
    assert (first.kind, first.state) == ("start", "failed")
    assert "CUDA out of memory" in first.error
    until_serving(world, 3)


def test_a_start_that_never_comes_up_is_given_up_in_time():
    world = World(small_config(size=2))
    for number in range(2):
        world.add(f"h{number}")
    until_phase(world, "start", "start")
    world.run(1)
    # One engine does not reach the others: they wait for it.
    engine(world, "h1").started = float("inf")
    until(world, lambda: bool(world.status.history))
    first = world.status.history[0]
    assert f"not up after {world.config.start_limit:g} s" in first.error
    until_serving(world, 2)
