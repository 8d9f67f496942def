"""vLLM by itself, resized as a person does it with curl: no launcher, no gate, no coordinator.

Plain API servers with the flags that the product gives them. A joiner is started cold when the
resize begins, every old rank is told at once, rank 0 is asked for the phase, users are told of the
new layout when all have answered, and the retired rank is stopped afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
from elasticmoe_cli.demo import Plan, Report, Step
from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.load import Endpoint, Load
from elasticmoe_cli.local import ADDRESS, free_port
from elasticmoe_cli.profiles import Profile
from elasticmoe_coordinator.core.config import GroupConfig
from elasticmoe_coordinator.core.layout import redundant_experts, slots_per_rank
from elasticmoe_engine.command import GATE, parse
from elasticmoe_engine.launch import LaunchSpec, arguments
from elasticmoe_engine.model import count_experts
from rich.console import Console
from rich.table import Table

MODULES = {"sim": "elasticmoe_sim"}
VLLM = "vllm.entrypoints.openai.api_server"
START_LIMIT_S = 600.0
RESIZE_LIMIT_S = 900.0
"""vLLM's own limits are 300 s for prepare and 600 s for commit."""
LOAD_LIMIT_S = 300.0
STOP_LIMIT_S = 15.0
TOLD_S = 1.0
"""From the end of a resize to the stop of the retired rank: users hear of it first."""
POLL_S = 0.05


class Alone:
    """A group of plain API servers on this host. Each rank is a process group of its own."""

    def __init__(self, profile: Profile, folder: Path, *, max_size: int) -> None:
        self.size = 0
        self._profile, self._folder, self._max_size = profile, folder, max_size
        self._command = parse(profile.command)
        self._experts = count_experts(Path(self._command.model))
        self._rpc_port = free_port()
        self._ports: dict[int, int] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._epoch: str | None = None

    def endpoints(self) -> list[Endpoint]:
        """The ranks of the layout."""
        return [
            Endpoint(f"r{rank}", self._url(rank), self._url(rank), "/health")
            for rank in range(self.size)
        ]

    async def start(self, size: int) -> None:
        """Start the first ranks. Raises CommandFailed."""
        for rank in range(size):
            self._launch(rank, size, joiner=False)
        async with _within(START_LIMIT_S, f"the start of {size} ranks"), _client() as http:
            await self._healthy(http, range(size))
        self.size = size

    async def resize(self, size: int) -> Step:
        """From the first command until all have answered. Raises CommandFailed."""
        before, began = self.size, time.monotonic()
        for rank in range(before, size):
            self._launch(rank, size, joiner=True)
        async with _within(RESIZE_LIMIT_S, f"{before} -> {size}"), _client() as http:
            answers = asyncio.gather(*(self._tell(http, rank, size) for rank in range(before)))
            (committing, completed), _, _ = await asyncio.gather(
                self._phases(http), self._healthy(http, range(before, size)), answers
            )
        took = time.monotonic() - began
        self.size = size
        return Step(before, size, took, committing - began, completed - committing)

    def stop_retired(self) -> None:
        """Stop the ranks that are out of the layout."""
        self._stop([rank for rank in self._processes if rank >= self.size])

    def close(self) -> None:
        """Stop every rank, whatever its state."""
        self._stop(list(self._processes))

    # --- processes ------------------------------------------------------------------------------

    def _launch(self, rank: int, size: int, *, joiner: bool) -> None:
        slots = slots_per_rank(self._experts, GroupConfig.min_size)
        spec = LaunchSpec(
            launch="alone",
            rank=rank,
            size=size,
            joiner=joiner,
            master_address=ADDRESS,
            rpc_port=self._rpc_port,
            redundant_experts=redundant_experts(self._experts, slots, size),
            max_size=self._max_size,
        )
        model, *flags = arguments(self._command, spec)
        gate = flags.index(GATE)
        del flags[gate - 1 : gate + 1]
        port = self._ports[rank] = free_port()
        module = MODULES.get(self._profile.name, VLLM)
        words = [self._profile.python, "-m", module, "--model", model, *flags]
        environ = {**os.environ, **self._profile.environment(rank), "VLLM_HOST_IP": ADDRESS}
        environ["VLLM_ELASTIC_EP_SCALE_UP_LAUNCH"] = str(int(joiner))
        with self._log(rank).open("ab") as log:
            self._processes[rank] = subprocess.Popen(
                [*words, "--host", ADDRESS, "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environ,
            )

    def _stop(self, ranks: Iterable[int]) -> None:
        """SIGTERM, and SIGKILL to what is left after a while."""
        processes = {rank: self._processes[rank] for rank in ranks}
        try:
            for process in processes.values():
                os.kill(process.pid, signal.SIGTERM)  # Popen's own would reap it
            limit = time.monotonic() + STOP_LIMIT_S
            while time.monotonic() < limit and not all(map(_ended, processes.values())):
                time.sleep(POLL_S)
        finally:
            for rank, process in processes.items():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                del self._processes[rank]

    def _check(self) -> None:
        """Raises CommandFailed when a rank ended by itself."""
        for rank, process in self._processes.items():
            if _ended(process):
                lines = self._log(rank).read_text(errors="replace").strip().splitlines()
                raise CommandFailed(f"rank {rank} ended: {lines[-1] if lines else 'no word'}")

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    # --- HTTP -----------------------------------------------------------------------------------

    def _url(self, rank: int) -> str:
        return f"http://{ADDRESS}:{self._ports[rank]}"

    async def _healthy(self, http: httpx.AsyncClient, ranks: Iterable[int]) -> None:
        for rank in ranks:
            while True:
                self._check()
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(f"{self._url(rank)}/health", timeout=5)).is_success:
                        break
                await asyncio.sleep(POLL_S)

    async def _tell(self, http: httpx.AsyncClient, rank: int, size: int) -> None:
        body = {"new_data_parallel_size": size, "drain_timeout": GroupConfig.drain_timeout}
        try:
            answer = await http.post(f"{self._url(rank)}/scale_elastic_ep", json=body)
        except httpx.HTTPError as error:
            raise CommandFailed(f"rank {rank} did not answer: {error!r}") from None
        if answer.status_code != 200:
            raise CommandFailed(f"rank {rank} answered {answer.status_code}: {answer.text[:200]}")

    async def _phases(self, http: httpx.AsyncClient) -> tuple[float, float]:
        """When the commit began and when it ended."""
        committing = 0.0
        while True:
            self._check()
            status = await self._scaling(http)
            now = time.monotonic()
            if status.get("epoch") not in (None, self._epoch):  # not the resize before
                if status["phase"] == "committing":
                    committing = committing or now
                if status["phase"] == "completed":
                    self._epoch = status["epoch"]
                    return committing or now, now
            await asyncio.sleep(POLL_S)

    async def _scaling(self, http: httpx.AsyncClient) -> dict[str, Any]:
        """Empty when rank 0 can't say."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = await http.post(f"{self._url(0)}/is_scaling_elastic_ep", timeout=5)
            if answer.is_success:
                return dict(answer.json())
        return {}


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Not reaped yet, so that its id stays its own until its group has been killed."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, flags) is not None


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=RESIZE_LIMIT_S)


@contextlib.asynccontextmanager
async def _within(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise CommandFailed(f"{what} took longer than {seconds:g} s") from None


# --- a run and its table ------------------------------------------------------------------------


def run(profile: Profile, plan: Plan, console: Console) -> Report:
    """The plan's sizes under the plan's load; ends all in any case. Raises CommandFailed."""
    folder = Path(tempfile.mkdtemp(prefix="elasticmoe-alone-"))
    group = Alone(profile, folder, max_size=max(plan.sizes))
    failed = False
    try:
        return asyncio.run(_run(group, profile, plan, console))
    except CommandFailed as failure:
        failed = True
        line = f"vLLM alone: {failure} (logs are in {folder})"
        raise CommandFailed(line, failure.status) from None
    finally:
        group.close()
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


async def _run(group: Alone, profile: Profile, plan: Plan, console: Console) -> Report:
    first, *others = plan.sizes
    report = Report(profile.name)
    console.print(f"Starting {first} ranks ({profile.name} alone) …")
    await group.start(first)
    load = Load(
        group.endpoints, profile.served_model, clients=plan.clients, max_tokens=plan.max_tokens
    )
    async with load:
        for size in others:
            async with _within(LOAD_LIMIT_S, f"{plan.between} requests"):
                await load.progress(plan.between)
            step = await group.resize(size)
            report.steps.append(step)
            console.print(f"✓ {step.before} → {step.after} in {step.total_s:.1f} s")
            await asyncio.sleep(TOLD_S)
            await asyncio.to_thread(group.stop_retired)
        async with _within(LOAD_LIMIT_S, "the end of the load"):
            await load.progress(plan.between)
            result = await load.stop()
    report.requests, report.failed = result.requests, result.failed
    report.longest_gap_s, report.errors = result.longest_gap_s, dict(result.errors)
    return report


def failures(report: Report) -> Counter[str]:
    """Failed requests by status, or by what else ended them."""
    kinds: Counter[str] = Counter()
    for error, count in report.errors.items():  # RANK: WHAT [TEXT]
        what = error.partition(": ")[2]
        known = re.match(r"status \d+|finish reason \w+|error event|[\w ]+", what)
        kinds[known.group() if known else what] += count
    return kinds


def as_json(report: Report) -> dict[str, Any]:
    """For `--out`: here no log-probabilities were compared."""
    figures = report.as_json()
    del figures["output_mismatches"]
    return {**figures, "failures": dict(failures(report))}


def compare(product: Report, alone: Report) -> Table:
    """Both side by side; a ratio is alone / with."""
    table = Table(title=f"{product.engine}: with the product, and alone")
    for name in ("", "with", "alone", "ratio"):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, one: float, other: float) -> None:
        ratio = f"{other / one:.1f}" if one else "–"
        table.add_row(name, f"{one:.2f}", f"{other:.2f}", ratio)

    for ours, theirs in zip(product.steps, alone.steps, strict=True):
        row(f"{ours.before} → {ours.after} total s", ours.total_s, theirs.total_s)
        row("      prepare s", ours.prepare_s, theirs.prepare_s)
        row("      commit s", ours.commit_s, theirs.commit_s)
        table.add_section()
    table.add_row("requests sent", str(product.requests), str(alone.requests))
    table.add_row("requests failed", str(product.failed), str(alone.failed))
    kinds, others = failures(product), failures(alone)
    for kind in sorted(kinds | others):
        table.add_row(f"  {kind}", str(kinds[kind]), str(others[kind]))
    row("longest gap in a stream s", product.longest_gap_s, alone.longest_gap_s)
    return table
