"""The state that the ranks of a group share: keys on rank 0, like vLLM's TCPStore.

One JSON object a line over TCP. Clients set, read and wait for keys. A connection may be made a
rank's *membership*: when it breaks before the rank has left, the group is stalled for good, as the
collectives of real ranks are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from itertools import count
from typing import Any

STALLED = "stalled"
DIE = "die"


class StoreServer:
    """Hosted by rank 0's API server."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._waiting: dict[asyncio.Future[None], tuple[list[str], list[str]]] = {}
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port; raises OSError when it is taken."""
        self._server = await asyncio.start_server(self._serve, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening and drop everybody: what rank 0's death does."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.close()

    def set(self, key: str, value: str) -> None:
        """Set a key and wake those who wait for it."""
        self._keys[key] = value
        for future, (every, some) in list(self._waiting.items()):
            if not future.done() and self._met(every, some):
                future.set_result(None)

    def _met(self, every: list[str], some: list[str]) -> bool:
        whole = bool(every) and all(key in self._keys for key in every)
        return whole or any(key in self._keys for key in some)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        member: list[int] = []
        tasks: set[asyncio.Task[None]] = set()

        async def answer(request: dict[str, Any]) -> None:
            value = await self._do(request, member)
            writer.write(json.dumps({"id": request["id"], "value": value}).encode() + b"\n")
            with contextlib.suppress(ConnectionError):
                await writer.drain()

        try:
            while line := await reader.readline():
                task = asyncio.create_task(answer(json.loads(line)))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            for task in tasks:
                task.cancel()
            self._writers.discard(writer)
            if member:
                self.set(STALLED, f"rank {member[0]} is gone")
            writer.close()

    async def _do(self, request: dict[str, Any], member: list[int]) -> Any:
        match request["op"]:
            case "set":
                self.set(request["key"], request["value"])
            case "delete":
                self._keys.pop(request["key"], None)
            case "get":
                return self._keys.get(request["key"])
            case "wait":
                return await self._wait(request["every"], request["some"], request["timeout"])
            case "join":
                member[:] = [request["rank"]]
            case "leave":
                member.clear()
        return None

    async def _wait(
        self, every: list[str], some: list[str], timeout: float
    ) -> dict[str, str] | None:
        if not self._met(every, some):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[future] = (every, some)
            try:
                await asyncio.wait_for(future, timeout)
            except TimeoutError:
                return None
            finally:
                del self._waiting[future]
        return {key: self._keys[key] for key in [*every, *some] if key in self._keys}


class StoreClient:
    """A connection to the store. Every call raises ConnectionError once rank 0 is gone."""

    def __init__(self) -> None:
        self._ids = count()
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.lost = asyncio.Event()

    async def connect(self, host: str, port: int, limit_s: float) -> None:
        """Connect, trying again until rank 0 is there; raises TimeoutError after `limit_s`."""
        async with asyncio.timeout(limit_s):
            while True:
                with contextlib.suppress(OSError):
                    reader, self._writer = await asyncio.open_connection(host, port)
                    break
                await asyncio.sleep(0.05)
        self._reading = asyncio.create_task(self._read(reader))

    def close(self) -> None:
        """Break the connection, as the end of a process does."""
        if self._writer is not None:
            self._writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                reply = json.loads(line)
                future = self._replies.pop(reply["id"], None)
                if future is not None and not future.done():
                    future.set_result(reply["value"])
        except ConnectionError:
            pass
        self.lost.set()
        for future in self._replies.values():
            if not future.done():
                future.set_exception(ConnectionError("rank 0's store is gone"))

    async def _call(self, op: str, **values: Any) -> Any:
        if self.lost.is_set() or self._writer is None:
            raise ConnectionError("rank 0's store is gone")
        number = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies[number] = future
        self._writer.write(json.dumps({"id": number, "op": op, **values}).encode() + b"\n")
        await self._writer.drain()
        return await future

    async def set(self, key: str, value: str = "1") -> None:
        """Set a key."""
        await self._call("set", key=key, value=value)

    async def get(self, key: str) -> str | None:
        """A key's value, None when it is not there."""
        value = await self._call("get", key=key)
        return None if value is None else str(value)

    async def delete(self, key: str) -> None:
        """Remove a key."""
        await self._call("delete", key=key)

    async def wait(
        self, every: list[str] | None = None, some: list[str] | None = None, *, timeout: float
    ) -> dict[str, str]:
        """Wait until all of `every` or any of `some` is there; return those that are.

        Raises TimeoutError after `timeout` seconds.
        """
        found = await self._call("wait", every=every or [], some=some or [], timeout=timeout)
        if found is None:
            raise TimeoutError
        return dict(found)

    async def join(self, rank: int) -> None:
        """Make this connection the membership of `rank`."""
        await self._call("join", rank=rank)

    async def leave(self) -> None:
        """End the membership: this connection may break without harm."""
        await self._call("leave")
