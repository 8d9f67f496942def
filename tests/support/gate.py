"""A small API server with a gate in front, under real uvicorn, and ways to talk to it.

The listening socket belongs to the test, as it belongs to the launcher: the server gets a copy.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import httpx
import uvicorn
from elasticmoe_engine.gate import Gate
from elasticmoe_engine.gate.settings import Settings
from elasticmoe_engine.local_http import call_unix
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from support import gate_engine

TOKEN = "token-of-this-launch"
LIMIT_S = 10.0


def until(true: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + limit_s
    while not (value := true()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
    return value


class ScalingMiddleware:
    """vLLM's: 503 to everything but two paths while it scales or is retired."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        paused = gate_engine.scaling or gate_engine.retired
        exempt = ("/health", "/is_scaling_elastic_ep")
        if scope["type"] == "http" and paused and scope["path"] not in exempt:
            return JSONResponse({"error": "scaling"}, status_code=503)(scope, receive, send)
        return self.app(scope, receive, send)


class GatedServer:
    """Use as a context manager. `calls` counts what reached the engine, by path."""

    def __init__(
        self,
        run_dir: Path,
        *,
        gated: bool = True,
        listener: socket.socket | None = None,
        **settings: Any,
    ) -> None:
        gate_engine.scaling = gate_engine.retired = False
        self.run_dir = run_dir
        self.calls: Counter[str] = Counter()
        self.bodies: list[bytes] = []
        self.go = threading.Event()
        """Lets slow answers and resizes end."""
        self.dawdle = threading.Event()
        """While cleared, what stands between the gate and the engine's check lets nothing pass."""
        self.dawdle.set()
        self.scale_answer: tuple[int, Any] = (200, {"message": "Scaled"})
        self.listener = listener or socket.create_server(("127.0.0.1", 0), backlog=128)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = int(self.listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = Settings(
            run_dir=run_dir,
            launch="launch-1",
            token=TOKEN,
            engine_state="support.gate_engine",
            **settings,
        )
        self.gate: Gate | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._gated = gated
        app = self._build()
        config = uvicorn.Config(app, log_level="error", timeout_keep_alive=5)
        self.server = uvicorn.Server(config)
        app.state.server = self.server
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> GatedServer:
        self._thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        gate_engine.scaling = gate_engine.retired = False
        self.go.set()
        self.dawdle.set()
        self.server.should_exit = True
        self._thread.join(LIMIT_S)
        self.listener.close()
        assert not self._thread.is_alive(), "the server did not stop"

    def _run(self) -> None:
        self.server.run(sockets=[self.listener.dup()])

    # --- talking to it --------------------------------------------------------------------------

    def client(self, **more: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=LIMIT_S, **more)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return call_unix(self.run_dir / "gate.sock", method, path, body, timeout=LIMIT_S)

    def state(self) -> Any:
        status, state = self.call("GET", "/state")
        assert status == 200, state
        return state

    def fence(self, mode: str) -> None:
        status, answer = self.call("PUT", "/fence", {"mode": mode})
        assert status == 200, answer

    def until(self, **values: Any) -> Any:
        """Wait until `/state` says so."""
        return until(lambda: (s := self.state()) and values.items() <= s.items() and s)

    async def until_async(self, **values: Any) -> Any:
        return await asyncio.to_thread(self.until, **values)

    @property
    def waiting(self) -> int:
        """Connections in the kernel that nobody accepted yet."""
        return self._tcp_info()[0]

    @property
    def backlog(self) -> int:
        """How many may wait there."""
        return self._tcp_info()[1]

    def _tcp_info(self) -> tuple[int, int]:
        info = self.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 36)
        # Of a listening socket: tcpi_unacked and tcpi_sacked, see tcp_get_info in Linux.
        waiting, backlog = struct.unpack_from("<8x4I2I", info)[-2:]
        return int(waiting), int(backlog)

    # --- the engine behind the gate -------------------------------------------------------------

    def _build(self) -> FastAPI:
        app = FastAPI()
        # Added last, the gate is outermost, as by vLLM's --middleware.
        app.add_middleware(ScalingMiddleware)
        app.add_middleware(self._dawdling())
        if self._gated:
            app.add_middleware(self._gate_factory())
        parallel = SimpleNamespace(data_parallel_size=3, data_parallel_rank=1)
        core = SimpleNamespace(_eep_commit_pause_mode=lambda: "keep")
        config = SimpleNamespace(parallel_config=parallel)
        app.state.engine_client = SimpleNamespace(vllm_config=config, engine_core=core)
        app.add_api_route("/v1/echo", self._echo, methods=["POST"])
        app.add_api_route("/v1/slow", self._slow, methods=["POST"])
        app.add_api_route("/v1/stream", self._stream, methods=["POST"])
        app.add_api_route("/scale_elastic_ep", self._scale, methods=["POST"])
        app.add_api_route("/is_scaling_elastic_ep", self._phase, methods=["POST"])
        for path in ("/health", "/metrics", "/v1/models", "/pause"):
            app.add_api_route(path, self._plain, methods=["GET", "POST"])
        return app

    def _gate_factory(self) -> Any:
        owner = self

        class OneGate(Gate):
            def __init__(self, app: Any) -> None:
                super().__init__(app, owner.settings)
                owner.gate = self
                owner.loop = asyncio.get_running_loop()

        return OneGate

    def _dawdling(self) -> Any:
        owner = self

        class Dawdling:
            def __init__(self, app: ASGIApp) -> None:
                self.app = app

            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                await owner._wait(owner.dawdle)
                await self.app(scope, receive, send)

        return Dawdling

    async def _echo(self, request: Request) -> Any:
        self.calls["/v1/echo"] += 1
        body = await request.body()
        self.bodies.append(body)
        return {"length": len(body)}

    async def _slow(self, request: Request) -> Any:
        self.calls["/v1/slow"] += 1
        await self._wait(self.go)
        return {"done": True}

    async def _stream(self, request: Request) -> Any:
        self.calls["/v1/stream"] += 1

        async def chunks() -> AsyncIterator[str]:
            yield "data: 0\n\n"
            await self._wait(self.go)
            for number in range(1, 5):
                yield f"data: {number}\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def _scale(self, request: Request) -> Any:
        self.calls["/scale_elastic_ep"] += 1
        self.bodies.append(await request.body())
        await self._wait(self.go)
        status, body = self.scale_answer
        return JSONResponse(body, status_code=status)

    async def _phase(self) -> Any:
        self.calls["/is_scaling_elastic_ep"] += 1
        return {"is_scaling_elastic_ep": False, "phase": "idle", "epoch": 1, "error": None}

    async def _plain(self, request: Request) -> Any:
        self.calls[request.url.path] += 1
        return {"path": request.url.path}

    async def _wait(self, event: threading.Event) -> None:
        while not event.is_set():  # noqa: ASYNC110  set by the test's thread
            await asyncio.sleep(0.005)


def head_of(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the one response on a raw connection."""
    with sock.makefile("rb") as file:
        return response(file)


def response(file: BinaryIO) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next response."""
    status = int(file.readline().split()[1])
    headers: dict[str, str] = {}
    while (line := file.readline().strip()) != b"":
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, file.read(int(headers.get("content-length", 0)))


def request(path: str, body: Any = None, method: str = "POST", **headers: str) -> bytes:
    """The bytes of an HTTP/1.1 request."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data
