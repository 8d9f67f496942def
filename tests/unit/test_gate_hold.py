"""Requests that wait while the engine commits."""

from __future__ import annotations

import asyncio
from typing import Any

from elasticmoe_engine.gate.hold import Hold, Replay

BODY = {"type": "http.request", "body": b"1", "more_body": True}
REST = {"type": "http.request", "body": b"2", "more_body": False}
GONE = {"type": "http.disconnect"}


class Client:
    """A `receive` that gives what is put in."""

    def __init__(self, *messages: Any) -> None:
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        for message in messages:
            self.says(message)

    def says(self, message: Any) -> None:
        self._messages.put_nowait(message)

    async def __call__(self) -> Any:
        return await self._messages.get()


async def settled() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


class Engine:
    closed = True

    def __call__(self) -> bool:
        return self.closed


async def test_it_waits_until_the_engine_serves_and_loses_no_body() -> None:
    engine, client = Engine(), Client(BODY)
    hold, replay = Hold(engine, 10, 10), Replay(client)
    waiting = asyncio.create_task(hold.wait(replay))
    await asyncio.sleep(0)
    client.says(REST)
    await settled()
    assert hold.held == 1
    engine.closed = False
    assert await waiting == "open"
    assert hold.held == 0
    client.says(GONE)
    assert [await replay() for _ in range(3)] == [BODY, REST, GONE]


async def test_a_client_that_hangs_up_is_let_go() -> None:
    client = Client(REST)
    hold = Hold(Engine(), 10, 10)
    waiting = asyncio.create_task(hold.wait(Replay(client)))
    client.says(GONE)
    assert await waiting == "gone"


async def test_who_hung_up_just_before_the_end_does_not_reach_the_engine() -> None:
    engine, client = Engine(), Client(REST)
    hold = Hold(engine, 10, 10)
    waiting = asyncio.create_task(hold.wait(Replay(client)))
    await settled()
    assert hold.held == 1
    client.says(GONE)
    engine.closed = False
    hold.look()
    assert await waiting == "gone"


async def test_a_commit_that_begins_again_is_waited_for_too() -> None:
    engine = Engine()
    hold = Hold(engine, 10, 10)
    waiting = asyncio.create_task(hold.wait(Replay(Client(REST))))
    await settled()
    assert hold.held == 1
    engine.closed = False
    hold.look()  # wakes it, but before it looks the engine closes again
    engine.closed = True
    await settled()
    assert not waiting.done()
    engine.closed = False
    assert await waiting == "open"


async def test_bounds_in_number_and_time() -> None:
    hold = Hold(Engine(), 1, 0.02)
    first = asyncio.create_task(hold.wait(Replay(Client(REST))))
    await settled()
    assert hold.held == 1
    assert await hold.wait(Replay(Client(REST))) == "full"
    assert await first == "timeout"
    assert (hold.held, hold.refused, hold.timed_out) == (0, 1, 1)


async def test_an_open_engine_holds_nobody() -> None:
    engine = Engine()
    engine.closed = False
    assert await Hold(engine, 10, 10).wait(Replay(Client(REST))) == "open"
