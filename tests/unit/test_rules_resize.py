"""Growing and shrinking in place: all goes well, and each thing that goes wrong."""

from __future__ import annotations

import itertools

import pytest
from elasticmoe_coordinator.core.outbox import Rejected
from support.rules import (
    Cuts,
    engine,
    engines,
    group,
    last,
    member,
    posted,
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
from support.virtual import ENGINE_LIMIT_S, World, small_config


def launches(world: World) -> dict[str, str]:
    return {name: one.spec.launch for name, one in engines(world).items()}


def operations(world: World) -> list[tuple[str, str, int, int]]:
    return [(one.kind, one.state, one.from_size, one.to_size) for one in world.status.history]


# --- it goes well -------------------------------------------------------------------------------


@pytest.mark.parametrize("ordinals", [False, True])
def test_growing_starts_only_the_joiners(ordinals):
    world = group(2, instances=4, ordinals=ordinals)
    before = launches(world)
    operation = world.put(4)
    ended = until_ended(world, operation)
    assert (ended.kind, ended.state, ended.from_size, ended.to_size) == (
        "scale_up",
        "succeeded",
        2,
        4,
    )
    assert world.serving(4)
    assert ranks(world) == {0: "h0", 1: "h1", 2: "h2", 3: "h3"}
    assert before.items() <= launches(world).items()
    assert all(engine(world, name).spec.joiner for name in ("h2", "h3"))
    assert not world.broken


def test_growing_goes_through_its_phases_in_order_and_times_each():
    world = group(2, instances=3)
    ended = until_ended(world, world.put(3))
    phases = [one.phase for one in ended.phases]
    assert phases[:5] == ["wait", "preflight", "launch", "prepare", "commit"]
    assert sum(one.seconds for one in ended.phases) == pytest.approx(ended.ended - ended.started)


def test_a_joiner_is_started_with_the_flags_of_the_size_that_comes():
    world = group(2, instances=4)
    until_ended(world, world.put(4))
    spec = engine(world, "h3").spec
    slots = world.status.slots_per_rank
    assert (spec.rank, spec.size, spec.master_address) == (3, 4, "h0")
    assert spec.redundant_experts == 4 * slots - world.status.num_experts


def test_a_joiner_is_ready_only_when_the_group_counts_it():
    world = group(2, instances=3)
    world.put(3)
    early = []

    def look() -> None:
        topology = engine(world, "h0").topology
        if world.hosts["h2"].ready and topology.size == 2:
            early.append(world.now)

    steps(world, look, lambda: world.serving(3))
    assert not early


@pytest.mark.parametrize("ordinals", [False, True])
def test_shrinking_retires_the_highest_ranks_and_starts_nobody(ordinals):
    world = group(4, ordinals=ordinals)
    before, starts = launches(world), world.starts
    ended = until_ended(world, world.put(2))
    assert (ended.kind, ended.state) == ("scale_down", "succeeded")
    assert world.serving(2)
    assert ranks(world) == {0: "h0", 1: "h1"}
    assert launches(world) == {name: before[name] for name in ("h0", "h1")}
    assert world.starts == starts
    assert all(member(world, name).standby for name in ("h2", "h3"))
    assert not world.broken


def test_a_leaving_rank_is_a_lame_duck_before_it_is_closed():
    world = group(3)
    world.put(2)
    seen: list[tuple[bool, str]] = []

    def look() -> None:
        leaver = world.hosts["h2"].engine
        now = (world.hosts["h2"].ready, leaver.fence) if leaver and not leaver.retired else None
        if now and (not seen or seen[-1] != now):
            seen.append(now)

    steps(world, look, lambda: world.serving(2))
    assert seen == [(True, "open"), (False, "lame_duck"), (False, "closed")]
    ended = last(world)
    lame = next(one.seconds for one in ended.phases if one.phase == "lame_duck")
    assert lame >= world.config.lame_duck


def test_who_stays_is_ready_and_open_all_through_a_shrink():
    world = group(4)
    world.put(2)
    odd = []

    def look() -> None:
        for name in ("h0", "h1"):
            if not world.hosts[name].ready or engine(world, name).fence != "open":
                odd.append((world.now, name))

    steps(world, look, lambda: world.serving(2))
    assert not odd


@pytest.mark.parametrize("size", [2, 3])
def test_a_shrink_is_sent_only_when_the_leavers_are_closed_and_have_nothing_to_do(size):
    world = group(4)
    world.long_request_until = world.now + 8
    world.put(size)
    sent = []

    def look() -> None:
        leavers = [one for name, one in engines(world).items() if int(name[1:]) >= size]
        if not sent and any(posted(world).values()):
            sent.extend((one.fence, one.in_flight) for one in leavers)
            assert world.now > world.long_request_until

    steps(world, look, lambda: world.serving(size))
    assert sent == [("closed", 0)] * (4 - size)


def test_a_request_that_came_to_a_lame_duck_at_its_end_is_finished_first():
    world = group(3)
    operation = world.put(2)
    until_phase(world, "scale_down", "close")
    engine(world, "h2").in_flight = 1
    world.long_request_until = world.now + 6
    while world.now < world.long_request_until:
        assert world.status.operation.phase == "close"
        assert not any(posted(world).values())
        world.step()
    assert until_ended(world, operation).state == "succeeded"
    assert not world.broken


def test_a_leaver_is_stopped_only_when_its_engine_says_that_it_retired():
    world = group(3)
    operation = world.put(2)
    until_phase(world, "scale_down", "commit")
    leaver = engine(world, "h2")
    world.freeze_coordinator(5)  # so that it does not see the engine retire at once
    until(world, lambda: leaver.retired, 4)
    leaver.retired = False
    world.run(20)
    assert engine(world, "h2") is leaver
    assert not leaver.stopping
    assert world.status.operation.phase == "retire"
    leaver.retired = True
    assert until_ended(world, operation).state == "succeeded"
    assert world.hosts["h2"].engine is None


def test_every_rank_is_told_once():
    world = group(3, instances=4)
    grown = world.put(4)
    until_ended(world, grown)
    assert posted(world) == {"h0": [grown], "h1": [grown], "h2": [grown], "h3": []}
    shrunk = world.put(2)
    until(world, lambda: all(shrunk in one for one in posted(world).values()))
    until_ended(world, shrunk)
    assert posted(world) == {"h0": [grown, shrunk], "h1": [grown, shrunk]}


@pytest.mark.parametrize("name", ["h0", "h1", "h2"])
def test_nothing_is_sent_before_every_participant_has_journaled_the_operation(name):
    world = group(2, instances=3)
    operation = world.put(3)
    until_phase(world, "scale_up", "launch")
    if name == "h2":  # it must have begun to start the joiner
        until(world, lambda: "h2" in engines(world))
    world.freeze_sidecar(name, 8)
    until_phase(world, "scale_up", "prepare", 3)
    frozen = world.hosts[name]
    while world.now < frozen.frozen_until:
        assert not any(posted(world).values())
        assert all(one.goal.scale is None for one in world.hosts.values())
        world.step()
    assert until_ended(world, operation).state == "succeeded"
    assert not world.broken


def test_a_shrink_waits_likewise_for_the_leaver_to_know():
    world = group(3)
    world.put(2)
    until_phase(world, "scale_down", "close")
    world.freeze_sidecar("h1", 8)
    until_phase(world, "scale_down", "prepare", 3)
    world.run(6)
    assert not any(posted(world).values())
    until_serving(world, 2)
    assert not world.broken


def test_no_request_is_cut_by_growing_and_shrinking():
    world = group(2, instances=4)
    cuts = Cuts(world)
    for size in (4, 3, 4, 2):
        world.put(size)
        steps(world, cuts.look, lambda size=size: world.serving(size))
    assert cuts.found == []
    assert not world.broken


# --- what is asked for --------------------------------------------------------------------------


def test_the_same_operation_asked_for_twice_is_the_same_operation():
    world = group(2, instances=3)
    for _ in range(40):
        world.put(3, "op")
        world.run(0.5)
    assert world.serving(3)
    assert [one.id for one in world.status.history].count("op") == 1
    assert posted(world) == {"h0": ["op"], "h1": ["op"], "h2": []}


def test_an_operation_id_stands_for_one_size():
    world = group(2, instances=3)
    world.put(3, "op")
    with pytest.raises(Rejected) as running:
        world.put(4, "op")
    assert (running.value.code, running.value.operation) == ("conflict", "op")
    until_ended(world, "op")
    with pytest.raises(Rejected, match="use another one") as ended:
        world.put(2, "op")
    assert (ended.value.code, ended.value.operation) == ("conflict", "op")
    assert world.status.desired == 3


@pytest.mark.parametrize("how", ["target", "restart"])
def test_the_same_operation_is_the_same_also_when_it_had_to_end_smaller(how):
    world = World(small_config(size=None if how == "target" else 2))
    for number in range(2):
        world.add(f"h{number}")
    if how == "restart":
        until_serving(world, 2)
    else:
        until(world, lambda: world.status.state == "Waiting")

    def ask() -> str:
        if how == "target":
            return world.group.set_target(request("op", 3), world.now)[0].id
        return restart(world, 3, "op").id

    assert ask() == "op"
    ended = until_ended(world, "op")
    assert (ended.state, ended.to_size) == ("succeeded", 2)
    assert ask() == "op"


@pytest.mark.parametrize("phase", ["preflight", "launch", "prepare", "commit"])
def test_another_size_conflicts_with_the_running_operation(phase):
    world = group(2, instances=4)
    operation = world.put(3)
    until_phase(world, "scale_up", phase)
    with pytest.raises(Rejected) as refusal:
        world.put(4)
    assert (refusal.value.code, refusal.value.operation) == ("conflict", operation)
    assert "wait until it ended" in refusal.value.reason
    assert until_ended(world, operation).state == "succeeded"
    assert world.status.desired == 3


def test_the_size_that_is_being_made_needs_no_operation_of_its_own():
    world = group(2, instances=3)
    operation = world.put(3)
    world.run(1)
    found, began = world.group.set_target(request("other", 3), world.now)
    assert (found.id, began) == (operation, False)


def test_the_present_size_needs_no_operation():
    world = group(2)
    assert world.group.set_target(request("op", 2), world.now) == (None, False)
    assert world.status.operation is None


@pytest.mark.parametrize("size", [1, 5, 0, -1])
def test_a_size_beyond_the_limits_is_refused(size):
    world = group(2)
    with pytest.raises(Rejected, match="is not between 2 and 4") as refusal:
        world.put(size)
    assert refusal.value.code == "invalid"
    assert world.status.desired == 2


def test_a_size_is_remembered_until_there_are_instances_for_it():
    world = group(2)
    operation = world.put(4)
    ended = until_ended(world, operation)
    assert (ended.state, ended.error) == (
        "withdrawn",
        "2 more instances needed: start them, they join then",
    )
    assert world.serving(2)
    world.add("h2")
    world.run(20)
    assert world.serving(2), "growing is all or nothing"
    world.add("h3")
    until_serving(world, 4)


@pytest.mark.parametrize("order", list(itertools.permutations((2, 3, 4))))
def test_any_sizes_in_a_row_end_at_the_last_one(order):
    world = group(2, instances=4)
    for size in (*order, *reversed(order)):
        until(world, lambda size=size: world.try_put(size))
    until_serving(world, order[0])
    assert not world.broken
    assert world.status.reason == "AsDesired"


# --- before anything was sent -------------------------------------------------------------------


def test_an_unfit_joiner_is_found_before_any_rank_is_told():
    world = group(2, instances=3)
    world.hosts["h2"].unfit = "its weights can't be read"
    starts = world.starts
    ended = until_ended(world, world.put(3))
    assert (ended.state, ended.error) == ("withdrawn", "h2: its weights can't be read")
    status = world.status
    assert world.serving(2)
    assert (status.elastic, status.reason) == (True, "Postponed")
    assert "weights can't be read" in status.message
    assert posted(world) == {"h0": [], "h1": []}
    assert world.starts == starts
    world.hosts["h2"].unfit = ""
    until_serving(world, 3)
    assert last(world).kind == "scale_up"


def test_a_joiner_that_exits_at_once_leaves_the_old_size_serving():
    world = group(2, instances=3)
    world.faults.joiner = "exit"
    ended = until_ended(world, world.put(3))
    assert ended.state == "withdrawn"
    assert "h2 (joining as rank 2): CUDA out of memory" in ended.error
    assert world.serving(2)
    assert world.status.elastic
    assert posted(world) == {"h0": [], "h1": []}
    until_serving(world, 3)  # tried again by itself
    assert not world.broken


@pytest.mark.parametrize("phase", ["preflight", "launch"])
def test_a_joiner_that_is_gone_before_it_was_needed_leaves_the_old_size_serving(phase):
    world = group(2, instances=3)
    operation = world.put(3)
    until_phase(world, "scale_up", phase)
    world.remove("h2")
    assert until_ended(world, operation).state == "withdrawn"
    assert world.serving(2)
    assert world.status.elastic
    assert posted(world) == {"h0": [], "h1": []}


def test_a_joiner_that_wants_to_leave_is_not_taken():
    world = group(2, instances=3)
    operation = world.put(3)
    until_phase(world, "scale_up", "preflight")
    world.hosts["h2"].leaving = True
    ended = until_ended(world, operation)
    assert (ended.state, ended.error) == ("withdrawn", "h2 left before it could join")
    until(world, lambda: world.hosts["h2"].goal.released)


def test_withdrawn_growth_is_tried_again_with_growing_pauses():
    world = group(2, instances=3)
    world.hosts["h2"].unfit = "no"
    world.put(3)
    until(world, lambda: len(world.status.history) >= 6)
    tries = world.status.history[1:]
    pauses = [after.started - before.ended for before, after in itertools.pairwise(tries)]
    config = world.config
    for number, pause in enumerate(pauses):
        least = min(config.backoff * 2**number, config.backoff_max)
        assert least <= pause <= least + 1.0


# --- the engines fail ---------------------------------------------------------------------------


def test_a_size_that_the_engines_refuse_leaves_the_group_as_it_is():
    world = group(2, instances=3)
    world.faults.resize = "refuse"
    ended = until_ended(world, world.put(3))
    assert ended.state == "failed"
    assert "status 400: cannot retain all model experts" in ended.error
    world.run(30)
    assert world.serving(2)
    status = world.status
    assert (status.elastic, status.reason) == (True, "ResizeFailed")
    assert "ask for 3 again" in status.message
    assert len(operations(world)) == 2, "not tried again by itself"
    world.faults.resize = ""
    assert until_ended(world, world.put(3)).kind == "scale_up"
    until_serving(world, 3)


def test_a_joiner_of_a_failed_resize_is_safe_to_delete_only_without_its_engine():
    world = group(2, instances=3)
    world.faults.resize = "refuse"
    until_ended(world, world.put(3))
    assert world.hosts["h2"].engine is not None
    assert not member(world, "h2").safe_to_delete
    until(world, lambda: member(world, "h2").safe_to_delete, 30)
    assert world.hosts["h2"].engine is None


def test_a_failed_prepare_costs_the_elasticity_and_the_next_resize_is_a_restart():
    world = group(2, instances=3)
    world.faults.resize = "fail_prepare"
    starts = world.starts
    ended = until_ended(world, world.put(3))
    assert (ended.kind, ended.state) == ("scale_up", "failed")
    world.run(30)
    status = world.status
    assert world.serving(2), "the old size serves on"
    assert (status.elastic, status.reason, status.generation) == (False, "ResizeFailed", 1)
    assert "failed in prepare" in status.inelastic_reason
    assert ended.error in status.inelastic_reason
    assert world.starts == starts + 1, "the joiner's start"

    again = until_ended(world, world.put(3))
    assert (again.kind, again.state, again.from_size, again.to_size) == (
        "restart",
        "succeeded",
        2,
        3,
    )
    assert again.reason == status.inelastic_reason
    assert world.serving(3)
    assert (world.status.elastic, world.status.generation) == (True, 2)
    assert not any(one.spec.joiner for one in engines(world).values())
    assert not world.broken


def test_elasticity_stays_lost_for_the_next_coordinator():
    world = group(2, instances=3)
    world.faults.resize = "fail_prepare"
    until_ended(world, world.put(3))
    reason = world.status.inelastic_reason
    world.restart_coordinator()
    until(world, lambda: world.status.state == "Serving")
    assert (world.status.elastic, world.status.inelastic_reason) == (False, reason)
    assert until_ended(world, world.put(3)).kind == "restart"


def test_back_at_its_size_a_group_without_elasticity_says_so():
    world = group(3, instances=4)
    world.faults.resize = "fail_prepare"
    until_ended(world, world.put(4))
    world.try_put(3)
    world.run(5)
    status = world.status
    assert (status.size, status.reason) == (3, "NotElastic")
    assert "the next resize is a warm restart" in status.message
    assert until_ended(world, world.put(2)).kind == "restart"
    until_serving(world, 2)
    assert not world.broken


def test_a_joiner_that_hangs_half_way_is_given_up_before_the_engines_die_of_it():
    world = group(2, instances=3)
    world.faults.joiner = "hang"
    cuts = Cuts(world)
    operation = world.put(3)
    until_phase(world, "scale_up", "prepare")
    began = world.now
    ended = until_ended(world, operation)
    assert ended.state == "failed"
    assert f"not done after {world.config.prepare_limit:g} s" in ended.error
    running = world.status.operation
    assert (running.kind, running.from_size, running.to_size) == ("restart", 2, 2)
    assert "would die of it" in running.reason
    steps(world, cuts.look, lambda: world.serving(2))
    assert world.now - began < ENGINE_LIMIT_S
    assert not cuts.found
    assert not world.broken
    status = world.status
    assert (status.elastic, status.reason, status.generation) == (True, "ResizeFailed", 2)
    assert until_ended(world, world.put(3)).kind == "scale_up"
    until_serving(world, 3)


def test_a_prepare_that_hangs_in_the_old_ranks_is_given_up_too():
    world = group(3)
    world.faults.resize = "hang"
    ended = until_ended(world, world.put(2))
    assert (ended.kind, ended.state) == ("scale_down", "failed")
    world.faults.resize = ""
    until(world, lambda: world.status.state == "Serving" and world.status.generation == 2)
    assert not world.broken
    until(world, lambda: world.try_put(2))
    until_serving(world, 2)


def test_requests_that_outlast_a_given_up_prepare_are_cut_before_the_engines_die_of_it():
    world = World(small_config(size=3, prepare_limit=240.0), engine_limit=300.0)
    for number in range(4):
        world.add(f"h{number}")
    until_serving(world, 3)
    world.faults.joiner = "hang"
    world.long_request_until = world.now + 400
    began = world.now
    until_ended(world, world.put(4), 300)
    assert not world.status.elastic
    until(world, lambda: world.status.operation is None)
    assert (last(world).kind, last(world).state) == ("restart", "succeeded")
    assert "vLLM's engines would die of it" in last(world).reason
    assert world.now - began < 300
    until_serving(world, 3)
    assert world.status.elastic
    assert not world.broken


def test_a_joiner_that_dies_after_its_handshake_costs_a_warm_restart_of_the_old_size():
    world = group(2, instances=3)
    operation = world.put(3)
    until(world, lambda: any(posted(world).values()))
    world.kill_engine("h2")
    ended = until_ended(world, operation)
    assert ended.state == "failed"
    assert "h2 (joining as rank 2): killed by signal 9" in ended.error
    assert (world.status.operation.kind, world.status.operation.to_size) == ("restart", 2)
    until_serving(world, 2)
    assert world.status.generation == 2
    assert not world.broken
    assert until_ended(world, world.put(3)).kind == "scale_up"


@pytest.mark.parametrize(("size", "kind"), [(4, "scale_up"), (2, "scale_down")])
def test_a_failed_commit_restarts_the_whole_group(size, kind):
    world = group(3, instances=4)
    world.faults.resize = "fail_commit"
    before = launches(world)
    ended = until_ended(world, world.put(size))
    assert (ended.kind, ended.state) == (kind, "failed")
    assert "failed in commit" in ended.error
    until_serving(world, size)
    assert last(world).kind == "recover"
    assert world.status.generation == 2
    assert not set(before.values()) & set(launches(world).values())


# --- the drain ----------------------------------------------------------------------------------


def test_a_drain_past_its_limit_is_postponed_and_tried_again():
    world = group(3)
    limit = world.config.drain_timeout
    world.long_request_until = world.now + 3 * limit
    cuts = Cuts(world)
    operation = world.put(2)
    until_phase(world, "scale_down", "lame_duck")
    steps(world, cuts.look, lambda: world.status.operation is None)
    ended = last(world)
    assert (ended.id, ended.state) == (operation, "withdrawn")
    assert limit <= ended.ended - ended.started <= limit + 1
    world.run(0.5)
    status = world.status
    assert (status.state, status.reason) == ("Serving", "DrainTimeout")
    assert f"still ran after {limit} s" in status.message
    world.run(0.5)
    assert {one.fence for one in engines(world).values()} == {"open"}
    assert all(host.ready for host in world.hosts.values())
    assert not any(posted(world).values())
    steps(world, cuts.look, lambda: world.serving(2))
    assert world.now > world.long_request_until
    assert cuts.found == []
    assert not world.broken


def test_a_drain_past_its_limit_is_cut_where_the_policy_says_so():
    world = group(3, drain_policy="abort")
    world.long_request_until = world.now + 1000
    operation = world.put(2)
    ended = until_ended(world, operation)
    assert ended.state == "succeeded"
    assert ended.ended < world.long_request_until
    drained = [one.seconds for one in ended.phases if one.phase in ("lame_duck", "close")]
    assert sum(drained) >= world.config.drain_timeout
    assert world.serving(2)


def test_the_limit_of_a_drain_is_the_one_that_was_asked_for():
    world = group(3)
    world.long_request_until = world.now + 1000
    world.group.set_target(request("op", 2, 5), world.now)
    ended = until_ended(world, "op")
    assert ended.state == "withdrawn"
    assert 5 <= ended.ended - ended.started <= 6.5


def test_a_postponed_shrink_is_over_when_the_old_size_is_asked_for_again():
    world = group(3)
    world.long_request_until = world.now + 1000
    until_ended(world, world.put(2))
    until(world, lambda: world.try_put(3))
    world.run(30)
    assert world.status.reason == "AsDesired", story(world)
    assert world.serving(3)


def test_a_quiet_rank_leaves_also_when_its_drain_limit_is_shorter_than_the_lame_duck():
    world = World(small_config(size=3, lame_duck=6.0), traffic=False)
    for number in range(3):
        world.add(f"h{number}")
    until_serving(world, 3)
    operation, _ = world.group.set_target(request("op", 2, drain_timeout=1), world.now)
    assert operation is not None
    assert until_ended(world, "op").state == "succeeded"
    until_serving(world, 2)


def test_a_joiner_whose_death_is_heard_before_the_commit_that_it_spoils():
    """It is heard at once, the gates a moment later: nobody waits for gates that stay shut."""
    world = group(2, instances=3)
    operation = world.put(3)
    until(world, lambda: any(one.resize for one in world.topologies))
    [topology] = world.topologies
    for name in ("h0", "h1"):
        world.hosts[name].frozen_until = world.now + 3.5
    until(world, lambda: topology.resize is not None and topology.resize.committing is not None)
    assert world.status.operation.phase == "prepare"
    world.kill_engine("h2")
    until_ended(world, operation)
    began = world.now
    until_serving(world, 2 if world.status.desired == 2 else 3)
    assert last(world).kind == "recover"
    assert world.now - began < 15
