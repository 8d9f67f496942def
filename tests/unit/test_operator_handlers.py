"""The loop of a deployment: what makes it look, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import kopf
import pytest
from elasticmoe_operator import names
from elasticmoe_operator.builders.common import Platform
from elasticmoe_operator.handlers import Operator
from elasticmoe_operator.settings import Settings
from support.operator_apis import Cluster, Coordinator
from support.operator_world import DELETED, body, group, look

LONG = 600.0
SETTINGS = Settings(
    platform=Platform(image="elasticmoe:1", namespace="operators"), busy=LONG, calm=LONG
)


class Running:
    """An operator with one deployment, whose own pauses never end within a test."""

    def __init__(self) -> None:
        self.cluster = Cluster(3)
        self.coordinator = Coordinator(self.cluster)
        self.operator = Operator(SETTINGS, self.cluster, self.coordinator)  # type: ignore[arg-type]
        self.events: list[str] = []
        self.tag("one")

    def tag(self, tag: str) -> None:
        """The coordinator's status is another one."""
        self.cluster.group = replace(group(3), tag=tag)

    async def changed(self, type: str, **more: Any) -> None:
        """The deployment's own watch tells."""
        key = ("ns", "moe")
        seen = look(3)
        indexes: dict[str, Any] = {
            "pods": {key: seen.pods},
            "ranks": {key: [seen.ranks]},
            "coordinators": {},
        }
        status = {"status": self.cluster.status}
        await self.operator.changed(kopf.Body(body(3, **more) | status), type, **indexes)

    def looks(self) -> int:
        """How often the group was looked at."""
        return len(self.cluster.told("get", "group"))

    def waits(self) -> list[Any]:
        """What the coordinator was asked to tell changes of."""
        return self.cluster.told("wait", "group")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 (what is asked for is told by no event)
                await asyncio.sleep(0.005)

    async def rests(self) -> int:
        """It waits for a change; returns the looks until then."""
        await self.until(lambda: bool(self.waits()))
        looks = self.looks()
        assert len(self.waits()) == looks
        return looks


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    made = Running()
    # kopf's own takes them within its handlers only.
    monkeypatch.setattr(kopf, "event", lambda *_, reason, **__: made.events.append(reason))
    await made.operator.startup(kopf.OperatorSettings())
    await made.changed("ADDED")
    yield made
    await made.operator.cleanup()


async def test_it_waits_with_the_status_that_it_looked_at(running: Running):
    await running.rests()
    assert running.waits() == [("one", LONG)]


async def test_what_the_coordinator_does_by_itself_is_looked_at_at_once(running: Running):
    looks = await running.rests()
    running.tag("two")
    running.coordinator.change.set()
    await running.until(lambda: running.looks() > looks)
    running.coordinator.change.clear()
    await running.until(lambda: running.waits()[-1] == ("two", LONG))


async def test_a_coordinator_that_goes_away_is_looked_at_and_not_waited_for(running: Running):
    looks = await running.rests()
    running.cluster.group = None
    running.coordinator.change.set()
    await running.until(lambda: running.looks() > looks)
    await running.until(lambda: "message" in running.cluster.status)
    waits = len(running.waits())
    await running.changed("MODIFIED")
    await running.until(lambda: running.looks() > looks + 1)
    assert len(running.waits()) == waits
    assert running.events == ["CoordinatorUnavailable"]


async def test_a_coordinator_of_an_older_version_is_not_waited_for(running: Running):
    looks = await running.rests()
    running.tag("")
    await running.changed("MODIFIED")
    await running.until(lambda: running.looks() > looks)
    await running.changed("MODIFIED")
    await running.until(lambda: running.looks() > looks + 1)
    assert running.waits() == [("one", LONG)]


async def test_a_child_that_changed_is_looked_at_at_once(running: Running):
    looks = await running.rests()
    metadata = {"namespace": "ns", "name": "moe-0", "labels": {names.DEPLOYMENT: "moe"}}
    pod = {"kind": "Pod", "metadata": metadata}
    await running.operator.wake(kopf.Body(pod), "MODIFIED")  # type: ignore[arg-type]
    await running.until(lambda: running.looks() > looks)


async def test_a_deployment_that_is_gone_is_not_looked_at(running: Running):
    await running.rests()
    await running.changed("DELETED")
    await running.until(lambda: not running.operator._loops)


@pytest.mark.parametrize(("meta", "told"), [({}, True), (DELETED, False)])
async def test_a_deployment_that_goes_is_told_no_events(running: Running, meta: Any, told: bool):
    """They would be refused, and tried again, where its namespace goes too."""
    await running.rests()
    await running.changed("MODIFIED", meta=meta)
    running.cluster.group = group(2, reason="ResizeFailed", message="it failed")
    looks = running.looks()
    await running.changed("MODIFIED", meta=meta)
    await running.until(lambda: running.looks() > looks)
    await running.changed("MODIFIED", meta=meta)
    await running.until(lambda: running.looks() > looks + 1)
    assert bool(running.events) is told


async def test_a_fault_of_ours_ends_no_loop(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    looks = await running.rests()
    with monkeypatch.context() as broken:
        broken.setattr(running.cluster, "group", object())
        await running.changed("MODIFIED")
        await running.until(lambda: "ns/moe" in caplog.text)
    await running.changed("MODIFIED")
    await running.until(lambda: running.looks() > looks + 1)
