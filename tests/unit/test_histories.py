"""Random histories of a group in virtual time, each checked against the promises.

Messages get lost, late, repeated and reordered; coordinator, sidecars, launchers, pods and engines
die at any instant and engines fail in any phase. Then all faults end, and the group has to end at
the desired size, or say why not.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from support.virtual import ENGINE_LIMIT_S, Faults, World, small_config

HOSTS = ("h0", "h1", "h2", "h3")
SETTLE_S = 400.0
STEPS = 24
host = st.sampled_from(HOSTS)


class ControlFaults(RuleBasedStateMachine):
    """Only coordinator, sidecars and the network between them fail; requests are long at times.

    Every rule is something that happens; time passes in `time_passes`.
    """

    world: World
    commands = 0
    engine_limit = 300.0
    limits: ClassVar[dict[str, float]] = {"prepare_limit": 240.0, "commit_limit": 120.0}
    """As long as the product's own: a control plane that is away longer does cost a restart."""

    @initialize(
        seed=st.integers(0, 1 << 16),
        ordinals=st.booleans(),
        policy=st.sampled_from(["declared", "declared", "follow"]),
        drain=st.sampled_from(["postpone", "postpone", "abort"]),
        keeps_state=st.booleans(),
    )
    def begin(self, seed: int, ordinals: bool, policy: str, drain: str, keeps_state: bool) -> None:
        config = small_config(policy=policy, drain_policy=drain, **self.limits)
        self.world = World(config, seed, engine_limit=self.engine_limit, keeps_state=keeps_state)
        for number, name in enumerate(HOSTS):
            if policy == "declared" or number < 3:
                self.world.add(name, number if ordinals else None)
        self.world.run(8)

    def _there(self, name: str) -> bool:
        return name in self.world.hosts and self.world.hosts[name].there

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 3.0, 5.0, 8.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(size=st.integers(2, 4))
    def target(self, size: int) -> None:
        self.world.try_put(size)
        self.world.run(0.5)

    @rule(
        drop=st.sampled_from([0.0, 0.1, 0.4]),
        delay=st.sampled_from([0.0, 0.3]),
        repeat=st.sampled_from([0.0, 0.3]),
    )
    def network(self, drop: float, delay: float, repeat: float) -> None:
        faults = self.world.faults
        faults.drop, faults.delay, faults.repeat = drop, delay, repeat

    @rule(away=st.sampled_from([0.0, 2.0, 12.0]))
    def coordinator_restarts(self, away: float) -> None:
        self.world.coordinator_until = self.world.now + away
        self.world.restart_coordinator()

    @rule(seconds=st.sampled_from([2.0, 12.0]))
    def coordinator_freezes(self, seconds: float) -> None:
        self.world.freeze_coordinator(seconds)

    @rule(name=host, away=st.sampled_from([0.0, 1.0, 10.0]))
    def sidecar_restarts(self, name: str, away: float) -> None:
        if self._there(name):
            self.world.restart_sidecar(name, away)

    @rule(name=host, seconds=st.sampled_from([2.0, 10.0]))
    def sidecar_freezes(self, name: str, seconds: float) -> None:
        if self._there(name):
            self.world.freeze_sidecar(name, seconds)

    @rule(seconds=st.sampled_from([5.0, 30.0]))
    def long_requests(self, seconds: float) -> None:
        self.world.long_request_until = self.world.now + seconds

    def teardown(self) -> None:
        world = getattr(self, "world", None)
        if world is None:
            return
        if world.amnesia:
            return
        world.faults = Faults()
        world.long_request_until = 0.0
        for one in world.hosts.values():
            one.leaving = False
        if self.commands:
            world.write_command(f"c{self.commands}")
        settled = world.until(lambda: self._settled(world), SETTLE_S)
        story = "\n".join(world.log[-120:])
        assert not world.broken, f"{world.broken}\n{story}"
        self._check(world, story)
        status = world.status
        why = f"{status.state} {status.reason}: {status.message}"
        assert settled, f"{why}\n{story}"

    def _check(self, world: World, story: str) -> None:
        """Promise 5: whatever happens to those, no engine is taken for lost."""
        assert not world.recoveries, f"{world.recoveries}\n{story}"

    @staticmethod
    def _settled(world: World) -> bool:
        """At the desired size; or a resize failed, the old size serves and the status says so."""
        status = world.status
        held = status.reason == "ResizeFailed" and bool(status.message)
        if status.state == "Waiting" and status.reason == "NoTarget":
            return True
        if any(one.next_command for one in status.instances):
            world.try_restart()
            return False
        return world.serving(status.desired) or (held and world.serving(status.size))


class Histories(ControlFaults):
    """Everything fails; the limits are short."""

    engine_limit = ENGINE_LIMIT_S
    limits: ClassVar[dict[str, float]] = {}

    @rule(name=host)
    def sidecar_freezes_long(self, name: str) -> None:
        if self._there(name):
            self.world.freeze_sidecar(name, 20.0)

    @rule(names=st.sets(host), restart=st.booleans())
    def new_command(self, names: set[str], restart: bool) -> None:
        """It comes to some launchers, to the others later; somebody may restart meanwhile."""
        there = [name for name in sorted(names) if self._there(name)]
        if there:
            self.commands += 1
            self.world.write_command(f"c{self.commands}", *there)
        if restart:
            self.world.try_restart()

    @rule(name=host)
    def engine_dies(self, name: str) -> None:
        if self._there(name):
            self.world.kill_engine(name)

    @rule(name=host)
    def launcher_restarts(self, name: str) -> None:
        if self._there(name):
            self.world.restart_launcher(name)

    @rule(name=host)
    def pod_is_replaced(self, name: str) -> None:
        if self._there(name):
            self.world.replace_host(name)

    @rule(name=host, leaving=st.booleans())
    def wants_to_leave(self, name: str, leaving: bool) -> None:
        if self._there(name):
            self.world.hosts[name].leaving = leaving

    @rule(fault=st.sampled_from(["exit", "hang"]))
    def next_joiner(self, fault: str) -> None:
        self.world.faults.joiner = fault

    @rule(fault=st.sampled_from(["refuse", "fail_prepare", "fail_commit", "hang"]))
    def next_resize(self, fault: str) -> None:
        self.world.faults.resize = fault

    @rule()
    def next_start_fails(self) -> None:
        self.world.faults.start = "exit"

    @rule()
    def next_check_fails(self) -> None:
        self.world.faults.preflight = "weights can't be read"

    def _check(self, world: World, story: str) -> None:
        """Engines are lost here."""


@pytest.mark.timeout(0)
@pytest.mark.parametrize("machine", [ControlFaults, Histories])
def test_histories(machine: type[ControlFaults], histories: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
