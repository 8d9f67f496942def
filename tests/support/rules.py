"""Short cuts for the tests of the rules: groups that serve, and what became of them."""

from __future__ import annotations

from collections.abc import Callable

from elasticmoe_coordinator.core.members import Instance
from elasticmoe_coordinator.core.outbox import TargetRequest
from elasticmoe_coordinator.core.status import InstanceStatus, OperationStatus
from elasticmoe_protocol.messages import Facts, Report

from support.virtual import Engine, World, small_config


def facts(**changes: object) -> Facts:
    """What a fit instance is."""
    fields: dict[str, object] = {
        "address": "a",
        "serving_port": 1,
        "probe_port": 2,
        "rpc_port": 3,
        "engine_version": "0.33.0",
        "model": "moe",
        "num_experts": 8,
        "fingerprint": "f",
    }
    return Facts(**fields | changes)  # type: ignore[arg-type]


def instance(
    name: str, order: int = 1, *, registered_at: float = 0.0, warm: bool = True, **changes: object
) -> Instance:
    """An instance that registered and reported."""
    error = str(changes.pop("error", ""))
    report = Report(deployment="moe", instance=name, boot="b", seq=1, warm=warm, error=error)
    return Instance(
        name=name,
        order=order,
        facts=facts(**changes),
        incarnation="p",
        boot="b",
        accepted=None,
        registered_at=registered_at,
        seen=registered_at,
        gate_seen=registered_at,
        report=report,
    )


def group(
    size: int = 2,
    *,
    instances: int | None = None,
    ordinals: bool = False,
    traffic: bool = True,
    **config: object,
) -> World:
    """A group that serves at this size, with instances h0, h1, …"""
    world = World(small_config(size=size, **config), traffic=traffic)
    for number in range(size if instances is None else instances):
        world.add(f"h{number}", number if ordinals else None)
    until_serving(world, size)
    until(world, lambda: sum(host.ready for host in world.hosts.values()) == size)
    return world


def story(world: World) -> str:
    """What happened, for a test that fails."""
    status = world.status
    return "\n".join([*world.log[-60:], f"{status.state} {status.reason}: {status.message}"])


def until(world: World, condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Let time pass until then, no longer than `seconds`."""
    assert world.until(condition, seconds), story(world)


def until_serving(world: World, size: int, seconds: float = 120.0) -> None:
    """Let time pass until the group serves at this size and nothing runs."""
    until(world, lambda: world.serving(size), seconds)


def until_phase(world: World, kind: str, phase: str, seconds: float = 120.0) -> OperationStatus:
    """Let time pass until this phase of this kind of operation runs."""

    def there() -> bool:
        running = world.status.operation
        return running is not None and (running.kind, running.phase) == (kind, phase)

    until(world, there, seconds)
    running = world.status.operation
    assert running is not None
    return running


def until_ended(world: World, operation: str, seconds: float = 120.0) -> OperationStatus:
    """Let time pass until the operation of this id is over."""

    def ended() -> bool:
        return any(one.id == operation for one in world.status.history)

    until(world, ended, seconds)
    return next(one for one in world.status.history if one.id == operation)


def last(world: World) -> OperationStatus:
    """The operation that ended last."""
    return world.status.history[-1]


def request(operation: str, size: int, drain_timeout: int | None = None) -> TargetRequest:
    """What somebody asks for."""
    return TargetRequest(operation, size, drain_timeout)


def restart(world: World, size: int = 0, operation: str = "restart") -> OperationStatus:
    """Ask for a restart of all engines."""
    assert world.group is not None
    return world.group.restart(TargetRequest(operation, size), world.now)[0]


def engine(world: World, name: str) -> Engine:
    """The engine that this instance has."""
    found = world.hosts[name].engine
    assert found is not None, f"{name} has no engine"
    return found


def engines(world: World) -> dict[str, Engine]:
    """The engines that are there and did not end."""
    return {
        name: host.engine
        for name, host in world.hosts.items()
        if host.engine is not None and host.engine.there
    }


def member(world: World, name: str) -> InstanceStatus:
    """What the status says of an instance."""
    return next(one for one in world.status.instances if one.instance == name)


def ranks(world: World) -> dict[int, str]:
    """Which instance runs which rank, for all that serve."""
    return {
        one.rank: one.instance
        for one in world.status.instances
        if one.rank is not None and one.active
    }


def posted(world: World) -> dict[str, list[str]]:
    """The resizes that each engine that is there was sent."""
    return {name: list(one.posted) for name, one in engines(world).items()}


class Cuts:
    """Notices requests that an engine took and did not finish."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before: dict[Engine, tuple[int, int]] = {}
        self.found: list[str] = []

    def look(self) -> None:
        """Compare with the look before. Call it after each step."""
        present = engines(self._world)
        now = {one: (one.in_flight, one.completed) for one in present.values()}
        for one, (in_flight, completed) in self._before.items():
            left, done = now.get(one, (0, one.completed))
            if left < in_flight and done == completed:
                self.found.append(f"rank {one.spec.rank} at {self._world.now}")
        self._before = now


def steps(world: World, look: Callable[[], None], ended: Callable[[], bool]) -> None:
    """Let time pass step by step with a look after each, until then."""

    def condition() -> bool:
        look()
        return ended()

    until(world, condition)
