"""The operator's client and plan against the coordinator's real HTTP API and rules."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from aiohttp.abc import AbstractResolver, ResolveResult
from elasticmoe_coordinator import http
from elasticmoe_coordinator.metrics import Metrics
from elasticmoe_operator.clients.coordinator import CoordinatorError, Coordinators
from elasticmoe_operator.core import actions, status
from elasticmoe_operator.core import plan as plans
from elasticmoe_operator.core.observed import Group, Observed, Pod
from elasticmoe_operator.core.spec import Spec
from elasticmoe_protocol import keys
from support.operator_world import other_template, ranks, spec
from support.virtual import World, small_config


class Here(AbstractResolver):
    """Every host is a socket of this one."""

    def __init__(self, sock: socket.socket) -> None:
        self.address = sock.getsockname()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = ResolveResult(
            hostname=host,
            host=self.address[0],
            port=self.address[1],
            family=socket.AF_INET,
            proto=0,
            flags=socket.AI_NUMERICHOST,
        )
        return [found]

    async def close(self) -> None:
        pass


class Api:
    """A real coordinator in virtual time, and the operator's client of it."""

    def __init__(self, world: World, folder: Path) -> None:
        assert world.group is not None
        self.world = world
        self.token = keys.load_token(folder)
        app = http.app(
            world.group, folder, Metrics(lambda: world.status, dict), "1.2.3", asyncio.Event()
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.client = Coordinators(Here(self._socket))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[Api]:
        serving = asyncio.create_task(self._server.serve([self._socket]))
        try:
            yield self
        finally:
            await self.client.close()
            self._server.should_exit = True
            await serving

    async def group(self) -> Group:
        return await self.client.status("ns", "moe")

    async def target(self, size: int, operation: str = "op", token: str = "") -> None:
        await self.client.set_target("ns", "moe", token or self.token, operation, size)


def hosts(count: int, **config: object) -> World:
    world = World(small_config(size=None, **config))
    for number in range(count):
        world.add(f"moe-{number}", number, command=spec().revision)
    world.run(8)
    return world


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    keys.ensure_keys(tmp_path)
    world = hosts(4)
    monkeypatch.setattr(http, "time", SimpleNamespace(time=lambda: world.now))
    async with Api(world, tmp_path).served() as made:
        yield made


async def test_a_group_that_nobody_told_a_size_is_read(api: Api):
    found = await api.group()
    assert (found.state, found.reason, found.size, found.desired) == ("Waiting", "NoTarget", 0, 0)
    assert found.known
    assert [one.name for one in found.instances] == [f"moe-{n}" for n in range(4)]


async def test_the_first_target_starts_the_group_and_is_found_by_its_id(api: Api):
    await api.target(2)
    found = await api.group()
    assert found.operation is not None
    assert (found.operation.id, found.operation.kind) == ("op", "start")
    assert api.world.until(lambda: api.world.serving(2))
    found = await api.group()
    ended = found.find("op")
    assert ended is not None
    assert (ended.state, found.operation) == ("succeeded", None)
    assert [name for name, _ in ended.phases] == ["wait", "start"]
    assert (found.state, found.size, found.desired, found.generation) == ("Serving", 2, 2, 1)
    assert (found.experts, found.slots_per_rank, found.elastic) == (8, 4, True)


async def test_who_is_active_and_who_may_be_deleted(api: Api):
    await api.target(2)
    assert api.world.until(lambda: api.world.serving(2))
    found = (await api.group()).instances
    assert [one.active for one in found] == [True, True, False, False]
    assert [one.safe_to_delete for one in found] == [False, False, True, True]
    assert [one.state for one in found][2:] == ["standby", "standby"]
    assert all(one.registered and one.warm for one in found)


async def test_a_change_is_told_to_who_waits_for_it(api: Api):
    await api.target(2)
    assert api.world.until(lambda: api.world.serving(2))
    tag = (await api.group()).tag
    waits = asyncio.create_task(api.client.changed("ns", "moe", tag, 30))
    assert not (await asyncio.wait({waits}, timeout=0.3))[0]
    api.world.kill_engine("moe-1")
    api.world.run(1)
    await asyncio.wait_for(waits, 5)
    assert (await api.group()).tag != tag


async def test_a_wait_for_a_change_ends(api: Api):
    tag = (await api.group()).tag
    await asyncio.wait_for(api.client.changed("ns", "moe", tag, 1), 5)
    assert (await api.group()).tag == tag


async def test_said_again_it_is_the_same_and_another_size_is_refused(api: Api):
    await api.target(2)
    assert api.world.until(lambda: api.world.serving(2))
    await api.target(3, "up")
    api.world.run(1)
    await api.target(3, "up")
    for operation in ("more", "up"):
        with pytest.raises(CoordinatorError, match=r"operation up .* is running"):
            await api.target(4, operation)
    assert api.world.until(lambda: api.world.serving(3))
    with pytest.raises(CoordinatorError, match="was used for size 3"):
        await api.target(4, "up")


async def test_refusals_come_as_one_line(api: Api):
    with pytest.raises(CoordinatorError, match="token"):
        await api.target(2, token="wrong")
    with pytest.raises(CoordinatorError, match="size 9 is not between 2 and 4"):
        await api.target(9)


async def test_a_coordinator_that_learns_is_unknown_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keys.ensure_keys(tmp_path)
    world = World(small_config())
    monkeypatch.setattr(http, "time", SimpleNamespace(time=lambda: world.now))
    async with Api(world, tmp_path).served() as api:
        assert not (await api.group()).known
        with pytest.raises(CoordinatorError, match="learning"):
            await api.target(2)


async def test_a_restart_is_found_by_its_id(api: Api):
    await api.target(2)
    assert api.world.until(lambda: api.world.serving(2))
    await api.client.restart("ns", "moe", api.token, "again")
    found = (await api.group()).operation
    assert found is not None
    assert (found.id, found.kind, found.to_size) == ("again", "restart", 2)


class Operator:
    """Plans with pods that are as many as its plan wants, and sends what it plans."""

    def __init__(self, api: Api) -> None:
        self.api, self.written = api, {}
        self.ranks, self.nudged = ranks(4), {}
        self.lowered: list[tuple[int, list[str]]] = []

    async def look(self, one: Spec) -> None:
        group = await self.api.group()
        pods = tuple(
            Pod(
                name=found.name,
                uid=found.uid,
                ordinal=found.ordinal,
                ready=found.ready,
                active=found.active,
                command=self.nudged.get(found.name, ""),
            )
            for found in group.instances
            if found.ordinal < self.ranks.replicas
        )
        seen = Observed(now=self.api.world.now, ranks=self.ranks, pods=pods, group=group)
        plan = plans.plan(
            one, seen, status.read_operation(self.written), status.read_history(self.written)
        )
        self.written = {**self.written, **status.build(one, seen, plan, self.written)}
        for action in plan.actions:
            if isinstance(action, actions.SetTarget):
                await self.api.target(action.size, action.operation_id)
            elif isinstance(action, actions.ScaleRanks):
                held = [
                    found.name
                    for found in group.instances
                    if found.ordinal >= action.replicas and not found.safe_to_delete
                ]
                self.lowered.append((action.replicas, held))
                self.ranks = replace(self.ranks, replicas=action.replicas)
            elif isinstance(action, actions.NudgePod):
                self.nudged[action.name] = action.command
                self.api.world.write_command(one.revision, action.name)
            elif isinstance(action, actions.RestartGroup):
                await self.api.client.restart("ns", "moe", self.api.token, action.operation_id)
            elif isinstance(action, actions.ApplyRanks):
                self.ranks = ranks(action.replicas, one)

    async def until(self, one: Spec, size: int) -> bool:
        for _ in range(240):
            await self.look(one)
            if self.settled(size):
                return True
            self.api.world.run(0.5)
        return False

    def settled(self, size: int) -> bool:
        progress = self.written["conditions"][1]
        return (
            self.written["replicas"] == size
            and progress["reason"] == "AsDesired"
            and self.ranks.replicas == size
        )


async def test_every_size_is_reached_with_the_real_rules(api: Api):
    operator = Operator(api)
    for size in (2, 4, 3, 4, 2, 3, 2):
        assert await operator.until(spec(size), size), "\n".join(api.world.log[-40:])
    assert not [one for one in operator.lowered if one[1]]
    results = {(one["kind"], one["result"]) for one in operator.written["history"]}
    assert results == {("ScaleUp", "Succeeded"), ("ScaleDown", "Succeeded")}
    assert not api.world.broken


async def test_other_arguments_are_restarted_in_place_with_the_real_rules(api: Api):
    operator = Operator(api)
    assert await operator.until(spec(3), 3)
    other = spec(3, template=other_template("vllm:1", ["some/model", "--seed=1"]))
    assert await operator.until(other, 3), "\n".join(api.world.log[-40:])
    assert operator.ranks.revision == other.revision
    active = [one for one in (await api.group()).instances if one.active]
    assert [one.command for one in active] == [other.revision] * 3
    last = operator.written["history"][-1]
    assert (last["kind"], last["result"]) == ("Restart", "Succeeded")
    assert [one["name"] for one in last["phases"]] == ["Update", "Restart"]
