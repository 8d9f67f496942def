"""ASGI's types, plain answers, and calls of an app without a connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

CLOSE: Header = (b"connection", b"close")


async def answer(
    send: Send,
    status: int,
    body: bytes,
    content_type: bytes = b"application/json",
    headers: Iterable[Header] = (),
) -> None:
    """Send a whole response."""
    head = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str) -> bytes:
    """An error in the shape that vLLM's OpenAI API gives it."""
    kind = "ServiceUnavailableError" if status == 503 else "PermissionDeniedError"
    return json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()


def with_close(message: Message) -> Message:
    """A response start that ends its connection."""
    headers = [one for one in message.get("headers", ()) if one[0].lower() != CLOSE[0]]
    return {**message, "headers": [*headers, CLOSE]}


async def post(app: App, outer: Any, path: str, body: Any) -> tuple[int, bytes]:
    """POST to `app` inside this process; nobody can hang up on it. outer: Starlette's own app."""
    data = json.dumps(body).encode()
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
        "app": outer,
    }
    never = asyncio.get_running_loop().create_future()
    asked = False
    status = 500
    chunks: list[bytes] = []

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await never
        asked = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(chunks)


def message_of(body: bytes) -> str:
    """What an error body says, in one line of at most 500 characters."""
    text = body.decode(errors="replace")
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = text
    while isinstance(found, dict):
        found = found.get("detail") or found.get("error") or found.get("message") or str(found)
    return " ".join(str(found).split())[:500]
