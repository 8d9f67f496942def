"""Launchers as processes, and a group of them on this host whose sidecars the test plays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from elasticmoe_engine.local_http import call_unix
from elasticmoe_engine.processes import descendants

from support.contract import free_port, is_gone
from support.gate import until

SIM = "elasticmoe_sim.entry:main"
NUM_EXPERTS = 16
SLOTS = 8
MAX_SIZE = 4
SIM_ENVIRON = {
    "ELASTICMOE_NUM_EXPERTS": str(NUM_EXPERTS),
    "ELASTICMOE_ENGINE_VERSION": "0.33.0",
    "SIM_BOOT_S": "0.1",
    "SIM_PREPARE_S": "0.1",
    "SIM_COMMIT_S": "0.3",
}


class Launcher:
    """One launcher; use as a context manager. python: the interpreter that has the engine.

    command_file: its command comes in a file, as revision "one".
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        command: Iterable[str] = ("vllm", "serve", "sim"),
        options: Iterable[str] = ("--engine", SIM),
        python: str = sys.executable,
        limit_s: float = 15,
        command_file: bool = False,
        **environ: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir, self.log, self.port = folder / "run", folder / "log", free_port()
        self.limit_s = limit_s
        own = ["--run-dir", str(self.run_dir), "--probe-port", "0", "--probe-host", "127.0.0.1"]
        serving = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._argv = [python, "-m", "elasticmoe_engine.launcher", *own, *options]
        words = [*command, *serving, *flags]
        self.command_file = folder / "command.json"
        if command_file:
            self.command_file.write_text(json.dumps({"revision": "one", "command": words}))
            self._argv += ["--command-file", str(self.command_file)]
        else:
            self._argv += ["--", *words]
        self._environ = {**os.environ, **SIM_ENVIRON, **environ}
        self.seen: set[int] = set()
        """All processes that engines had when this launcher was asked for its state."""
        self.begin()

    def begin(self) -> None:
        """Start the launcher's process (again)."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._argv, env=self._environ, stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process.kill()
        self.process.wait()

    # --- launcher.sock --------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return call_unix(self.run_dir / "launcher.sock", method, path, body, timeout=5)

    def state(self) -> Any:
        """`GET /state`, None while the launcher does not answer."""
        try:
            status, state = self.call("GET", "/state")
        except OSError:
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            return None
        assert status == 200, state
        self.seen.update(state["engine"]["pids"])
        if self.forkserver:
            self.seen |= descendants(self.forkserver)
        return state

    @property
    def forkserver(self) -> int:
        """The warm process, 0 while there is none."""
        try:
            return int(json.loads((self.run_dir / "warm.json").read_text())["pid"])
        except OSError:
            return 0

    def until(self, phase: str) -> dict[str, Any]:
        """Wait for a phase of the engine; returns its state."""

        def settled() -> Any:
            state = self.state()
            return state and state["engine"]["phase"] in (phase, "exited") and state["engine"]

        engine: dict[str, Any] = until(settled, self.limit_s)
        assert engine["phase"] == phase, (engine, self.log.read_text(errors="replace")[-3000:])
        return engine

    def until_warm(self) -> Any:
        return until(lambda: (s := self.state()) and (s["warm"] or s["mode"] == "cold") and s, 180)

    def start(self, spec: dict[str, Any]) -> tuple[int, Any]:
        return self.call("PUT", "/engine", spec)

    def stop(self, launch: str, grace: float = 0) -> tuple[int, Any]:
        return self.call("DELETE", f"/engine?launch={launch}&grace={grace}")

    def process_of(self, name: str) -> int:
        """The engine's process with this name: APIServer or EngineCore."""
        engine = self.until("running")
        if name == "APIServer":
            return int(engine["pid"])
        names: dict[int, str] = {
            pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in engine["pids"]
        }
        names = {pid: name + Path(f"/proc/{pid}/comm").read_text() for pid, name in names.items()}
        [core] = [pid for pid, words in names.items() if "VLLM::EngineCor" in words]
        return core

    def gone(self) -> bool:
        """Whether no process of any engine is left."""
        return all(is_gone(pid) for pid in self.seen)

    # --- gate.sock and users --------------------------------------------------------------------

    def gate(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return call_unix(self.run_dir / "gate.sock", method, path, body, timeout=5)

    def probe(self, path: str) -> httpx.Response:
        state = self.state()
        return httpx.get(f"http://127.0.0.1:{state['probe_port']}{path}")

    def outcome(self, operation: str) -> Any:
        """What became of an operation, once it has ended."""

        def ended() -> Any:
            _, answer = self.gate("GET", f"/operations/{operation}")
            return answer["state"] != "running" and answer

        return until(ended, self.limit_s)

    def status(self, path: str) -> int:
        """What a user's GET is answered with."""
        return httpx.get(self.url + path, timeout=self.limit_s).status_code

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class LauncherGroup:
    """Launchers of one group on this host. The test is sidecar and coordinator.

    In order: all launchers warm; one LaunchSpec each, with the same generation's address and port;
    all `running`. To grow: launch the joiners, then the same operation to every old gate at once.
    """

    def __init__(
        self, folder: Path, count: int, *flags: str, slots: int = SLOTS, **more: Any
    ) -> None:
        self._folder, self._flags, self._slots, self._more = folder, flags, slots, more
        self.launchers = [self._launcher(n) for n in range(count)]
        self.rpc_port = free_port()

    def _launcher(self, number: int) -> Launcher:
        return Launcher(self._folder / f"rank{number}", *self._flags, **self._more)

    def __enter__(self) -> LauncherGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for launcher in self.launchers:
            launcher.process.terminate()
        for launcher in self.launchers:
            launcher.__exit__()

    def __getitem__(self, rank: int) -> Launcher:
        return self.launchers[rank]

    def spec(self, rank: int, size: int, *, joiner: bool = False) -> dict[str, Any]:
        return {
            "launch": f"rank{rank}-{uuid4().hex[:8]}",
            "rank": rank,
            "size": size,
            "joiner": joiner,
            "master_address": "127.0.0.1",
            "rpc_port": self.rpc_port,
            "redundant_experts": self._slots * size - NUM_EXPERTS,
            "max_size": MAX_SIZE,
        }

    def start(self, size: int) -> float:
        """A new generation with ranks 0 to size - 1; returns the seconds from order to service."""
        for launcher in self.launchers[:size]:
            launcher.until_warm()
        self.rpc_port = free_port()
        began = time.monotonic()
        for rank in range(size):
            status, answer = self[rank].start(self.spec(rank, size))
            assert status == 202, answer
        for rank in range(size):
            self[rank].until("running")
        return time.monotonic() - began

    def stop(self, grace: float = 0) -> float:
        """Stop all engines; returns the seconds until they are gone."""
        began = time.monotonic()
        for launcher in self.launchers:
            launch = launcher.state()["engine"]["launch"]
            if launch is not None:
                assert launcher.stop(launch, grace)[0] == 202
        for launcher in self.launchers:
            launcher.until("absent")
            assert launcher.gone()
        return time.monotonic() - began

    def resize(self, old: int, new: int) -> list[Any]:
        """Order one operation everywhere, joiners first; returns what became of it."""
        for rank in range(old, new):
            self[rank].until_warm()
            assert self[rank].start(self.spec(rank, new, joiner=True))[0] == 202
        name = uuid4().hex
        for rank in range(old):
            body = {"target": new, "drain_timeout_s": 60}
            assert self[rank].gate("PUT", f"/operations/{name}", body)[0] == 200
        outcomes = [self[rank].outcome(name) for rank in range(old)]
        for rank in range(old, new):
            self[rank].until("running")
        return outcomes


def model_folder(folder: Path, **config: Any) -> Path:
    """A model of which there is only the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
