"""Requests that come while the engine commits wait for it; none gets the engine's own 503."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import gate_engine
from support.gate import GatedServer, request


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GatedServer]:
    with GatedServer(tmp_path, hold_max=8) as server:
        yield server


async def test_no_request_fails_in_a_commit(server: GatedServer) -> None:
    gate_engine.scaling = True
    async with server.client() as client:
        calls = [asyncio.create_task(client.post("/v1/echo", json=[n])) for n in range(8)]
        await server.until_async(held=8, in_flight=0)
        assert not server.calls
        gate_engine.scaling = False
        answers = await asyncio.gather(*calls)
    assert {one.status_code for one in answers} == {200}
    assert sorted(server.bodies) == sorted(b"[%d]" % n for n in range(8))
    server.until(held=0, in_flight=0, completed=8, hold_refused=0)


async def test_a_commit_that_begins_behind_the_gate_refuses_nothing(server: GatedServer) -> None:
    """The gate had let the request pass, and the engine would answer it with 503."""
    server.dawdle.clear()
    async with server.client() as client:
        call = asyncio.create_task(client.post("/v1/echo", json="once"))
        await server.until_async(in_flight=1, held=0)
        gate_engine.scaling = True
        server.dawdle.set()
        await server.until_async(in_flight=0, held=1)
        gate_engine.scaling = False
        assert (await call).status_code == 200
    assert server.bodies == [b'"once"']
    server.until(held=0, completed=1)


async def test_past_the_bound_a_request_is_refused_and_counted(server: GatedServer) -> None:
    gate_engine.scaling = True
    async with server.client() as client:
        calls = [asyncio.create_task(client.post("/v1/echo", json=n)) for n in range(8)]
        await server.until_async(held=8)
        refused = await client.post("/v1/echo", json="one too many")
        gate_engine.scaling = False
        await asyncio.gather(*calls)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert "try again" in refused.json()["error"]["message"]
    assert server.state()["hold_refused"] == 1
    assert len(server.bodies) == 8


async def test_past_its_time_a_request_is_refused_and_counted(tmp_path: Path) -> None:
    with GatedServer(tmp_path, hold_s=0.1) as server:
        gate_engine.scaling = True
        async with server.client() as client:
            late = await client.post("/v1/echo", json=1)
        assert (late.status_code, late.headers["retry-after"]) == (503, "5")
        assert server.state()["hold_timed_out"] == 1


def test_a_client_that_hangs_up_is_let_go(server: GatedServer) -> None:
    gate_engine.scaling = True
    with server.connect() as connection:
        connection.sendall(request("/v1/echo", "gone"))
        server.until(held=1)
    server.until(held=0, open_connections=0)
    gate_engine.scaling = False
    assert not server.calls


async def test_what_watches_the_engine_is_not_held(server: GatedServer) -> None:
    gate_engine.scaling = True
    async with server.client() as client:
        assert (await client.get("/health")).status_code == 200
        metrics = await client.get("/metrics")
    assert metrics.status_code == 200
    assert "python_info" in metrics.text
    assert server.calls == {"/health": 1}, "the process's registry answers, not the engine"
    assert "python_info" in server.call("GET", "/metrics")[1]
