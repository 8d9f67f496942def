"""A scripted coordinator and a sidecar in its own process, which a test may kill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from elasticmoe_protocol.messages import (
    Goal,
    Hello,
    Introduce,
    Record,
    Refused,
    Report,
    ToCoordinator,
    ToSidecar,
)

LIMIT_S = 20.0
PROCESS = Path(__file__).with_name("sidecar_process.py")


async def until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait until a condition on this process's memory holds."""
    try:
        async with asyncio.timeout(limit_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {limit_s:g} s: {what}") from None


class Coordinator:
    """Sends what the test says; keeps what it hears."""

    def __init__(self) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self.hellos: list[Hello] = []
        self.reports: list[Report] = []
        self.refusals: list[Refused] = []
        self._met: set[str] = set()
        self._goals: dict[str, Goal] = {}
        self.term, self._seq = 1, 0

    async def run(self) -> None:
        while True:
            identity, frame = await self._socket.recv_multipart()
            message = msgspec.msgpack.decode(frame, type=ToCoordinator)
            match message:
                case Hello():
                    self.hellos.append(message)
                    self._met.add(message.boot)
                    if (newest := self._goals.get(message.instance)) is not None:
                        await self.send(message.instance, newest)
                case Report():
                    self.reports.append(message)
                    if message.boot not in self._met:
                        await self.send(identity.decode(), Introduce(deployment="d"))
                case Refused():
                    self.refusals.append(message)

    def close(self) -> None:
        self._socket.close()

    async def send(self, instance: str, message: ToSidecar) -> None:
        await self._socket.send_multipart([instance.encode(), msgspec.msgpack.encode(message)])

    async def goal(self, instance: str = "i0", **fields: Any) -> Goal:
        """Send a new goal once."""
        self._seq += 1
        base = Goal(
            deployment="d",
            instance=instance,
            term=self.term,
            seq=self._seq,
            generation=1,
            record=Record(generation=1),
        )
        goal = self._goals[instance] = msgspec.structs.replace(base, **fields)
        await self.send(instance, goal)
        return goal

    def last(self, instance: str = "i0") -> Report:
        return next(report for report in reversed(self.reports) if report.instance == instance)

    async def hears(
        self, what: str, condition: Callable[[Report], bool], instance: str = "i0"
    ) -> Report:
        """Wait for a report that came after this call."""
        begin = len(self.reports)

        def heard() -> bool:
            return any(r.instance == instance and condition(r) for r in self.reports[begin:])

        await until(heard, what)
        return next(r for r in self.reports[begin:] if r.instance == instance and condition(r))

    async def accepted(self, goal: Goal) -> None:
        await self.hears(
            f"goal {goal.seq} accepted",
            lambda report: (report.term, report.goal) == (goal.term, goal.seq),
            goal.instance,
        )


@contextlib.asynccontextmanager
async def coordinator() -> AsyncIterator[Coordinator]:
    made = Coordinator()
    running = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.wait({running})
        made.close()


class Sidecar:
    """One sidecar after another in the same run folder."""

    def __init__(self, home: Path, coordinator: str, **fields: Any) -> None:
        self.run_dir = home
        self._file = home / "settings.json"
        settings = {
            "deployment": "d",
            "instance": "i0",
            "coordinator": coordinator,
            "run_dir": str(home),
            "keys_dir": str(home),
            "address": "127.0.0.1",
            "rpc_port": 5000,
        }
        self._file.write_text(json.dumps(settings | fields))
        self._process: asyncio.subprocess.Process | None = None
        self.log = home / "sidecar.log"

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, PROCESS, self._file, stdout=log, stderr=log
            )

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        assert self._process is not None
        async with asyncio.timeout(LIMIT_S):
            return await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def __aenter__(self) -> Sidecar:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
