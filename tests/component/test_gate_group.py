"""A group of gated engines resizes and restarts under load: no request fails, no stream is cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.contract import http_client
from support.gate import until
from support.launcher import LauncherGroup

TOKENS = 20


@dataclass
class Load:
    """What closed-loop clients saw, one streaming completion after the other."""

    group: LauncherGroup
    ranks: list[int]
    done: int = 0
    wrong: list[str] = field(default_factory=list)

    async def _ask(self, client: httpx.AsyncClient, rank: int) -> None:
        body = {"model": "sim", "prompt": "x", "max_tokens": TOKENS, "stream": True}
        try:
            async with client.stream(
                "POST", self.group[rank].url + "/v1/completions", json=body
            ) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            parts = [json.loads(line[6:])["choices"][0] for line in lines[:-1]]
            reasons = {part["finish_reason"] for part in parts} - {None}
            if answer.status_code != 200 or lines[-1] != "data: [DONE]" or reasons != {"length"}:
                self.wrong.append(f"rank {rank}: {answer.status_code} {lines[-1:]} {reasons}")
        except (httpx.HTTPError, ValueError) as error:
            self.wrong.append(f"rank {rank}: {error!r}")
        self.done += 1

    async def client(self, number: int) -> None:
        async with http_client(30) as client:
            while True:
                await self._ask(client, self.ranks[number % len(self.ranks)])

    async def more(self, count: int = 8) -> None:
        """Wait until so many more requests were answered."""
        wanted = self.done + count
        while self.done < wanted:  # noqa: ASYNC110  many tasks count
            await asyncio.sleep(0.01)


@asynccontextmanager
async def load(group: LauncherGroup, ranks: Iterable[int], clients: int = 6) -> AsyncIterator[Load]:
    load = Load(group, list(ranks))
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(load.client(number)) for number in range(clients)]
        await load.more()
        yield load
        await load.more()
        for one in running:
            one.cancel()
    assert load.wrong == []


@pytest.fixture
def group(tmp_path: Path) -> Iterator[LauncherGroup]:
    with LauncherGroup(tmp_path, 3) as group:
        yield group


async def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Let the clients run meanwhile."""
    return await asyncio.to_thread(work, *args)


def fence(group: LauncherGroup, rank: int, mode: str) -> None:
    assert group[rank].gate("PUT", "/fence", {"mode": mode})[0] == 200


def drained(group: LauncherGroup, rank: int) -> None:
    """Nothing is left on a rank: no request, no connection."""

    def empty() -> bool:
        state = group[rank].gate("GET", "/state")[1]
        return not (state["in_flight"] or state["held"] or state["open_connections"])

    until(empty, 20)


async def test_a_group_grows_and_shrinks_and_no_request_fails(group: LauncherGroup) -> None:
    await apart(group.start, 2)
    async with load(group, [0, 1]) as clients:
        outcomes = await apart(group.resize, 2, 3)
        assert [one["state"] for one in outcomes] == ["succeeded"] * 2
        assert await apart(group[2].status, "/v1/models") == 200
        clients.ranks = [0, 1, 2]
        await clients.more(20)
        clients.ranks = [0, 1]
        fence(group, 2, "lame_duck")
        await apart(drained, group, 2)
        fence(group, 2, "closed")
        outcomes = await apart(group.resize, 3, 2)
        assert [one["state"] for one in outcomes] == ["succeeded"] * 3
        assert group[2].gate("GET", "/state")[1]["retired"]
        assert group[2].state()["engine"]["phase"] == "running", "it waits to be stopped"
        launch = group[2].state()["engine"]["launch"]
        assert group[2].stop(launch, 5)[0] == 202
        await apart(group[2].until, "absent")
    for rank in (0, 1):
        state = group[rank].gate("GET", "/state")[1]
        assert (state["hold_refused"], state["hold_timed_out"], state["dp_size"]) == (0, 0, 2)


async def test_a_group_restarts_warm_and_no_request_fails(group: LauncherGroup) -> None:
    """A planned warm restart: new connections wait in the backlog for the next generation."""
    await apart(group.start, 2)
    async with load(group, [0, 1]) as clients:
        for size in (3, 2):
            running = [rank for rank in range(3) if group[rank].state()["engine"]["launch"]]
            for rank in running:
                fence(group, rank, "paused")
            for rank in running:
                await apart(drained, group, rank)
            await apart(group.stop)
            await apart(group.start, size)
            await clients.more(20)
            clients.ranks = [0, 1]
