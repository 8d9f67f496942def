"""The ASGI class: what happens to each request, and the counts."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable
from typing import Any

from elasticmoe_engine.gate.asgi import (
    CLOSE,
    App,
    Header,
    Message,
    Receive,
    Scope,
    Send,
    answer,
    error_body,
    post,
    with_close,
)
from elasticmoe_engine.gate.control import Control
from elasticmoe_engine.gate.engine import Engine
from elasticmoe_engine.gate.fence import Fence
from elasticmoe_engine.gate.hold import Hold, Replay
from elasticmoe_engine.gate.operations import Operations
from elasticmoe_engine.gate.paths import Kind, kind_of
from elasticmoe_engine.gate.settings import TOKEN_HEADER, Settings

logger = logging.getLogger("elasticmoe.gate")

BEAT_S = 0.25
_KNOWN_PATHS = 1024
_FULL = (
    "this rank holds as many requests as it may while the model is resized: "
    "try again after the seconds that Retry-After names"
)
_TIMEOUT = (
    "the model is being resized and did not go on in time: "
    "try again after the seconds that Retry-After names"
)
_LEAVING = "this rank is leaving the group: send the request again, to the service's address"
_ADMIN = "this path is for the engine's own sidecar: it resizes and stops what others use"


async def _unsaid() -> None:
    """In place of sending a message."""


class Gate:
    """The outermost middleware of the engine's API server.

    Counts are plain attributes, written on the event loop and read from anywhere.
    """

    def __init__(self, app: App, settings: Settings | None = None) -> None:
        self._app = app
        self.settings = settings or Settings.from_environ()
        self._token = self.settings.token.encode()
        self.engine = Engine(self.settings.engine_state)
        self.fence = Fence(self.engine)
        self.hold = Hold(self._closed, self.settings.hold_max, self.settings.hold_s)
        self.operations = Operations()
        self._kinds: dict[tuple[str, str], Kind] = {}
        self._control: Control | None = None
        self.in_flight = 0
        self.progress = 0
        self.completed = 0
        self.late_refused = 0
        self.busy_until = self.beat = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, websocket or the server's lifespan."""
        if self.engine.app is None:
            self.engine.app = scope.get("app")
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._lifespan(scope, receive, send)

    # --- requests -------------------------------------------------------------------------------

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = self._kind(scope)
        if kind != "user":
            await self._other(kind, scope, receive, send)
        elif self._leaving():
            await self._late(send)
        elif self.engine.scaling() or not await self._served(scope, receive, send):
            await self._held(scope, receive, send)

    async def _held(self, scope: Scope, receive: Receive, send: Send) -> None:
        replay = Replay(receive)
        try:
            while True:
                outcome = await self.hold.wait(replay)
                if outcome != "open":
                    await self._not_served(outcome, send)
                elif self._leaving():
                    await self._late(send)
                elif not await self._served(scope, replay, send):
                    continue
                return
        finally:
            replay.give_up()

    async def _served(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Have the engine serve a request; False when it refused it for a commit that just began.

        The gate looked before, but what stands between it and the engine's own check may wait.
        Nothing was read of such a request, so it can be given again.
        """
        untouched, refused = True, False

        def read() -> Awaitable[Message]:
            nonlocal untouched
            untouched = False
            return receive()

        def counted(message: Message) -> Awaitable[None]:
            nonlocal refused
            if message["type"] == "http.response.body":
                self.progress += 1
            elif message["type"] == "http.response.start":
                refused = untouched and message["status"] == 503 and self._closed()
                if self.fence.mode != "open":
                    message = with_close(message)
            return _unsaid() if refused else send(message)

        self.in_flight += 1
        try:
            await self._app(scope, read, counted)
        finally:
            self._ended()
            self.completed += not refused
        return not refused

    def _ended(self) -> None:
        self.in_flight -= 1
        self.busy_until = time.monotonic()

    async def _other(self, kind: Kind, scope: Scope, receive: Receive, send: Send) -> None:
        """What is neither counted nor held: the sidecar's, the kubelet's, Prometheus'."""
        if kind == "admin" and not self._is_sidecar(scope):
            body = error_body(403, _ADMIN)
            await answer(send, 403, body, headers=[CLOSE] if self.fence.mode != "open" else ())
            return
        if kind == "metrics" and (self.engine.scaling() or self.engine.retired()):
            text, content_type = await asyncio.to_thread(self.engine.metrics)
            await answer(send, 200, text.encode(), content_type.encode())
            return

        def closing(message: Message) -> Any:
            if self.fence.mode != "open" and message["type"] == "http.response.start":
                message = with_close(message)
            return send(message)

        await self._app(scope, receive, closing)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._leaving():
            self.late_refused += 1
            await receive()
            await send({"type": "websocket.close", "code": 1013, "reason": "leaving"})
            return

        def counted(message: Message) -> Any:
            self.progress += 1
            return send(message)

        self.in_flight += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._ended()
            self.completed += 1

    async def _late(self, send: Send) -> None:
        self.late_refused += 1
        self.busy_until = time.monotonic()
        await self._refuse(send, _LEAVING, 1, [CLOSE])

    async def _not_served(self, outcome: str, send: Send) -> None:
        self.busy_until = time.monotonic()
        if outcome == "full":
            await self._refuse(send, _FULL, 5)
        elif outcome == "timeout":
            await self._refuse(send, _TIMEOUT, 5)

    async def _refuse(
        self, send: Send, text: str, retry_after: int, more: list[Header] | None = None
    ) -> None:
        headers = [(b"retry-after", str(retry_after).encode()), *(more or ())]
        await answer(send, 503, error_body(503, text), headers=headers)

    # --- what decides ---------------------------------------------------------------------------

    def _kind(self, scope: Scope) -> Kind:
        key = (scope["path"], scope.get("root_path", ""))
        kind = self._kinds.get(key)
        if kind is None:
            kind = kind_of(*key)
            if len(self._kinds) < _KNOWN_PATHS:
                self._kinds[key] = kind
        return kind

    def _is_sidecar(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == TOKEN_HEADER), b"")
        return bool(self._token) and hmac.compare_digest(given, self._token)

    def _leaving(self) -> bool:
        return self.fence.mode == "closed" or self.engine.retired()

    def _closed(self) -> bool:
        return self.engine.scaling() and not self.engine.retired()

    # --- the process ----------------------------------------------------------------------------

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        ticker: asyncio.Task[None] | None = None

        async def watched(message: Message) -> None:
            nonlocal ticker
            if message["type"] == "lifespan.startup.complete":
                ticker = loop.create_task(self._tick())
                self._open_control(loop)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if ticker is not None:
                ticker.cancel()
            if self._control is not None:
                self._control.close()

    def _open_control(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.settings.run_dir is None:
            logger.warning(
                "no ELASTICMOE_RUN_DIR: this gate can't be asked anything; start the "
                "engine through elasticmoe_engine.launcher"
            )
            return
        self._control = Control(self, loop)

    async def _tick(self) -> None:
        while True:
            self.beat = time.monotonic()
            if self.in_flight or self.hold.held or self.engine.open_connections:
                self.busy_until = self.beat
            self.fence.close_unused(self.beat)
            await asyncio.sleep(BEAT_S)

    async def post(self, path: str, body: Any) -> tuple[int, bytes]:
        """POST to the engine's own API, past the gate."""
        return await post(self._app, self.engine.app, path, body)

    def state(self) -> dict[str, Any]:
        """`GET /state`; may be called from any thread."""
        now = time.monotonic()
        connections = self.engine.open_connections
        busy = self.in_flight or self.hold.held or connections
        size, rank, pause_mode = self.engine.place()
        operation = self.operations.latest
        return {
            "launch": self.settings.launch,
            "fence": self.fence.mode,
            "in_flight": self.in_flight,
            "held": self.hold.held,
            "open_connections": connections,
            "idle_s": 0.0 if busy else round(max(0.0, now - self.busy_until), 3),
            "lag_s": round(max(0.0, now - self.beat), 3),
            "progress": self.progress,
            "completed": self.completed,
            "late_refused": self.late_refused,
            "hold_refused": self.hold.refused,
            "hold_timed_out": self.hold.timed_out,
            "scaling": bool(self.engine.scaling()),
            "retired": bool(self.engine.retired()),
            "dp_size": size,
            "dp_rank": rank,
            "pause_mode": pause_mode,
            "operation": None if operation is None else operation.as_json(),
        }
