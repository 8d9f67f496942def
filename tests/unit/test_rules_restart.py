"""Planned warm restarts: drained first, ready all the while, into whatever layout is due."""

from __future__ import annotations

import pytest
from elasticmoe_coordinator.core.outbox import Rejected
from support.rules import (
    Cuts,
    engine,
    engines,
    group,
    last,
    member,
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


def test_a_restart_starts_every_engine_anew_as_the_next_generation():
    world = group(3)
    before = launches(world)
    restart(world)
    ended = until_ended(world, "restart")
    assert (ended.kind, ended.state, ended.reason) == (
        "restart",
        "succeeded",
        "somebody asked for it",
    )
    assert [one.phase for one in ended.phases] == ["preflight", "drain", "stop", "start"]
    assert world.serving(3)
    assert world.status.generation == 2
    assert not before & launches(world)
    assert ranks(world) == {0: "h0", 1: "h1", 2: "h2"}
    assert not world.broken


def test_nothing_is_stopped_before_everything_is_drained():
    world = group(3)
    world.long_request_until = world.now + 8
    cuts = Cuts(world)
    restart(world)
    stops = []

    def look() -> None:
        cuts.look()
        present = engines(world).values()
        if not stops and any(one.stopping for one in present):
            stops.extend((one.fence, one.in_flight) for one in present)
            assert world.now > world.long_request_until

    steps(world, look, lambda: last(world).id == "restart")
    assert stops == [("paused", 0)] * 3
    assert cuts.found == []


def test_no_engine_starts_before_all_old_ones_are_gone():
    world = group(3)
    before = launches(world)
    restart(world)
    mixed = []

    def look() -> None:
        present = launches(world)
        if present & before and present - before:
            mixed.append(world.now)

    steps(world, look, lambda: last(world).id == "restart")
    assert not mixed


def test_readiness_stays_true_so_that_connections_wait_in_the_backlog():
    world = group(3)
    restart(world)
    away = []

    def look() -> None:
        away.extend(name for name, host in world.hosts.items() if not host.ready)

    steps(world, look, lambda: last(world).id == "restart")
    assert not away
    world.run(5)
    assert {one.fence for one in engines(world).values()} == {"open"}


def test_a_restart_may_change_the_size():
    world = group(2, instances=3)
    restart(world, 3)
    ended = until_ended(world, "restart")
    assert (ended.kind, ended.from_size, ended.to_size) == ("restart", 2, 3)
    assert world.serving(3)
    assert world.status.desired == 3
    restart(world, 2, "smaller")
    until_ended(world, "smaller")
    assert world.serving(2)
    assert not world.hosts["h2"].ready
    assert world.hosts["h2"].engine is None
    assert not world.broken


def test_a_newcomer_of_a_restart_is_not_ready_before_it_serves_and_is_checked_first():
    world = group(2, instances=3)
    world.hosts["h2"].unfit = "its weights can't be read"
    restart(world, 3)
    ended = until_ended(world, "restart")
    assert (ended.state, ended.error) == ("withdrawn", "h2: its weights can't be read")
    assert world.serving(2)
    assert world.status.generation == 1
    world.hosts["h2"].unfit = ""
    early = []

    def look() -> None:
        if world.hosts["h2"].ready and engine(world, "h2").phase != "running":
            early.append(world.now)

    steps(world, look, lambda: world.serving(3))
    assert not early


def test_the_same_restart_asked_for_twice_is_one():
    world = group(2)
    for _ in range(40):
        world.group.restart(request("op", 0), world.now)
        world.run(0.5)
    assert [one.id for one in world.status.history].count("op") == 1
    assert world.status.generation == 2


def test_a_restart_conflicts_with_what_runs():
    world = group(2, instances=3)
    operation = world.put(3)
    world.run(1)
    with pytest.raises(Rejected) as refusal:
        restart(world, 2)
    assert (refusal.value.code, refusal.value.operation) == ("conflict", operation)
    assert world.status.desired == 3


@pytest.mark.parametrize("size", [1, 5])
def test_a_restart_to_a_size_beyond_the_limits_is_refused(size):
    world = group(2)
    with pytest.raises(Rejected) as refusal:
        restart(world, size)
    assert refusal.value.code == "invalid"


def test_where_no_size_was_asked_for_there_is_nothing_to_restart():
    world = World(small_config(size=None))
    world.add("h0")
    world.add("h1")
    until(world, lambda: world.status.state == "Waiting")
    with pytest.raises(Rejected, match="no size was asked for yet") as refusal:
        restart(world)
    assert refusal.value.code == "not_ready"
    restart(world, 2)
    until_serving(world, 2)


def test_a_restart_past_its_drain_limit_is_postponed_and_tried_again():
    world = group(2, instances=3)
    world.long_request_until = world.now + 50
    cuts = Cuts(world)
    restart(world, 3)
    steps(world, cuts.look, lambda: bool(last(world).error))
    assert (last(world).id, last(world).state) == ("restart", "withdrawn")
    world.run(1)
    assert {one.fence for one in engines(world).values()} <= {"open"}
    assert all(world.hosts[name].ready for name in ("h0", "h1"))
    steps(world, cuts.look, lambda: world.serving(3))
    assert cuts.found == []


def test_a_restart_that_changes_no_size_is_not_tried_again_and_says_so():
    world = group(2)
    world.long_request_until = world.now + 50
    restart(world)
    ended = until_ended(world, "restart")
    assert ended.state == "withdrawn"
    assert "ask again for the restart" in ended.error
    world.run(60)
    assert last(world).id == "restart"
    restart(world, operation="again")
    assert until_ended(world, "again").state == "succeeded"


def test_a_restart_past_its_drain_limit_is_cut_where_the_policy_says_so():
    world = group(2, drain_policy="abort")
    world.long_request_until = world.now + 1000
    restart(world)
    ended = until_ended(world, "restart")
    assert ended.state == "succeeded"
    assert ended.ended < world.long_request_until


def test_a_start_that_fails_in_a_restart_is_recovered():
    world = group(2)
    world.faults.start = "exit"
    restart(world)
    ended = until_ended(world, "restart")
    assert ended.state == "failed"
    assert "CUDA out of memory" in ended.error
    until_serving(world, 2)
    assert last(world).kind == "recover"


# --- who leaves ---------------------------------------------------------------------------------


def test_the_highest_rank_that_leaves_costs_no_restart():
    world = group(3)
    world.hosts["h2"].leaving = True
    until(world, lambda: world.hosts["h2"].goal.released)
    assert last(world).kind == "scale_down"
    assert world.status.generation == 1
    assert world.serving(2)


@pytest.mark.parametrize(("name", "left"), [("h0", "h1"), ("h1", "h0")])
def test_a_rank_that_leaves_from_the_middle_costs_one_planned_restart(name, left):
    world = group(3)
    world.hosts[name].leaving = True
    cuts = Cuts(world)
    early = []

    def look() -> None:
        cuts.look()
        if world.hosts[name].goal.released and engines(world).get(name):
            early.append(world.now)

    steps(world, look, lambda: world.hosts[name].goal.released)
    until_serving(world, 2)
    ended = last(world)
    assert (ended.kind, ended.state) == ("restart", "succeeded")
    assert f"{name} leaves from the middle" in ended.reason
    assert ranks(world) == {0: left, 1: "h2"}
    assert world.status.generation == 2
    assert not early
    assert cuts.found == []
    world.run(20)
    assert world.status.generation == 2
    assert world.status.reason == "TooFewInstances"


def test_a_standby_takes_the_place_of_a_rank_that_leaves():
    world = group(3, instances=4)
    world.hosts["h1"].leaving = True
    until(world, lambda: world.hosts["h1"].goal.released)
    until_serving(world, 3)
    assert ranks(world) == {0: "h0", 1: "h2", 2: "h3"}
    assert world.status.generation == 2


def test_a_standby_that_leaves_is_released_at_once():
    world = group(2, instances=3)
    world.hosts["h2"].leaving = True
    world.run(2)
    assert world.hosts["h2"].goal.released
    assert world.status.history[-1].kind == "start"


def test_the_order_of_ordinals_is_restored_by_one_planned_restart():
    world = group(3, ordinals=True)
    world.remove("h0")
    until_serving(world, 2)
    assert ranks(world) == {0: "h1", 1: "h2"}
    world.add("h0", 0)
    until_serving(world, 3)
    ended = last(world)
    assert (ended.kind, ended.reason) == ("restart", "the order of ranks is restored")
    assert ranks(world) == {0: "h0", 1: "h1", 2: "h2"}
    assert world.status.generation == 3


def test_under_the_smallest_size_the_group_stops_and_says_why():
    world = group(2)
    world.hosts["h1"].leaving = True
    cuts = Cuts(world)
    steps(world, cuts.look, lambda: last(world).kind == "restart")
    ended = last(world)
    assert (ended.state, ended.to_size) == ("succeeded", 0)
    assert "h1 leaves and 1 would be left, under the smallest size 2" in ended.reason
    assert engines(world) == {}
    assert cuts.found == []
    until(world, lambda: world.hosts["h1"].goal.released)
    world.run(30)
    status = world.status
    assert (status.state, status.reason, status.size) == ("Waiting", "BelowMinReplicas", 0)
    assert "1 of 2 instances can serve" in status.message, story(world)
    assert not member(world, "h0").ready
    world.add("h2")
    until_serving(world, 2)


# --- a group that follows -----------------------------------------------------------------------


def test_a_group_that_follows_is_as_many_as_are_there():
    world = following(2)
    world.add("h2")
    world.add("h3")
    until_serving(world, 4)
    world.hosts["h3"].leaving = True
    until(world, lambda: world.hosts["h3"].goal.released)
    until_serving(world, 3)
    assert world.status.generation == 1
    assert not world.broken


def test_a_group_that_follows_has_no_target():
    world = following(2)
    with pytest.raises(Rejected, match="follows who is there") as refusal:
        world.put(3)
    assert refusal.value.code == "invalid"


def following(size: int) -> World:
    return group(size, policy="follow")


def test_a_restart_of_a_group_that_follows_keeps_its_size():
    world = following(3)
    restart(world)
    until_ended(world, "restart")
    assert world.serving(3)


def test_the_drain_of_a_restart_ends_only_when_connections_are_gone():
    world = group(2)
    world.long_request_until = world.now + 6
    restart(world)
    drain = until_phase(world, "restart", "drain")
    assert drain.phase == "drain"
    world.run(4)
    assert world.status.operation.phase == "drain"
    assert {one.fence for one in engines(world).values()} == {"paused"}
    until_ended(world, "restart")


def test_a_restart_begins_no_drain_while_a_rank_is_silent():
    """Nobody could say when that one is drained, and all gates would be shut until the limit."""
    world = group(3)
    world.freeze_sidecar("h1", 1000)
    until(world, lambda: world.status.reason == "RanksSuspect")
    operation = restart(world).id
    while (ended := world.group.operation(operation, world.now)).ended is None:
        assert not any(one.fence == "paused" for one in engines(world).values())
        world.step()
    assert ended.state == "withdrawn"
    assert "nothing is heard from h1" in ended.error
    assert not world.broken


def test_a_group_that_follows_takes_a_lower_ordinal_in_only_when_nobody_comes_any_more():
    """Else the one that came last would cost a restart before the group grows."""
    world = World(small_config(policy="follow", size=None, settle=3.0))
    for number in (1, 2):
        world.add(f"h{number}", number)
    until_serving(world, 2)
    world.add("h0", 0)
    until_serving(world, 3)
    kinds = [one.kind for one in world.status.history]
    assert kinds == ["start", "restart"]
    assert ranks(world) == {0: "h0", 1: "h1", 2: "h2"}
