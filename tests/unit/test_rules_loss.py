"""When a rank is lost and when the group hangs: never because somebody is silent alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from elasticmoe_coordinator.core.book import Book
from elasticmoe_coordinator.core.loss import Stall, gone
from elasticmoe_coordinator.core.members import Roster
from elasticmoe_coordinator.core.outbox import Rejected
from elasticmoe_coordinator.core.view import View
from elasticmoe_protocol.messages import (
    EngineReport,
    Exit,
    GateReport,
    Hello,
    Member,
    Record,
    Report,
)
from support.rules import (
    engine,
    engines,
    facts,
    group,
    last,
    member,
    restart,
    story,
    until,
    until_ended,
    until_phase,
    until_serving,
)
from support.virtual import World, small_config

# --- a group that hangs, by the numbers ---------------------------------------------------------


@dataclass
class Bench:
    """Ranks that say what a test has them say, and the rule about hanging."""

    size: int = 3
    now: float = 100.0
    gates: dict[str, GateReport | None] = field(default_factory=dict)
    launcher: dict[str, bool] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    still: bool = False

    def __post_init__(self) -> None:
        self.config = small_config()
        self.roster = Roster(silence=self.config.suspect_after * self.config.heartbeat)
        members = tuple(Member(instance=f"h{n}", rank=n, launch=f"L{n}") for n in range(self.size))
        self.book = Book(Record(generation=1, members=members), lambda: "", 10)
        for one in members:
            hello = Hello(
                deployment="moe",
                instance=one.instance,
                incarnation="p",
                boot="b",
                facts=facts(),
            )
            self.roster.hello(hello, self.now)
            self.gates[one.instance] = GateReport(launch=one.launch)
        self.stall = Stall(self.now)
        self._seq = 0

    def gate(self, name: str, **changes: object) -> None:
        """Have a gate say something else."""
        fields = {"launch": f"L{name[1:]}", "in_flight": 1} | changes
        self.gates[name] = GateReport(**fields)  # type: ignore[arg-type]

    def judge(self) -> str:
        """One turn after half a second in which all that aren't silent reported."""
        self.now += 0.5
        self._seq += 1
        for name, gate in self.gates.items():
            if name not in self.silent:
                report = Report(
                    deployment="moe",
                    instance=name,
                    boot="b",
                    seq=self._seq,
                    engine=EngineReport(phase="running", launch=f"L{name[1:]}"),
                    gate=gate,
                )
                self.roster.note(report, self.now)
        view = View(self.config, self.roster, self.book, self.now, {})
        return self.stall.judge(view, self.still)

    def until_lost(self, seconds: float = 60.0) -> float | None:
        """Seconds until the group is judged to hang, None when it never is."""
        began = self.now
        while self.now - began < seconds:
            if self.judge():
                return self.now - began
        return None

    def serve(self) -> None:
        """All ranks answered requests, so no compile is under way any more."""
        for step in range(4):
            for name in self.gates:
                self.gate(name, progress=step)
            assert self.judge() == ""


def test_requests_that_run_without_progress_are_a_loss_after_the_limit():
    bench = Bench()
    bench.serve()
    assert bench.until_lost() == bench.config.stall


def test_without_requests_nothing_is_expected():
    bench = Bench()
    bench.serve()
    for name in bench.gates:
        bench.gate(name, in_flight=0, progress=3)
    assert bench.until_lost() is None


def test_while_one_rank_progresses_the_others_may_stand():
    bench = Bench()
    bench.serve()
    for step in range(100):
        bench.gate("h2", progress=10 + step)
        assert bench.judge() == ""


def test_progress_begins_the_limit_anew():
    bench = Bench()
    bench.serve()
    for _ in range(int(2 * bench.config.stall) - 1):
        assert bench.judge() == ""
    bench.gate("h1", progress=99)
    assert bench.judge() == ""
    assert bench.until_lost() == bench.config.stall


def test_the_first_step_may_compile_for_longer():
    bench = Bench()
    for name in bench.gates:
        bench.gate(name)
    assert bench.config.compile_limit > bench.config.stall
    lost = bench.until_lost()
    assert lost is not None
    assert bench.config.compile_limit <= lost <= bench.config.compile_limit + 0.5


def test_a_new_layout_may_compile_again():
    bench = Bench()
    bench.serve()
    members = bench.book.record.members[:2]
    bench.book.update(members=members)
    lost = bench.until_lost()
    assert lost is not None
    assert lost >= bench.config.compile_limit


@pytest.mark.parametrize("scaling", [True, False])
def test_a_commit_is_not_counted(scaling):
    bench = Bench()
    bench.serve()
    bench.still = not scaling
    bench.book.begin("scale_up", "prepare", bench.now, to_size=4)
    bench.gate("h0", progress=3, scaling=scaling)
    assert bench.until_lost() is None
    bench.still = False
    bench.gate("h0", progress=3)
    assert bench.until_lost() == bench.config.stall


def test_a_gate_that_stays_shut_when_the_resize_is_over_hangs():
    bench = Bench()
    bench.serve()
    bench.gate("h0", progress=3, scaling=True, in_flight=0, held=2)
    assert bench.until_lost() == bench.config.stall


def test_silence_of_most_is_the_coordinators_own_trouble():
    bench = Bench()
    bench.serve()
    bench.silent = {"h1", "h2"}
    assert bench.until_lost() is None
    bench.silent = {"h2"}
    assert bench.until_lost() == bench.config.stall


def test_who_is_silent_while_the_group_hangs_is_named():
    bench = Bench()
    bench.serve()
    bench.silent = {"h1"}
    assert bench.until_lost() is not None
    assert "nothing is heard from h1" in bench.judge()


def test_a_silent_rank_is_not_lost_while_the_others_have_nothing_to_do():
    bench = Bench()
    bench.serve()
    for name in bench.gates:
        bench.gate(name, in_flight=0, progress=3)
    bench.silent = {"h1"}
    assert bench.until_lost() is None


def test_an_api_server_that_does_not_answer_hangs_also_without_requests():
    """Its launcher says that the process is there, so nobody else would ever notice."""
    bench = Bench()
    bench.serve()
    for name in bench.gates:
        bench.gate(name, in_flight=0, progress=3)
    bench.gates["h1"] = None
    lost = bench.until_lost()
    assert lost is not None
    assert lost >= bench.config.stall


def test_time_in_which_the_coordinator_stood_still_is_not_counted():
    bench = Bench()
    bench.serve()
    bench.now += 1000
    bench.stall.shift(1000, bench.now)
    bench.roster.shift(1000, bench.now)
    assert bench.judge() == ""
    assert bench.until_lost() is not None


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        (EngineReport(phase="running", launch="L1"), ""),
        (EngineReport(phase="starting", launch="L1"), ""),
        (EngineReport(phase="absent"), "its engine is gone"),
        (EngineReport(phase="stopping", launch="L1"), "its engine is gone"),
        (EngineReport(phase="running", launch="other"), "its engine is gone"),
        (
            EngineReport(
                phase="exited",
                launch="L1",
                exit=Exit(process="engine core", code=-9, reason="killed by signal 9"),
            ),
            "killed by signal 9",
        ),
    ],
)
def test_the_launchers_word_decides(said, lost):
    bench = Bench()
    bench.judge()
    report = Report(deployment="moe", instance="h1", boot="b", seq=99, engine=said)
    bench.roster.note(report, bench.now)
    view = View(bench.config, bench.roster, bench.book, bench.now, {})
    found = gone(view, bench.book.record.members[1])
    assert found == (f"h1 (rank 1): {lost}" if lost else "")


# --- the whole group ----------------------------------------------------------------------------


def kept(world: World, generation: int = 1) -> bool:
    """Nothing was started again."""
    status = world.status
    return status.generation == generation and status.state == "Serving"


def test_a_silent_sidecar_makes_its_rank_suspect_and_nothing_more():
    world = group(3)
    config = world.config
    world.freeze_sidecar("h1", 60)
    world.run(config.heartbeat * (config.suspect_after - 1))
    assert not member(world, "h1").suspect
    world.run(config.heartbeat * 2)
    assert member(world, "h1").suspect
    world.run(50)
    assert kept(world), story(world)
    assert world.starts == 3
    world.run(10)
    assert not member(world, "h1").suspect


def test_a_rank_that_nobody_reaches_is_not_lost_while_the_others_progress():
    world = group(3)
    world.hosts["h1"].there = False  # cut off: its engine computes on
    world.run(120)
    assert kept(world), story(world)
    assert engine(world, "h1").there
    world.hosts["h1"].there = True
    world.run(5)
    assert kept(world)
    assert world.starts == 3


def test_a_host_that_is_gone_is_lost_only_when_requests_wait_for_it():
    world = group(3, traffic=False)
    world.run(2)
    world.remove("h1")
    world.run(60)
    assert kept(world), story(world)
    world.traffic = True
    asked = world.now
    until(world, lambda: world.status.state == "Recovering")
    limit = world.config.compile_limit  # these ranks had answered nothing yet
    assert limit <= world.now - asked <= limit + 5
    until_serving(world, 2)


def test_an_exit_that_nobody_ordered_is_a_loss_at_once():
    world = group(3)
    world.kill_engine("h1")
    world.run(2 * world.config.heartbeat)
    status = world.status
    assert status.state == "Recovering"
    assert status.operation.reason == "h1 (rank 1): killed by signal 9"
    until_serving(world, 3)
    assert world.status.generation == 2


def test_an_exit_is_a_loss_at_once_also_when_only_the_launcher_can_say_so():
    world = group(3)
    world.freeze_sidecar("h1", 30)
    world.run(3)
    world.kill_engine("h1")
    world.run(4)
    assert world.status.state == "Recovering"
    assert "h1 (rank 1)" in world.status.operation.reason


def test_engines_that_hang_with_requests_are_lost_after_the_limit():
    world = group(3)
    world.run(5)
    engine(world, "h0").topology.broken = True
    hung = world.now
    until(world, lambda: world.status.state == "Recovering")
    assert world.config.stall <= world.now - hung <= world.config.stall + 3
    assert "no rank made progress" in world.status.operation.reason
    until_serving(world, 3)


def test_an_api_server_that_hangs_is_no_loss_while_another_rank_progresses():
    world = group(3)
    world.run(5)
    engine(world, "h1").frozen = True
    world.run(60)
    assert kept(world), story(world)
    for name in ("h0", "h2"):
        engine(world, name).frozen = True
    until(world, lambda: world.status.state == "Recovering", 20)
    until_serving(world, 3)


def test_the_coordinator_waits_while_most_ranks_are_silent():
    world = group(3)
    world.run(5)
    engine(world, "h0").topology.broken = True
    for name in ("h1", "h2"):
        world.freeze_sidecar(name, 60)
    world.run(59)
    assert kept(world), story(world)
    until(world, lambda: world.status.state == "Recovering", 20)


def test_a_group_that_can_not_be_judged_for_silence_says_so():
    world = group(3)
    world.run(3)
    for name in ("h1", "h2"):
        world.remove(name)
    world.run(60)
    status = world.status
    assert kept(world)
    assert status.reason != "AsDesired"
    assert "h1" in status.message


def test_a_long_request_is_progress():
    world = group(3)
    world.long_request_until = world.now + 90
    world.run(90)
    assert kept(world), story(world)


def test_a_coordinator_that_stood_still_loses_nobody():
    world = group(3)
    world.run(5)
    world.freeze_coordinator(300)
    world.faults.drop = 1.0
    world.run(299)
    # It wakes up before any sidecar can reach it, and what they sent meanwhile is lost.
    for host in world.hosts.values():
        host.frozen_until = world.coordinator_until + 1
    world.run(1.5)
    assert not any(one.suspect for one in world.status.instances)
    world.faults.drop = 0.0
    world.run(60)
    assert kept(world), story(world)
    assert world.starts == 3


def test_a_loss_during_a_resize_ends_it_and_recovers_to_the_size_that_was_asked_for():
    world = group(2, instances=3)
    operation = world.put(3)
    until_phase(world, "scale_up", "prepare")
    world.kill_engine("h1")
    ended = until_ended(world, operation)
    assert ended.state == "failed"
    assert "h1 (rank 1): killed by signal 9" in ended.error
    until_serving(world, 3)
    assert last(world).kind == "recover"


# --- a person decides ---------------------------------------------------------------------------


def lost_by_policy() -> World:
    world = group(3, loss_policy="none")
    world.run(5)
    world.kill_engine("h1")
    world.run(5)
    return world


def test_by_policy_a_loss_is_left_to_a_person():
    world = lost_by_policy()
    world.run(60)
    status = world.status
    assert (status.state, status.reason) == ("Failed", "RankLost")
    assert "h1 (rank 1): killed by signal 9" in status.message
    assert "ask for a restart" in status.message
    assert world.starts == 3
    assert not any(one.ready for one in status.instances)
    assert set(engines(world)) == {"h0", "h2"}


def test_a_loss_left_to_a_person_refuses_another_size_and_a_restart_heals_it():
    world = lost_by_policy()
    with pytest.raises(Rejected, match="ask for a restart first") as refusal:
        world.put(2)
    assert refusal.value.code == "not_ready"
    restart(world, operation="mend")
    assert until_ended(world, "mend").state == "succeeded"
    until_serving(world, 3)
    assert world.status.reason == "AsDesired"


def test_a_loss_left_to_a_person_stays_so_for_the_next_coordinator():
    world = lost_by_policy()
    world.restart_coordinator()
    world.run(20)
    assert (world.status.state, world.status.reason) == ("Failed", "RankLost")
    assert world.starts == 3
    restart(world)
    until_serving(world, 3)
