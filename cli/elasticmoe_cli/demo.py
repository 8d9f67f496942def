"""The demo: a group on this host resizes under load, and nobody notices."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elasticmoe_cli import live
from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.load import Load, difference, endpoints_of, log_probabilities
from elasticmoe_cli.local import LocalGroup, Options
from elasticmoe_cli.profiles import Profile

SIZES = (2, 3, 2, 3, 2)
BETWEEN = 12
"""Requests answered between two steps."""


@dataclass
class Step:
    """One resize; seconds as the coordinator measured them."""

    before: int
    after: int
    total_s: float
    prepare_s: float
    commit_s: float


@dataclass
class Report:
    """What the demo saw. recovery: seconds from the kill of an engine, empty without one."""

    engine: str
    steps: list[Step] = field(default_factory=list)
    requests: int = 0
    failed: int = 0
    longest_gap_s: float = 0.0
    output_mismatches: int = 0
    comparisons: int = 0
    largest_difference: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    recovery: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For `--out`."""
        steps = [
            {
                "from": one.before,
                "to": one.after,
                "total_s": round(one.total_s, 3),
                "prepare_s": round(one.prepare_s, 3),
                "commit_s": round(one.commit_s, 3),
            }
            for one in self.steps
        ]
        return {
            "engine": self.engine,
            "steps": steps,
            "requests": self.requests,
            "failed": self.failed,
            "longest_gap_s": round(self.longest_gap_s, 3),
            "output_mismatches": self.output_mismatches,
        } | ({"recovery": self.recovery} if self.recovery else {})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the demo goes. tolerance: of log-probabilities. kill: end with the loss of an engine."""

    sizes: Sequence[int] = SIZES
    clients: int = 4
    max_tokens: int = 24
    tolerance: float = 1e-3
    of_prompt: bool = False
    between: int = BETWEEN
    kill: bool = False
    stall_s: float = 20.0


def run(profile: Profile, plan: Plan, console: Console, folder: Path | None = None) -> Report:
    """Run the demo with a group of its own; ends it in any case. Raises CommandFailed."""
    made = None if folder else Path(tempfile.mkdtemp(prefix="elasticmoe-"))
    group = LocalGroup(folder or made or Path())
    failed = False
    try:
        return asyncio.run(_Demo(group, profile, plan, console).run())
    except CommandFailed as failure:
        failed = True
        raise CommandFailed(f"{failure} (logs are in {group.folder})", failure.status) from None
    finally:
        group.down(keep_logs=failed)
        if made and not failed:
            shutil.rmtree(made, ignore_errors=True)


class _Demo:
    def __init__(self, group: LocalGroup, profile: Profile, plan: Plan, console: Console) -> None:
        self._group, self._profile, self._plan = group, profile, plan
        self._console = console
        self._report = Report(profile.name)
        self._load: Load | None = None
        self._view: live.Show = lambda _: None
        self._over = False
        self._reference: list[float] = []

    async def run(self) -> Report:
        try:
            return await self._run()
        finally:
            self._over = True

    async def _run(self) -> Report:
        plan = self._plan
        first = plan.sizes[0]
        options = Options(max_size=max(plan.sizes), stall_s=plan.stall_s)
        self._console.print(f"Starting {first} ranks ({self._profile.name}) …")
        began = time.monotonic()
        await asyncio.to_thread(self._group.create, self._profile, options)
        with live.view(self._console, transient=True) as self._view:
            await asyncio.to_thread(self._group.scale, first, self._show)
            line = f"{first} ranks serve after {time.monotonic() - began:.1f} s"
            live.print_done(self._console, line)
            coordinator = self._group.coordinator()
            await self._compare()
            load = Load(
                lambda: endpoints_of(coordinator.status()),
                self._profile.served_model,
                clients=plan.clients,
                max_tokens=plan.max_tokens,
            )
            async with load:
                self._load = load
                await self._alongside(load.progress(plan.between))
                for before, after in zip(plan.sizes, plan.sizes[1:], strict=False):
                    await self._step(before, after)
                    await self._alongside(load.progress(plan.between))
                    await self._compare()
                result = await load.stop()
                self._report.requests, self._report.failed = result.requests, result.failed
                self._report.longest_gap_s = result.longest_gap_s
                self._report.errors = dict(result.errors)
            if plan.kill:
                await self._lose()
        self._print()
        return self._report

    async def _step(self, before: int, after: int) -> None:
        operation = await asyncio.to_thread(self._group.scale, after, self._show)
        if operation is None:
            raise CommandFailed(f"nothing was done to get from {before} to {after}")
        seconds = {one["phase"]: one["seconds"] for one in operation["phases"]}
        step = Step(
            before,
            after,
            operation["ended"] - operation["started"],
            seconds.get("prepare", 0.0),
            seconds.get("commit", 0.0),
        )
        self._report.steps.append(step)
        line = f"{before} → {after} in {step.total_s:.1f} s{live.phases(operation['phases'])}"
        live.print_done(self._console, line)

    async def _compare(self) -> None:
        """Every ready rank answers one prompt; all answers are the same as the first."""
        status = await asyncio.to_thread(self._group.coordinator().status)
        ready = {one["instance"] for one in status["instances"] if one["ready"]}
        for endpoint in endpoints_of(status):
            if endpoint.name not in ready:
                continue
            values = await log_probabilities(
                endpoint, self._profile.served_model, of_prompt=self._plan.of_prompt
            )
            self._reference = self._reference or values
            self._report.comparisons += 1
            off = difference(values, self._reference)
            self._report.largest_difference = max(self._report.largest_difference, off)
            if not off <= self._plan.tolerance:
                self._report.output_mismatches += 1

    async def _lose(self) -> None:
        """Kill one engine's core under load; how long until all is well again?"""
        coordinator = self._group.coordinator()
        load = Load(
            lambda: endpoints_of(coordinator.status()),
            self._profile.served_model,
            clients=self._plan.clients,
            max_tokens=self._plan.max_tokens,
        )
        size = self._plan.sizes[-1]
        if size < max(self._plan.sizes):
            await asyncio.to_thread(self._group.scale, max(self._plan.sizes), self._show)
            size = max(self._plan.sizes)
        async with load:
            self._load = load
            await self._alongside(load.progress(self._plan.between))
            before = await asyncio.to_thread(coordinator.status)
            killed = time.monotonic()
            victim = f"r{size - 1}"
            core = await asyncio.to_thread(engine_core, self._group.run_dir(victim))
            os.kill(core, signal.SIGKILL)
            noticed = await self._await(lambda s: s["state"] == "Recovering")
            started = noticed

            def serves(status: dict[str, Any]) -> bool:
                ready = sum(1 for one in status["instances"] if one["ready"])
                new = status["generation"] > before["generation"]
                return bool(new and status["state"] == "Serving" and ready == size)

            healthy = await self._await(serves)
            operation = (await asyncio.to_thread(coordinator.status))["history"][-1]
            line = f"recovered{live.phases(operation['phases'])}"
            live.print_done(self._console, line)
            first: list[float] = []
            load.on_chunk = lambda: first.append(time.monotonic())
            await self._alongside(load.progress(self._plan.between))
            self._report.recovery = {
                "noticed_s": round(started - killed, 3),
                "all_healthy_s": round(healthy - killed, 3),
                "first_token_s": round(first[0] - killed, 3),
            }
        await self._compare()

    async def _await(self, condition: Callable[[dict[str, Any]], bool]) -> float:
        """When a status first fulfilled a condition."""
        coordinator = self._group.coordinator()
        while True:
            status = await asyncio.to_thread(coordinator.status)
            self._show(status)
            if condition(status):
                return time.monotonic()
            if status["state"] == "Failed":
                raise CommandFailed(status["message"])
            await asyncio.sleep(0.05)

    async def _alongside(self, work: Any) -> None:
        """Do something, showing the group meanwhile."""
        task = asyncio.ensure_future(work)
        coordinator = self._group.coordinator()
        while not task.done():
            self._show(await asyncio.to_thread(coordinator.status))
            await asyncio.wait({task}, timeout=0.25)
        await task

    def _show(self, status: dict[str, Any]) -> None:
        if self._over:
            raise CommandFailed("interrupted")  # ends the thread that waits for a size
        extra = None
        if self._load is not None:
            result = self._load.result
            colour = "red" if result.failed else "green"
            extra = Text(
                f"{result.requests} requests, {result.failed} failed, {result.chunks} chunks, "
                f"longest gap {result.longest_gap_s:.2f} s",
                style=colour,
            )
        self._view(live.status(status, extra))

    def _print(self) -> None:
        report = self._report
        table = Table(title=f"Resizes under load ({report.engine})")
        for name in ("step", "total s", "prepare s", "commit s"):
            table.add_column(name, justify="left" if name == "step" else "right")
        for one in report.steps:
            table.add_row(
                f"{one.before} → {one.after}",
                f"{one.total_s:.2f}",
                f"{one.prepare_s:.2f}",
                f"{one.commit_s:.2f}",
            )
        self._console.print(table)
        live.print_totals(self._console, report)
        if report.recovery:
            recovery = report.recovery
            self._console.print(
                f"one engine killed: noticed after {recovery['noticed_s']:.1f} s, all ranks "
                f"healthy after {recovery['all_healthy_s']:.1f} s, first token after "
                f"{recovery['first_token_s']:.1f} s"
            )


def engine_core(run_dir: Path) -> int:
    """Process of an engine's core (or its API server where there is no other process)."""
    transport = httpx.HTTPTransport(uds=str(run_dir / "launcher.sock"))
    with httpx.Client(transport=transport, base_url="http://launcher") as client:
        engine = client.get("/state").json()["engine"]
    others = [pid for pid in engine["pids"] if pid != engine["pid"]]
    cores = [pid for pid in others if "EngineCor" in _names(pid)]  # comm has 15 characters
    found: int = (cores or others or [engine["pid"]])[0]
    return found


def _names(pid: int) -> str:
    try:
        return "".join(Path(f"/proc/{pid}/{file}").read_text() for file in ("cmdline", "comm"))
    except OSError:
        return ""


def write(out: Path, report: Report | None = None) -> None:
    """The report as JSON; without one, only see whether it can be written. Raises CommandFailed."""
    try:
        with out.open("a" if report is None else "w") as file:
            if report is not None:
                file.write(json.dumps(report.as_json(), indent=2) + "\n")
    except OSError as error:
        line = f"--out {out} can't be written ({error.strerror}): name another file"
        raise CommandFailed(line, 2) from None
