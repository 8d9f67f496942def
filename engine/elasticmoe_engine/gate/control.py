"""`gate.sock`: answered by threads, so also while the event loop is busy."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from elasticmoe_engine import local_http
from elasticmoe_engine.gate.fence import MODES
from elasticmoe_engine.gate.operations import Operation
from elasticmoe_engine.local_http import Answer, BadRequestError, Request

if TYPE_CHECKING:
    from elasticmoe_engine.gate.middleware import Gate

T = TypeVar("T")

SOCKET = "gate.sock"
PHASE_PATH = "/is_scaling_elastic_ep"
LOOP_LIMIT_S = 2.0
"""How long a caller waits for the event loop."""


class Control:
    """Answers the sidecar's calls until closed."""

    def __init__(self, gate: Gate, loop: asyncio.AbstractEventLoop) -> None:
        assert gate.settings.run_dir is not None
        self._gate, self._loop = gate, loop
        self._lock = threading.Lock()
        self._phase: concurrent.futures.Future[tuple[int, bytes]] | None = None
        self._path = gate.settings.run_dir / SOCKET
        self._serving = local_http.serve_unix(self._path, self._handle)

    def close(self) -> None:
        """Begin to stop answering."""
        self._path.unlink(missing_ok=True)
        self._serving.close()

    def _handle(self, request: Request) -> Answer:
        match request.method, request.path:
            case "GET", ("state",):
                return Answer(200, self._gate.state())
            case "GET", ("phase",):
                return self._ask_phase()
            case "GET", ("metrics",):
                text, content_type = self._gate.engine.metrics()
                return Answer(200, text, content_type)
            case "GET", ("operations", name):
                operation = self._gate.operations.get(name)
                if operation is None:
                    return Answer(404, {"error": f"no operation {name} in this engine"})
                return Answer(200, operation.as_json())
            case "PUT", ("operations", name):
                return self._operate(name, request.body)
            case "PUT", ("fence",):
                return self._set_fence(request.body)
        return Answer(404, {"error": f"no {request.method} /{'/'.join(request.path)} here"})

    def _set_fence(self, body: Any) -> Answer:
        mode = body.get("mode") if isinstance(body, dict) else None
        if mode not in MODES:
            raise BadRequestError(f'send {{"mode": one of {", ".join(MODES)}}}')
        try:
            self._on_loop(self._gate.fence.set(mode)).result(LOOP_LIMIT_S)
        except TimeoutError:
            return Answer(504, {"error": "the engine's event loop is busy: ask again"})
        except OSError as error:
            return Answer(500, {"error": f"the listener can't be opened again: {error}"})
        return Answer(200, {"mode": self._gate.fence.mode})

    def _operate(self, name: str, body: Any) -> Answer:
        try:
            target, drain_timeout_s = int(body["target"]), int(body.get("drain_timeout_s", 120))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise BadRequestError('send {"target": ranks, "drain_timeout_s": seconds}') from None
        operations = self._gate.operations
        operation, mine = operations.claim(name, target)
        if operation.operation != name:
            return Answer(
                409,
                {"error": f"operation {operation.operation} runs", "running": operation.as_json()},
            )
        if mine:
            try:
                self._loop.call_soon_threadsafe(self._begin, operation, drain_timeout_s)
            except RuntimeError:  # the loop is closed
                operations.release(operation)
                return Answer(503, {"error": "the engine is being stopped"})
        return Answer(200, operation.as_json())

    def _begin(self, operation: Operation, drain_timeout_s: int) -> None:
        run = self._gate.operations.run(operation, drain_timeout_s, self._gate.post)
        # Detached: nothing that a caller does ends it. The reference keeps it alive.
        self._running = self._loop.create_task(run)
        self._running.add_done_callback(lambda _: self._gate.hold.look())

    def _ask_phase(self) -> Answer:
        with self._lock:
            if self._phase is None or self._phase.done():
                self._phase = self._on_loop(self._gate.post(PHASE_PATH, {}))
            phase = self._phase
        try:
            status, body = phase.result(LOOP_LIMIT_S)
        except TimeoutError:
            return Answer(504, {"error": f"the engine did not answer in {LOOP_LIMIT_S:g} s"})
        return Answer(status, body.decode(errors="replace"), "application/json")

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)
