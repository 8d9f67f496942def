"""The engine core: a process of its own that makes one token a step for every running request.

The API server is at the other end of a pipe; when that breaks the core ends. Its membership of the
group is its own connection to the store, so that killing the core stalls the peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from elasticmoe_sim.config import Config
from elasticmoe_sim.faults import Faults
from elasticmoe_sim.store import DIE, STALLED, StoreClient

VOCABULARY = 512
_FAULT_POLL_S = 0.05


@dataclass
class _Request:
    id: str
    seed: bytes
    prompt_tokens: int
    max_tokens: int
    made: int = 0


def seed_of(prompt: list[int]) -> bytes:
    """What the tokens of a prompt depend on: the prompt alone, so that all ranks agree."""
    return hashlib.blake2b(repr(prompt).encode(), digest_size=16).digest()


def next_token(seed: bytes, index: int) -> tuple[int, float]:
    """Token id and log-probability of the `index`-th token after a prompt."""
    digest = hashlib.blake2b(seed + index.to_bytes(4, "big"), digest_size=8).digest()
    token = int.from_bytes(digest[:4], "big") % VOCABULARY
    return token, -(int.from_bytes(digest[4:], "big") % 5000) / 1000 - 0.001


@dataclass
class Scheduler:
    """Which requests run and which wait; pure."""

    max_running: int
    kv_tokens: int
    running: dict[str, _Request] = field(default_factory=dict)
    waiting: deque[_Request] = field(default_factory=deque)

    def add(self, id: str, prompt: list[int], max_tokens: int) -> None:
        """Queue a request."""
        self.waiting.append(_Request(id, seed_of(prompt), len(prompt), max_tokens))

    def abort(self, id: str) -> None:
        """Forget a request, wherever it is."""
        self.running.pop(id, None)
        self.waiting = deque(one for one in self.waiting if one.id != id)

    def abort_all(self) -> list[str]:
        """Forget all requests and say which they were."""
        ids = [*self.running, *(one.id for one in self.waiting)]
        self.running.clear()
        self.waiting.clear()
        return ids

    def step(self) -> list[tuple[str, int, float, bool]]:
        """One token for every running request: (id, token, log-probability, last)."""
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting.popleft()
            self.running[request.id] = request
        made = []
        for request in list(self.running.values()):
            token, logprob = next_token(request.seed, request.made)
            request.made += 1
            last = request.made >= request.max_tokens
            if last:
                del self.running[request.id]
            made.append((request.id, token, logprob, last))
        return made

    def load(self) -> tuple[int, int, float]:
        """Requests running, requests waiting, share of the KV cache used."""
        used = sum(one.prompt_tokens + one.made for one in self.running.values())
        return len(self.running), len(self.waiting), min(1.0, used / self.kv_tokens)


def main(pipe: Connection, config: Config) -> None:
    """Body of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # the name that vLLM's engine core shows in process lists
        Path("/proc/self/comm").write_text("VLLM::EngineCore")
    asyncio.run(_Core(pipe, config).run())


class _Core:
    def __init__(self, pipe: Connection, config: Config) -> None:
        self._pipe = pipe
        self._config = config
        self._faults = Faults(config.rank)
        self._scheduler = Scheduler(config.max_num_seqs, config.max_num_seqs * config.max_model_len)
        self._store = StoreClient()
        self._paused = False
        self._stalled = False
        self._stop = asyncio.Event()
        self._work = asyncio.Event()

    async def run(self) -> None:
        timing = self._config.timing
        await self._store.connect(
            self._config.master_address, self._config.rpc_port, timing.start_limit_s
        )
        await asyncio.sleep(timing.boot_s * self._faults.slowness)
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._read)
        tasks = [asyncio.create_task(self._steps()), asyncio.create_task(self._watch_group())]
        if self._faults.watched or self._faults.now():
            tasks.append(asyncio.create_task(self._watch_faults()))
        self._crash_if_told()  # before anybody counts on it
        self._pipe.send(("ready",))
        await self._stop.wait()
        for task in tasks:
            task.cancel()

    def _read(self) -> None:
        try:
            while self._pipe.poll():
                self._obey(*self._pipe.recv())
        except (EOFError, OSError):  # the API server is gone
            self._stop.set()

    def _obey(self, word: str, *values: Any) -> None:
        match word:
            case "add":
                self._scheduler.add(*values)
                self._work.set()
            case "abort":
                self._scheduler.abort(*values)
                self._work.set()
            case "pause":
                self._paused = True
                if values[0] == "abort":
                    for id in self._scheduler.abort_all():
                        self._pipe.send(("aborted", id))
            case "resume":
                self._paused = False
                self._work.set()
            case "join":
                self._membership = asyncio.create_task(self._join())
            case "leave":
                self._membership = asyncio.create_task(self._leave())
            case "stop":
                self._stop.set()

    async def _join(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._store.join(self._config.rank)

    async def _leave(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._store.leave()
        self._stop.set()

    async def _steps(self) -> None:
        while True:
            await self._work.wait()
            await asyncio.sleep(self._config.timing.token_s * self._faults.slowness)
            if self._paused or self._stalled:
                self._work.clear()
                continue
            made = self._scheduler.step()  # none after an abort: the load is news all the same
            self._pipe.send(("tokens", made, self._scheduler.load()))
            if not self._scheduler.running and not self._scheduler.waiting:
                self._work.clear()

    async def _watch_group(self) -> None:
        """Stall as soon as the group does; die where vLLM's engines would."""
        lost = asyncio.create_task(self._store.lost.wait())
        while not self._stalled:
            keys = asyncio.create_task(self._store.wait(some=[STALLED, DIE], timeout=3600))
            await asyncio.wait([lost, keys], return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                keys.cancel()
                self._stalled = True
            elif keys.exception() is None:
                if DIE in keys.result():
                    os._exit(1)
                self._stalled = True

    def _crash_if_told(self) -> None:
        if "crash_core" in self._faults:
            os.kill(os.getpid(), signal.SIGKILL)

    async def _watch_faults(self) -> None:
        while True:
            self._crash_if_told()
            if "hang" in self._faults and not self._stalled:
                self._stalled = True
                with contextlib.suppress(ConnectionError):
                    await self._store.set(STALLED, f"rank {self._config.rank} hangs")
            await asyncio.sleep(_FAULT_POLL_S)
