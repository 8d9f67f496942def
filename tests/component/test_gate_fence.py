"""A rank that is about to leave or to be restarted: late requests go elsewhere or wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from elasticmoe_engine.gate import fence
from elasticmoe_engine.listener import BACKLOG
from support import gate_engine
from support.gate import GatedServer, head_of, request, until

FENCES = ("lame_duck", "closed", "paused")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GatedServer]:
    with GatedServer(tmp_path) as server:
        yield server


@pytest.mark.parametrize("mode", FENCES)
async def test_a_request_accepted_before_the_fence_is_never_cut(
    server: GatedServer, mode: str
) -> None:
    async with server.client() as client, client.stream("POST", "/v1/stream") as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == "data: 0"
        server.fence(mode)
        server.go.set()
        rest = [line async for line in lines if line]
    assert rest == [f"data: {number}" for number in range(1, 5)]
    server.until(in_flight=0, completed=1, late_refused=0)


@pytest.mark.parametrize("mode", FENCES)
def test_a_kept_alive_connection_ends_with_its_next_answer(server: GatedServer, mode: str) -> None:
    with server.connect() as connection:
        connection.sendall(request("/v1/echo", 1))
        assert head_of(connection)[0] == 200
        server.fence(mode)
        connection.sendall(request("/v1/echo", 2))
        status, headers, _ = head_of(connection)
        assert status == (503 if mode == "closed" else 200)
        assert headers["connection"] == "close"
        assert connection.recv(1) == b""
    server.until(open_connections=0)


def test_a_lame_duck_serves(server: GatedServer) -> None:
    server.fence("lame_duck")
    with server.connect() as connection:
        connection.sendall(request("/v1/echo", 1))
        status, headers, body = head_of(connection)
    assert (status, headers["connection"], json.loads(body)) == (200, "close", {"length": 1})
    assert server.state()["late_refused"] == 0


def test_a_closed_rank_refuses_and_counts(server: GatedServer) -> None:
    server.fence("closed")
    gate_engine.scaling = True
    with server.connect() as connection:
        connection.sendall(request("/v1/echo", 1))
        status, headers, _ = head_of(connection)
    assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
    server.until(late_refused=1, held=0, open_connections=0)
    assert not server.calls


def test_a_retired_rank_refuses_and_counts(server: GatedServer) -> None:
    gate_engine.retired = gate_engine.scaling = True
    with server.connect() as connection:
        connection.sendall(request("/v1/echo", 1))
        status, headers, _ = head_of(connection)
    assert (status, headers["retry-after"]) == (503, "1")
    server.until(late_refused=1, retired=True)


async def test_what_is_held_when_the_rank_retires_is_refused(server: GatedServer) -> None:
    gate_engine.scaling = True
    async with server.client() as client:
        call = asyncio.create_task(client.post("/v1/echo", json=1))
        await server.until_async(held=1)
        gate_engine.retired = True
        answer = await call
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    server.until(held=0, late_refused=1)


@pytest.mark.parametrize("through", ["open", "lame_duck"])
def test_while_paused_new_connections_wait_in_the_kernel(server: GatedServer, through: str) -> None:
    server.fence("paused")
    with server.connect() as first, server.connect() as second:
        first.sendall(request("/v1/echo", 1))
        second.sendall(request("/v1/echo", 2))
        until(lambda: server.waiting == 2)
        assert server.state()["open_connections"] == 0
        server.fence("paused")  # again changes nothing
        assert server.waiting == 2
        server.fence(through)
        for connection in (first, second):
            status, headers, _ = head_of(connection)
            assert status == 200
            assert headers.get("connection") == ("close" if through == "lame_duck" else None)
    assert server.calls == {"/v1/echo": 2}


def test_the_backlog_is_large_while_nobody_accepts(server: GatedServer) -> None:
    assert server.backlog < BACKLOG, "uvicorn had its own way"
    server.fence("paused")
    assert server.backlog == BACKLOG
    server.fence("open")
    assert server.backlog == BACKLOG


def test_what_waits_outlives_the_server(tmp_path: Path) -> None:
    """A planned warm restart: the next engine serves the connection."""
    with GatedServer(tmp_path) as server:
        server.fence("paused")
        connection = server.connect()
        connection.sendall(request("/v1/echo", 1))
        until(lambda: server.waiting == 1)
        listener = server.listener.dup()
    with connection, GatedServer(tmp_path, listener=listener) as following:
        assert head_of(connection)[0] == 200
        assert following.calls == {"/v1/echo": 1}


def test_a_connection_that_asks_nothing_is_closed_under_a_fence(
    server: GatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "UNUSED_LIMIT_S", 0.3)
    with server.connect() as connection:
        server.until(open_connections=1, idle_s=0.0)
        server.fence("lame_duck")
        assert connection.recv(1) == b""
    idle = until(lambda: server.state()["idle_s"])
    assert until(lambda: server.state()["idle_s"] > idle)
