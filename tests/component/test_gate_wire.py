"""What users send and get passes the gate as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from elasticmoe_engine.gate import Gate
from elasticmoe_engine.gate.settings import Settings
from starlette.types import Message, Receive, Scope, Send
from support import gate_engine
from support.gate import GatedServer, head_of, request, response, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GatedServer]:
    with GatedServer(tmp_path) as server:
        yield server


def answer_to(server: GatedServer, last: bytes) -> bytes:
    """All that comes back on a connection that the server closes after one request."""
    with server.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(last)
        received = file.read()
    return re.sub(rb"date: [^\r]*\r\n", b"", received)


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/echo", "/v1/models", "/nothing", "/health"])
def test_answers_are_the_same_byte_for_byte(tmp_path: Path, path: str) -> None:
    last = request(path, {"prompt": "x" * 5000}, Connection="close")
    with GatedServer(tmp_path, gated=False) as plain:
        plain.go.set()
        expected = answer_to(plain, last)
    with GatedServer(tmp_path) as gated:
        gated.go.set()
        assert answer_to(gated, last) == expected
    assert expected.startswith(b"HTTP/1.1 ")


def test_pipelined_requests_are_held_and_answered_in_order(server: GatedServer) -> None:
    gate_engine.scaling = True
    with server.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(b"".join(request("/v1/echo", "x" * n) for n in range(3)))
        server.until(held=1)
        gate_engine.scaling = False
        answers = [response(file) for _ in range(3)]
    assert [status for status, _, _ in answers] == [200] * 3
    assert [json.loads(body)["length"] for _, _, body in answers] == [2, 3, 4]
    assert [len(body) for body in server.bodies] == [2, 3, 4]


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


class Conversation:
    """A websocket as the server shows it to an ASGI application; `said` is what came back."""

    scope: ClassVar = {"type": "websocket", "path": "/v1/realtime", "headers": []}

    def __init__(self, *words: str) -> None:
        self._words = [{"type": "websocket.receive", "text": word} for word in words]
        self._coming = iter(
            [{"type": "websocket.connect"}, *self._words, {"type": "websocket.disconnect"}]
        )
        self.said: list[Message] = []

    async def receive(self) -> Message:
        return next(self._coming)

    async def send(self, message: Message) -> None:
        self.said.append(message)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


@pytest.fixture
def gate() -> Gate:
    gate_engine.scaling = gate_engine.retired = False
    return Gate(echo, Settings(engine_state="support.gate_engine"))


@pytest.mark.parametrize("scaling", [False, True])
async def test_a_websocket_passes(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, scaling: bool
) -> None:
    """vLLM's own check lets it pass during a commit, too."""
    monkeypatch.setattr(gate_engine, "scaling", scaling)
    talk = Conversation("one", "two")
    await gate(talk.scope, talk.receive, talk.send)
    assert [message.get("text") for message in talk.said] == [None, "one", "two"]
    assert (gate.in_flight, gate.completed, gate.progress) == (0, 1, 3)


async def test_a_websocket_that_comes_late_is_sent_elsewhere(gate: Gate) -> None:
    await gate.fence.set("closed")
    talk = Conversation("one")
    await gate(talk.scope, talk.receive, talk.send)
    assert [message["code"] for message in talk.said] == [1013]
    assert (gate.late_refused, gate.completed) == (1, 0)
