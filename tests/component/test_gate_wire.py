"""What users send and get passes the gate as it is."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elasticmoe_engine.gate import Gate
from elasticmoe_engine.gate.settings import Settings
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from support import gate_engine
from support.gate import GatedServer, head_of, request, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GatedServer]:
    with GatedServer(tmp_path) as server:
        yield server


def conversation(server: GatedServer, *requests: bytes) -> bytes:
    """All that comes back on one connection."""
    with server.connect() as connection:
        connection.sendall(b"".join(requests))
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return re.sub(rb"date: [^\r]*\r\n", b"", received)


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/echo", "/v1/models", "/nothing", "/health"])
def test_answers_are_the_same_byte_for_byte(tmp_path: Path, path: str) -> None:
    last = request(path, {"prompt": "x" * 5000}, Connection="close")
    with GatedServer(tmp_path, gated=False) as plain:
        plain.go.set()
        expected = conversation(plain, last)
    with GatedServer(tmp_path) as gated:
        gated.go.set()
        assert conversation(gated, last) == expected
    assert expected.startswith(b"HTTP/1.1 ")


def test_pipelined_requests_are_held_and_answered_in_order(server: GatedServer) -> None:
    gate_engine.scaling = True
    with server.connect() as connection:
        connection.sendall(b"".join(request("/v1/echo", "x" * n) for n in range(3)))
        server.until(held=1)
        gate_engine.scaling = False
        answers = [line_of(connection) for _ in range(3)]
    assert answers == [{"length": 2}, {"length": 3}, {"length": 4}]
    assert [len(body) for body in server.bodies] == [2, 3, 4]


def line_of(connection: socket.socket) -> Any:
    status, _, body = head_of(connection)
    assert status == 200
    return json.loads(body)


def test_a_kept_alive_connection_goes_on_after_a_hold(server: GatedServer) -> None:
    with server.connect() as connection:
        for number in range(3):
            gate_engine.scaling = True
            connection.sendall(request("/v1/echo", number))
            server.until(held=1)
            gate_engine.scaling = False
            status, headers, _ = head_of(connection)
            assert status == 200
            assert "connection" not in headers
    assert server.bodies == [b"0", b"1", b"2"]


def test_a_body_that_comes_while_its_request_is_held_is_whole(server: GatedServer) -> None:
    gate_engine.scaling = True
    whole = request("/v1/echo", "y" * 200_000)
    with server.connect() as connection:
        connection.sendall(whole[:1000])
        server.until(held=1)
        connection.sendall(whole[1000:100_000])
        gate_engine.scaling = False
        connection.sendall(whole[100_000:])
        assert head_of(connection)[0] == 200
    assert [len(body) for body in server.bodies] == [200_002]


def test_a_client_that_expects_100_is_told_while_it_is_served(server: GatedServer) -> None:
    head, _, body = request("/v1/echo", "z", Expect="100-continue").partition(b"\r\n\r\n")
    with server.connect() as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert head_of(connection)[0] == 200


def test_a_streams_client_that_hangs_up_ends_its_request(server: GatedServer) -> None:
    with server.connect() as connection:
        connection.sendall(request("/v1/stream"))
        server.until(in_flight=1)
        assert until(lambda: connection.recv(1))
    server.until(in_flight=0, open_connections=0)


# --- websockets ---------------------------------------------------------------------------------


def websocket_app() -> tuple[TestClient, Gate]:
    app = FastAPI()

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept(subprotocol="echo")
        while True:
            await websocket.send_text(await websocket.receive_text())

    gate = Gate(app, Settings(engine_state="support.gate_engine"))
    return TestClient(gate), gate


@pytest.mark.parametrize("scaling", [False, True])
def test_a_websocket_passes(scaling: bool) -> None:
    """vLLM's own check lets it pass during a commit, too."""
    client, gate = websocket_app()
    gate_engine.scaling, gate_engine.retired = scaling, False
    try:
        with client.websocket_connect("/v1/realtime", subprotocols=["echo"]) as websocket:
            assert websocket.accepted_subprotocol == "echo"
            for word in ("one", "two"):
                websocket.send_text(word)
                assert websocket.receive_text() == word
            assert gate.in_flight == 1
            assert gate.progress == 3
    finally:
        gate_engine.scaling = False
    assert (gate.in_flight, gate.completed) == (0, 1)


def test_a_websocket_that_comes_late_is_sent_elsewhere() -> None:
    client, gate = websocket_app()
    gate.fence.mode = "closed"
    with (
        pytest.raises(WebSocketDisconnect) as refused,
        client.websocket_connect("/v1/realtime"),
    ):
        pass
    assert (refused.value.code, gate.late_refused) == (1013, 1)
