"""A launcher and a gate that answer over real unix sockets and remember what was done to them.

A test can hold any call at a point: `received` (before it has an effect) or `done` (after the
effect, before the answer), or have it `lost` (the connection drops, no effect).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

Point = Literal["received", "done", "lost"]


@dataclass
class Hold:
    """One call caught at a point."""

    call: str
    point: Point
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


class FakeInstance:
    """Use as an async context manager; `effects` counts what really happened, by name and id."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.boot = "boot-1"
        self.engine: dict[str, Any] = {"phase": "absent", "launch": None, "rank": None}
        self.ready = False
        self.fence = "open"
        self.gate_state: dict[str, Any] = {}
        self.operations: dict[str, dict[str, Any]] = {}
        self.latest: str | None = None
        self.facts: dict[str, Any] | None = {"engine_version": "0.33.0", "num_experts": 8}
        self.metrics = ""
        self.phase_answer: dict[str, Any] = {"phase": "idle", "epoch": 1, "error": None}
        self.preflight_ok = True
        self.refuse = 0
        self.calls: list[str] = []
        self.bodies: list[tuple[str, Any]] = []
        self.effects: Counter[str] = Counter()
        self._holds: list[Hold] = []
        self._held: list[Hold] = []
        self._calls: set[asyncio.Task[Any]] = set()
        self._launcher: asyncio.Server | None = None
        self._gate: asyncio.Server | None = None

    async def __aenter__(self) -> FakeInstance:
        await self.start_launcher()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()
        await self.stop_launcher()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def hold(self, call: str, point: Point) -> Hold:
        """Catch the next call that `call` is part of ("PUT /engine", "gate GET /state")."""
        hold = Hold(call, point)
        self._holds.append(hold)
        return hold

    def release(self) -> None:
        """Let all calls go on that are held."""
        for hold in self._held:
            hold.released.set()

    async def start_launcher(self) -> None:
        path = self.run_dir / "launcher.sock"
        self._launcher = await asyncio.start_unix_server(partial(self._serve, "launcher"), path)

    async def stop_launcher(self) -> None:
        """The launcher is gone, and its engine with it."""
        if self._launcher is not None:
            self._launcher.close()
            (self.run_dir / "launcher.sock").unlink(missing_ok=True)
        self._launcher = None
        await self.engine_gone()

    async def new_launcher(self) -> None:
        """A launcher that knows nothing of the one before it."""
        await self.stop_launcher()
        self.boot += "'"
        self.ready = False
        await self.start_launcher()

    async def engine_gone(self, **left: Any) -> None:
        self.engine = {"phase": "absent", "launch": None, "rank": None} | left
        await self._stop_gate()

    async def engine_runs(self) -> None:
        """The engine's API server answers; its gate remembers nothing."""
        self.engine["phase"] = "running"
        self.fence, self.operations, self.latest = "open", {}, None
        path = self.run_dir / "gate.sock"
        self._gate = await asyncio.start_unix_server(partial(self._serve, "gate"), path)

    async def _stop_gate(self) -> None:
        if self._gate is not None:
            self._gate.close()
            (self.run_dir / "gate.sock").unlink(missing_ok=True)
        self._gate = None

    async def _serve(
        self, side: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, target, _ = head.split("\r\n", 1)[0].split(" ")
            length = next(
                (int(line[15:]) for line in head.lower().split("\r\n") if "content-length" in line),
                0,
            )
            raw = await reader.readexactly(length)
            answer = await self._answer(side, method, target, json.loads(raw) if raw else None)
            if answer is not None:
                status, body = answer
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n"
                writer.write(head.encode() + data)
                await writer.drain()
        writer.close()

    async def _answer(
        self, side: str, method: str, target: str, body: Any
    ) -> tuple[int, Any] | None:
        call = f"{side} {method} {target}"
        self.calls.append(call)
        self.bodies.append((call, body))
        hold = next((hold for hold in self._holds if hold.call in call), None)
        if hold is None:
            return await self._do(method, target, body)
        self._holds.remove(hold)
        self._held.append(hold)
        if hold.point == "lost":
            hold.reached.set()
            return None
        if hold.point == "received":
            hold.reached.set()
            await hold.released.wait()
            return await self._do(method, target, body)
        answer = await self._do(method, target, body)
        hold.reached.set()
        await hold.released.wait()
        return answer

    async def _do(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        url = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        match method, url.path.strip("/").split("/"):
            case "PUT", ["engine"] if self.refuse:
                self.refuse -= 1
                return 503, {"error": "not now"}
            case "PUT", ["engine"]:
                return self._start(body)
            case "DELETE", ["engine"]:
                return await self._stop(query)
            case "PUT", ["ready"]:
                self.ready = body["ready"]
                self.effects[f"ready {self.ready}"] += 1
                return 200, {}
            case "POST", ["preflight"]:
                self.effects[f"preflight {body['check']}"] += 1
                return 200, {"check": body["check"], "ok": self.preflight_ok, "reason": None}
            case "PUT", ["fence"]:
                self.fence = body["mode"]
                self.effects[f"fence {self.fence}"] += 1
                return 200, {}
            case "PUT", ["operations", name]:
                return self._scale(name, body)
            case "GET", ["phase"]:
                return 200, self.phase_answer
            case "GET", ["metrics"]:
                return 200, self.metrics
            case "GET", ["state"]:
                return 200, self._state()
        return 404, {}

    def _state(self) -> dict[str, Any]:
        """Both states in one: each side reads its own fields."""
        operation = self.operations.get(self.latest) if self.latest else None
        launcher = {
            "boot": self.boot,
            "warm": True,
            "engine": self.engine,
            "ready": self.ready,
            "serving": {"host": "127.0.0.1", "port": 8000},
            "probe_port": 9000,
            "facts": self.facts,
            "error": None,
        }
        gate = {"launch": self.engine["launch"] or "", "fence": self.fence, "operation": operation}
        return launcher | gate | self.gate_state

    def _start(self, body: Any) -> tuple[int, Any]:
        if self.engine["launch"] == body["launch"]:
            return 200, {}
        if self.engine["phase"] != "absent":
            return 409, {"error": "another engine is there"}
        self.engine = {"phase": "starting", "launch": body["launch"], "rank": body["rank"]}
        self.effects[f"start {body['launch']}"] += 1
        return 202, {}

    async def _stop(self, query: dict[str, str]) -> tuple[int, Any]:
        if query["launch"] != self.engine["launch"]:
            return 409, {"error": "another launch"}
        self.effects[f"stop {query['launch']} {query['grace']}"] += 1
        await self.engine_gone()
        return 202, {}

    def _scale(self, name: str, body: Any) -> tuple[int, Any]:
        if name not in self.operations:
            self.effects[f"scale {name}"] += 1
            self.operations[name] = {"operation": name, "state": "running", "status": None} | body
            self.latest = name
        return 200, self.operations[name]
