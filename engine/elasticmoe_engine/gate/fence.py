"""The four fence modes, and how an API server stops accepting connections and begins again."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Literal, get_args

from elasticmoe_engine.gate.engine import Engine
from elasticmoe_engine.listener import BACKLOG

Mode = Literal["open", "lame_duck", "closed", "paused"]
MODES: tuple[Mode, ...] = get_args(Mode)

UNUSED_LIMIT_S = 6.0
"""How long a connection without any request may stay under a fence: uvicorn closes kept-alive ones
after vLLM's 5 s, but never one that was only opened."""


class Fence:
    """The mode, and the listeners that follow it. Everything here runs on the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: list[socket.socket] = []
        self._unused: dict[Any, float] = {}
        self._turn = asyncio.Lock()
        self.mode: Mode = "open"

    async def set(self, mode: Mode) -> None:
        """Take a mode. Raises OSError when the listener can't be opened again."""
        async with self._turn:
            if mode == "paused":
                self.mode = mode
                self._stop_accepting()
            else:
                await self._accept()
                self.mode = mode

    def _stop_accepting(self) -> None:
        """Close this process's copies of the listeners: who connects now waits in the kernel."""
        server = self._engine.server
        for one in getattr(server, "servers", ()):
            for sock in one.sockets:
                kept = socket.socket(fileno=os.dup(sock.fileno()))
                kept.listen(BACKLOG)  # uvicorn may have asked for less
                self._kept.append(kept)
            one.close()
        if server is not None:
            server.servers = []

    async def _accept(self) -> None:
        """Accept again, with the same protocol as uvicorn's own start does."""
        server = self._engine.server
        loop = asyncio.get_running_loop()
        while self._kept:
            sock = self._kept[0]
            sock.setblocking(False)

            def protocol() -> Any:
                return server.config.http_protocol_class(
                    config=server.config,
                    server_state=server.server_state,
                    app_state=server.lifespan.state,
                    _loop=loop,
                )

            config = server.config
            opened = await loop.create_server(protocol, sock=sock, ssl=config.ssl, backlog=BACKLOG)
            server.servers.append(opened)
            self._kept.pop(0)

    def close_unused(self, now: float) -> None:
        """Under a fence, close connections on which nothing was asked for `UNUSED_LIMIT_S`."""
        if self.mode == "open":
            self._unused = {}
            return
        connections = getattr(getattr(self._engine.server, "server_state", None), "connections", ())
        unused = [one for one in connections if getattr(one, "cycle", one) is None]
        self._unused = {one: self._unused.get(one, now) for one in unused}
        for one, since in self._unused.items():
            if now - since >= UNUSED_LIMIT_S:
                one.shutdown()
