"""Requests that wait while the engine commits a new layout, instead of being refused."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Literal

from elasticmoe_engine.gate.asgi import Message, Receive

POLL_S = 0.005
"""How often the engine's flag is looked at while something waits: it tells nobody."""

Outcome = Literal["open", "full", "timeout", "gone"]


class Replay:
    """A `receive` that first gives what came while the request was held."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._early: deque[Message] = deque()
        self._next: asyncio.Future[Message] | None = None
        self.gone = False

    def listen(self) -> asyncio.Future[Message] | None:
        """A future for the next message; None once the client has hung up."""
        while self._next is not None and self._next.done():
            message = self._next.result()
            self._early.append(message)
            self._next = None
            self.gone = message["type"] == "http.disconnect"
        if self.gone:
            return None
        if self._next is None:
            self._next = asyncio.ensure_future(self._receive())
        return self._next

    def give_up(self) -> None:
        """Nobody will ask for messages any more."""
        if self._next is not None:
            self._next.cancel()

    async def __call__(self) -> Message:
        """The next message, as the server's own `receive` would have given it."""
        if self._early:
            return self._early.popleft()
        if self._next is not None:
            waiting, self._next = self._next, None
            return await waiting
        return await self._receive()


class Hold:
    """Holds requests while `closed()`; at most `limit` at once, each for at most `seconds`."""

    def __init__(self, closed: Callable[[], bool], limit: int, seconds: float) -> None:
        self._closed, self._limit, self._seconds = closed, limit, seconds
        self._opened: asyncio.Future[None] | None = None
        self._poller: asyncio.Task[None] | None = None
        self.held = 0
        self.refused = 0
        self.timed_out = 0

    def look(self) -> None:
        """Let everybody go on if the engine serves again. Call it on the event loop."""
        if self._opened is not None and not self._closed():
            if not self._opened.done():
                self._opened.set_result(None)
            self._opened = None

    async def wait(self, replay: Replay) -> Outcome:
        """Wait until the engine serves. When "open" returns, nothing was awaited since."""
        if self.held >= self._limit:
            self.refused += 1
            return "full"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        self.held += 1
        try:
            while self._closed():
                heard = replay.listen()
                if heard is None:
                    return "gone"
                left = deadline - loop.time()
                if left <= 0:
                    self.timed_out += 1
                    return "timeout"
                await asyncio.wait(
                    (heard, self._gate(loop)), timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
            return "gone" if replay.listen() is None else "open"
        finally:
            self.held -= 1

    def _gate(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        if self._opened is None:
            self._opened = loop.create_future()
        if self._poller is None:
            self._poller = loop.create_task(self._poll())
        return self._opened

    async def _poll(self) -> None:
        while self.held:
            await asyncio.sleep(POLL_S)
            self.look()
        self._poller = None
