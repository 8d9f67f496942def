"""The sidecar's own HTTP server: `/livez`, `/metrics`, on the unix socket `/leave` too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST

logger = logging.getLogger(__name__)

_READ_LIMIT_S = 5.0
_HEAD_LIMIT = 16 * 1024

Answer = tuple[HTTPStatus, str, bytes]
Route = Callable[[], Awaitable[Answer]]
Routes = dict[tuple[str, str], Route]


def as_json(status: HTTPStatus, body: object) -> Answer:
    """A JSON answer."""
    return status, "application/json", json.dumps(body).encode() + b"\n"


def common_routes(metrics_text: Callable[[], bytes]) -> Routes:
    """What everybody may ask."""

    async def livez() -> Answer:
        return as_json(HTTPStatus.OK, {"alive": True})

    async def metrics() -> Answer:
        return HTTPStatus.OK, CONTENT_TYPE_LATEST, metrics_text()

    return {("GET", "/livez"): livez, ("GET", "/metrics"): metrics}


def leave_route(ask: Callable[[], None], released: Callable[[], Awaitable[bool]]) -> Routes:
    """`POST /leave` answers when the instance was released, or its grace is over."""

    async def leave() -> Answer:
        ask()
        return as_json(HTTPStatus.OK, {"released": await released()})

    return {("POST", "/leave"): leave}


@contextlib.asynccontextmanager
async def serve_tcp(host: str, port: int, routes: Routes) -> AsyncIterator[int]:
    """Serve on TCP; yields the port. Raises OSError when it cannot be had."""
    try:
        server = await asyncio.start_server(_handler(routes), host, port, limit=_HEAD_LIMIT)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot serve on {host} port {port} ({why}): choose another port") from error
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@contextlib.asynccontextmanager
async def serve_unix(path: Path, routes: Routes) -> AsyncIterator[None]:
    """Serve on a unix socket that only this user may open.

    The folder's group may too where the setgid bit says that it is shared: the emptyDir of a pod
    that has an fsGroup. Its engine container has another user.
    """
    shared = path.parent.stat().st_mode & stat.S_ISGID
    mask = os.umask(0o117 if shared else 0o177)
    try:
        server = await asyncio.start_unix_server(_handler(routes), path, limit=_HEAD_LIMIT)
    finally:
        os.umask(mask)
    try:
        yield
    finally:
        server.close()


def _handler(
    routes: Routes,
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            status, kind, body = await _answer(reader, routes)
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # the client is gone or speaks no HTTP
        finally:
            writer.close()

    return handle


async def _answer(reader: asyncio.StreamReader, routes: Routes) -> Answer:
    async with asyncio.timeout(_READ_LIMIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
    parts = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(parts) != 3:
        return as_json(HTTPStatus.BAD_REQUEST, {"error": "this is not HTTP"})
    method, path = parts[0], parts[1].split("?", 1)[0]
    route = routes.get((method, path))
    if route is not None:
        return await route()
    if any(known == path for _, known in routes):
        return as_json(HTTPStatus.METHOD_NOT_ALLOWED, {"error": f"{path} takes no {method}"})
    return as_json(HTTPStatus.NOT_FOUND, {"error": f"there is no {path}"})
