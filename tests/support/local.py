"""A whole group of processes with the simulated engine, and users who stream from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from elasticmoe_cli.api import Coordinator
from elasticmoe_cli.demo import engine_core
from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.load import Load, endpoints_of
from elasticmoe_cli.local import LocalGroup, Options, free_port
from elasticmoe_cli.profiles import Profile, find
from elasticmoe_engine.local_http import call_unix
from elasticmoe_engine.processes import descendants

from support.contract import is_gone
from support.gate import until

LIMIT_S = 40.0
SIM = {
    "SIM_BOOT_S": "0.1",
    "SIM_PREPARE_S": "0.2",
    "SIM_COMMIT_S": "0.2",
    "SIM_TOKEN_S": "0.02",
    "SIM_WATCHDOG_S": "0.5",
    "SIM_JOINER_TERM_S": "1",
}
QUICK = {"lame_duck_s": 0.5, "settle_s": 0.5, "stall_s": 3.0, "replacement_s": 5.0}

Status = dict[str, Any]


class Local:
    """A group on this host. `faults` is the file in which faults are switched on and off."""

    def __init__(
        self, folder: Path, profile: Profile, options: Options, limit_s: float = LIMIT_S
    ) -> None:
        self.group, self.limit_s = LocalGroup(folder), limit_s
        self.faults = folder / "faults"
        self.profile = replace(
            profile, environ={**SIM, **profile.environ, "SIM_FAULTS_FILE": str(self.faults)}
        )
        self.seen: set[int] = set()
        """All processes that were ever found beneath an instance."""
        self._frozen: set[int] = set()
        self._joins: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.group.create(self.profile, options)

    def end(self) -> None:
        """Everything that was started."""
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for process in self._joins:
            process.terminate()
        for process in self._joins:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()  # what it started ends with it
                process.wait()
        self.group.down()

    # --- what is --------------------------------------------------------------------------------

    @property
    def api(self) -> Coordinator:
        return self.group.coordinator()

    def status(self) -> Status:
        return self.api.status()

    def launcher(self, name: str) -> dict[str, Any]:
        """`GET /state` of an instance's launcher."""
        status, state = call_unix(
            self.group.run_dir(name) / "launcher.sock", "GET", "/state", timeout=5
        )
        assert status == 200
        self.seen |= descendants(self.group.pid(name) or 0)
        return dict(state)

    def launches(self) -> dict[str, str]:
        """The launch that runs in each instance that has an engine."""
        found = {name: self.launcher(name)["engine"]["launch"] for name in self.group.instances()}
        return {name: launch for name, launch in found.items() if launch}

    def sidecar(self, name: str) -> int:
        """An instance's sidecar."""
        [found] = [pid for pid in _children(self.group.pid(name)) if "sidecar" in _words(pid)]
        return found

    def core(self, name: str) -> int:
        """The process of an instance's engine core."""
        return engine_core(self.group.run_dir(name))

    async def until(
        self, what: str, true: Callable[[Status], object], limit_s: float = 0
    ) -> Status:
        """Await a condition on the status; a coordinator that is away is waited for."""
        limit_s = limit_s or self.limit_s
        end = time.monotonic() + limit_s
        status: Status | None = None
        while time.monotonic() < end:
            with contextlib.suppress(CommandFailed):
                status = await asyncio.to_thread(self.status)
                if true(status):
                    return status
            await asyncio.sleep(0.03)
        raise AssertionError(f"not in {limit_s:g} s: {what}; status: {status}")

    async def serves(self, size: int, generation: int = 0, limit_s: float = 0) -> Status:
        """Await a group of this size that is at rest."""

        def settled(status: Status) -> bool:
            ready = sum(1 for one in status["instances"] if one["ready"])
            return bool(
                status["state"] == "Serving"
                and status["operation"] is None
                and status["size"] == size == ready
                and status["generation"] >= generation
            )

        return await self.until(f"{size} ranks serve", settled, limit_s)

    # --- what is done ---------------------------------------------------------------------------

    def start(self, size: int, spare: int = 0) -> None:
        """Start instances, all at once, and have `size` of them serve; the others stand by."""
        for number in range(size + spare):
            self.group.start_instance(number)
        until(lambda: self._warm() == size + spare, self.limit_s)
        if self.status()["policy"] == "declared":
            self.api.scale(size)
        self.group.await_serving(size)
        self.launches()

    def _warm(self) -> int:
        """How many instances could serve."""
        for name in self.group.instances():
            assert self.group.pid(name), f"{name} ended"
        found = self.status()["instances"]
        return sum(1 for one in found if (one["standby"] and not one["reason"]) or one["active"])

    async def target(self, size: int) -> dict[str, Any] | None:
        """Ask for a size, without waiting; instances are neither started nor stopped."""
        return await asyncio.to_thread(self.api.scale, size)

    async def ended(self, operation: dict[str, Any] | None) -> dict[str, Any]:
        """Await the end of an operation, also of one that goes on under a new coordinator."""
        assert operation is not None

        def over(status: Status) -> bool:
            return any(one["id"] == operation["id"] for one in status["history"])

        status = await self.until(f"the end of {operation}", over)
        return next(one for one in status["history"] if one["id"] == operation["id"])

    async def phase(self, name: str) -> Status:
        """Await a phase of the running operation."""
        return await self.until(
            f"phase {name}", lambda s: s["operation"] and s["operation"]["phase"] == name, 15
        )

    def freeze(self, pid: int) -> None:
        """SIGSTOP; continued at the end in any case."""
        self._frozen.add(pid)
        os.kill(pid, signal.SIGSTOP)

    def thaw(self, pid: int) -> None:
        os.kill(pid, signal.SIGCONT)
        self._frozen.discard(pid)

    def join(
        self,
        name: str,
        *flags: str,
        command: list[str] | None = None,
        command_file: Path | None = None,
        **more: str,
    ) -> subprocess.Popen[bytes]:
        """`elasticmoe join` by hand, beside the group's own; `more`: environment."""
        home = self.group.folder / "joins" / name
        home.mkdir(parents=True)
        words = [sys.executable, "-m", "elasticmoe_cli", "join", "--name", name]
        words += ["--deployment", "local", "--coordinator", self.address]
        words += ["--keys", str(self.group.keys_dir), "--run-dir", str(home / "run")]
        words += ["--policy", "declared", "--ordinal", "9"]
        words += ["--launcher=--engine", "--launcher", "elasticmoe_sim.entry:main"]
        words += flags
        if command_file is not None:
            words += ["--command-file", str(command_file)]
        else:
            words += ["--", *(command or self.profile.command)]
            words += ["--host", "127.0.0.1", "--port", str(free_port())]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                words,
                env={**os.environ, **self.profile.environ, **more},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._joins.append(process)
        return process

    def join_log(self, name: str) -> str:
        return (self.group.folder / "joins" / name / "log").read_text(errors="replace")

    @property
    def address(self) -> str:
        """Where sidecars connect."""
        ready = self.group.folder / "coordinator" / "ready.json"
        return str(json.loads(ready.read_text())["zmq"])

    @asynccontextmanager
    async def users(self, *, may_fail: bool = False, clients: int = 4) -> AsyncIterator[Load]:
        """Streaming users from before the block to after it; none of their requests fails.

        may_fail: what became of their requests is not looked at.
        """
        known: list[Status] = []

        def endpoints() -> list[Any]:
            with contextlib.suppress(CommandFailed):  # the coordinator may be away
                known[:] = [self.status()]
            return endpoints_of(known[0]) if known else []

        load = Load(endpoints, self.profile.served_model, clients=clients, keep_alive_s=0.5)
        async with load:
            await asyncio.wait_for(load.progress(2 * clients), self.limit_s)
            yield load
            if not may_fail:
                await asyncio.wait_for(load.progress(2 * clients), self.limit_s)
            result = await asyncio.wait_for(load.stop(), self.limit_s)
        if not may_fail:
            assert result.failed == 0, dict(result.errors)

    def gone(self) -> bool:
        """Whether no process is left of all that was seen."""
        return all(is_gone(pid) for pid in self.seen)


@contextmanager
def local_group(
    folder: Path,
    size: int = 2,
    spare: int = 0,
    *,
    engine: str = "sim",
    limit_s: float = LIMIT_S,
    **options: Any,
) -> Iterator[Local]:
    """A group of which `size` instances serve and `spare` stand by; ended in any case."""
    local = Local(folder, find(engine), Options(**{**QUICK, **options}), limit_s)
    try:
        if size:
            local.start(size, spare)
        yield local
    except BaseException:
        for name in ("coordinator", *local.group.instances()):
            with contextlib.suppress(OSError):
                print(f"--- {name}\n{local.group.log(name).read_text(errors='replace')[-3000:]}")
        raise
    finally:
        local.end()


def elasticmoe(
    *words: str, limit_s: float = 60, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run the command; `environ` on top of this process's."""
    return subprocess.run(
        [sys.executable, "-m", "elasticmoe_cli", *words],
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        env={**os.environ, "COLUMNS": "80", **environ},
    )


def probe(local: Local, status: Status) -> list[int]:
    """What each ready rank answers to a request."""
    return [
        httpx.get(f"http://127.0.0.1:{one['servingPort']}/v1/models", timeout=10).status_code
        for one in status["instances"]
        if one["ready"]
    ]


def _children(pid: int | None) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
