"""What the gate costs a request: microseconds in the process, throughput side by side.

    python benchmarks/gate_overhead.py [--rounds N] [--seconds S]

The first table calls an ASGI application that does nothing, bare and behind the gate in turns: the
difference is the gate's. The second has closed-loop clients on two groups of simulated engines, one
with and one without the gate, in turns; CPU is what the API server used, which another process on
this host disturbs less than it does the throughput. Exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from elasticmoe_engine.gate import Gate
from elasticmoe_engine.gate.settings import Settings

TARGET_US = 50.0
TARGET_SHARE = 0.01
CALLS = 2000
CHUNKS = 64
CLIENTS = 8
GATE = "elasticmoe_engine.gate.Gate"

App = Callable[[Any, Any, Any], Any]


# --- in the process -----------------------------------------------------------------------------


def application(chunks: int) -> App:
    """Reads a body and answers in so many parts."""
    start = {"type": "http.response.start", "status": 200, "headers": []}
    more = {"type": "http.response.body", "body": b"data: token\n\n", "more_body": True}
    last = {"type": "http.response.body", "body": b""}

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(start)
        for _ in range(chunks - 1):
            await send(more)
        await send(last)

    return answer


async def microseconds(app: App) -> float:
    """Of one call."""
    headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"2")]
    path = "/v1/completions"
    message = {"type": "http.request", "body": b"{}", "more_body": False}

    async def receive() -> Any:
        return message

    async def send(_: Any) -> None:
        pass

    began = time.perf_counter()
    for _ in range(CALLS):
        scope = {"type": "http", "path": path, "root_path": "", "headers": headers}
        await app(scope, receive, send)
    return (time.perf_counter() - began) / CALLS * 1e6


async def in_process(rounds: int) -> dict[str, tuple[float, float]]:
    """Microseconds a call, bare and gated, by what is answered."""
    found = {}
    for name, chunks in (("one answer", 1), (f"stream of {CHUNKS} chunks", CHUNKS)):
        bare = application(chunks)
        gated = Gate(bare, Settings(engine_state="elasticmoe_sim.flags"))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            times[0].append(await microseconds(bare))
            times[1].append(await microseconds(gated))
        found[name] = (statistics.median(times[0]), statistics.median(times[1]))
    return found


# --- throughput ---------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Group:
    """Two ranks; the load goes to rank 0."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = free_port()
        ports, rpc = (self.port, free_port()), str(free_port())
        environ = {**os.environ, "SIM_TOKEN_S": "0", "ELASTICMOE_LAUNCH": "benchmark"}
        self.processes = []
        for rank, port in enumerate(ports):
            run_dir = folder / f"rank{rank}"
            run_dir.mkdir(parents=True)
            words = ["--port", str(port), "--data-parallel-rank", str(rank)]
            words += ["--data-parallel-rpc-port", rpc, *flags]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "elasticmoe_sim", *words],
                    env={**environ, "ELASTICMOE_RUN_DIR": str(run_dir)},
                    stderr=subprocess.DEVNULL,
                )
            )

    def close(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(10)

    async def ready(self) -> None:
        async with asyncio.timeout(30):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.1)
                    continue
                writer.close()
                return

    def cpu_s(self) -> float:
        """What rank 0's API server used so far."""
        text = Path(f"/proc/{self.processes[0].pid}/stat").read_text().rpartition(")")[2]
        return sum(map(int, text.split()[11:13])) / os.sysconf("SC_CLK_TCK")

    async def load(self, seconds: float) -> tuple[float, float]:
        """Requests a second and CPU microseconds a request."""
        body = json.dumps({"model": "sim", "prompt": "x", "max_tokens": 1}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        began, used = time.monotonic(), self.cpu_s()
        counts = await asyncio.gather(
            *(self._client(request, began + seconds) for _ in range(CLIENTS))
        )
        took = time.monotonic() - began
        return sum(counts) / took, (self.cpu_s() - used) / sum(counts) * 1e6

    async def _client(self, request: bytes, until: float) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        count = 0
        while time.monotonic() < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"the engine answered {head[:200]!r}")
            length = next(
                int(line[16:])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length: ")
            )
            await reader.readexactly(length)
            count += 1
        writer.close()
        return count


@contextmanager
def groups() -> Iterator[tuple[Group, Group]]:
    """Without the gate, and with it."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bare = Group(Path(folder, "bare"))
        stack.callback(bare.close)
        gated = Group(Path(folder, "gated"), "--middleware", GATE)
        stack.callback(gated.close)
        yield bare, gated


async def throughput(rounds: int, seconds: float) -> list[list[tuple[float, float]]]:
    """Of each round: (requests a second, CPU microseconds a request), bare and gated."""
    with groups() as both:
        for group in both:
            await group.ready()
            await group.load(1)  # warm
        measured: list[list[tuple[float, float]]] = [[], []]
        for number in range(rounds):
            for which in (0, 1) if number % 2 else (1, 0):
                measured[which].append(await both[which].load(seconds))
        return measured


# --- the tables ---------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()

    print(f"{'in the process':<24}{'bare us':>10}{'gated us':>10}{'gate us':>10}", flush=True)
    costs = []
    for name, (bare, gated) in asyncio.run(in_process(args.rounds * 5)).items():
        costs.append(gated - bare)
        print(f"{name:<24}{bare:>10.2f}{gated:>10.2f}{gated - bare:>10.2f}", flush=True)

    measured = asyncio.run(throughput(args.rounds, args.seconds))
    rates, cpus = ([statistics.median(r[n] for r in one) for one in measured] for n in (0, 1))
    print(f"\n{'uvicorn, sim engine':<24}{'bare':>10}{'gated':>10}{'change':>10}")
    for name, (bare, gated) in (("requests/s", rates), ("CPU us/request", cpus)):
        print(f"{name:<24}{bare:>10.0f}{gated:>10.0f}{(gated / bare - 1) * 100:>+9.1f}%")
    cost, share = cpus[1] - cpus[0], cpus[1] / cpus[0] - 1
    print(f"the gate costs {cost:.1f} us of CPU, {share:.1%} of a request that computes nothing")

    missed = max(*costs, cost) > TARGET_US or share > TARGET_SHARE
    verdict = "missed" if missed else "met"
    print(f"targets: under {TARGET_US:g} us, under {TARGET_SHARE:.0%}: {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
