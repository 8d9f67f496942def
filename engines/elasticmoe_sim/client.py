"""The API server's side of the engine: its core process, the requests in it, its configuration."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any
from uuid import uuid4

from elasticmoe_sim import core, flags
from elasticmoe_sim.config import Config
from elasticmoe_sim.metrics import Metrics


class EngineDeadError(Exception):
    """The engine core is gone."""


@dataclass(frozen=True)
class Output:
    """One step of a request: a token or, when it was aborted, none."""

    token: int | None
    logprob: float
    finish_reason: str | None


@dataclass
class ParallelConfig:
    """The part of vLLM's that others read; both change with a resize."""

    data_parallel_size: int
    data_parallel_rank: int


@dataclass
class VllmConfig:
    """Where vLLM keeps its ParallelConfig."""

    parallel_config: ParallelConfig
    use_v2_model_runner: bool = False


@dataclass
class _Pending:
    prompt_tokens: int
    outputs: asyncio.Queue[Output | None] = field(default_factory=asyncio.Queue)
    started: bool = False


class EngineClient:
    """Starts the core, hands requests to it and their tokens back."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config = config
        self.vllm_config = VllmConfig(ParallelConfig(config.size, config.rank))
        self._metrics = metrics
        self._pending: dict[str, _Pending] = {}
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._ready = asyncio.Event()
        self.dead = asyncio.Event()

    @property
    def engine_core(self) -> EngineClient:
        """In vLLM an object of its own; `_eep_commit_pause_mode` is asked there."""
        return self

    def _eep_commit_pause_mode(self) -> str:
        return "keep"

    @property
    def errored(self) -> bool:
        """Whether the core died under an API server that still needs it."""
        return self.dead.is_set() and not flags.get_elastic_ep_rank_retired()

    async def start(self) -> None:
        """Start the core process and wait until it is ready; raises EngineDeadError."""
        method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        context: Any = multiprocessing.get_context(method)
        self._pipe, theirs = context.Pipe()
        assert self._pipe is not None
        name = f"EngineCore_DP{self.config.rank}"
        process = context.Process(
            target=core.main, args=(theirs, self.config), name=name, daemon=True
        )
        process.start()
        theirs.close()
        self._process = process
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._read)
        dead, ready = (asyncio.create_task(one.wait()) for one in (self.dead, self._ready))
        await asyncio.wait([dead, ready], return_when=asyncio.FIRST_COMPLETED)
        dead.cancel()
        ready.cancel()
        if self.dead.is_set():
            raise EngineDeadError("the engine core did not start")

    def send(self, word: str, *values: Any) -> None:
        """Tell the core something; a dead core hears nothing."""
        assert self._pipe is not None
        if not self.dead.is_set():
            try:
                self._pipe.send((word, *values))
            except OSError:
                self._died()

    def _read(self) -> None:
        assert self._pipe is not None
        try:
            while self._pipe.poll():
                self._hear(*self._pipe.recv())
        except (EOFError, OSError):
            self._died()

    def _hear(self, word: str, *values: Any) -> None:
        rank = self.config.rank
        match word:
            case "ready":
                self._ready.set()
            case "tokens":
                made, load = values
                for id, token, logprob, last in made:
                    pending = self._pending.get(id)
                    if pending is None:
                        continue
                    if not pending.started:
                        pending.started = True
                        self._metrics.first_token(rank, pending.prompt_tokens)
                    reason = "length" if last else None
                    pending.outputs.put_nowait(Output(token, logprob, reason))
                    if last:
                        self._metrics.finished(rank, "length")
                self._metrics.tokens(rank, len(made))
                self._metrics.load(rank, *load)
            case "aborted":
                pending = self._pending.get(values[0])
                if pending is not None:
                    pending.outputs.put_nowait(Output(None, 0.0, "abort"))
                    self._metrics.finished(rank, "abort")

    def _died(self) -> None:
        assert self._pipe is not None
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self.dead.set()
        for pending in self._pending.values():
            pending.outputs.put_nowait(None)

    async def generate(self, prompt: list[int], max_tokens: int) -> AsyncIterator[Output]:
        """Outputs of one request until it ends; raises EngineDeadError when the core does first.

        Closing the iterator early aborts the request.
        """
        if self.dead.is_set():
            raise EngineDeadError
        id = uuid4().hex
        pending = self._pending[id] = _Pending(len(prompt))
        finished = False
        try:
            self.send("add", id, prompt, max_tokens)
            while not finished:
                output = await pending.outputs.get()
                if output is None:
                    finished = True
                    raise EngineDeadError
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._pending[id]
            if not finished:
                self.send("abort", id)

    def shutdown(self) -> None:
        """Stop the core; requests in it fail."""
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
