"""First module of the forkserver: what every engine process is forked from.

A forkserver is a plain multiprocessing one with the engine's modules imported. This module ties it
to the launcher's life, gives each child the environment of its launch, and has the children start
their own multiprocessing children from the same forkserver instead of a cold one.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import sys
import time
from pathlib import Path
from typing import Any

from elasticmoe_engine.processes import die_with_parent

LAUNCHER = "ELASTICMOE_LAUNCHER_PID"
MODULES = "ELASTICMOE_PRELOAD"
MODEL_FOLDER = "ELASTICMOE_MODEL_FOLDER"
RESULT_FILE = "warm.json"
"""In the run folder: {"pid", "ok", "seconds", "error", "threads", "problems"}."""
ENVIRONMENT_FILE = "environment.json"
"""In the run folder, mode 0600: what the present launch changes in the environment."""


def write_private(path: Path, value: Any) -> None:
    """Write JSON that only this user can read, at once or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(value, file)
    new.replace(path)


class Forkserver:
    """This process, as the parent of engine processes."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._pid = self._forking = os.getpid()

    def run(self, launcher: int, modules: list[str]) -> None:
        """Tie, prepare, import, and say in the result file how it went."""
        die_with_parent(launcher)
        share_forkserver()
        began = time.monotonic()
        error = ""
        for name in modules:
            try:
                importlib.import_module(name)
            except BaseException as failure:  # whatever it is, the launcher has to hear of it
                error = f"{name}: {type(failure).__name__}: {failure}"
                break
        error = error or _initialised_device()
        os.register_at_fork(after_in_child=self._in_child)
        # What is never collected is never written to: the children share it.
        gc.collect()
        gc.freeze()
        problems = [text for name in modules for text in _problems(name)]
        result = {
            "pid": self._pid,
            "ok": not error,
            "seconds": round(time.monotonic() - began, 3),
            "error": error,
            "threads": len(os.listdir("/proc/self/task")),
            "problems": problems,
        }
        write_private(self._run_dir / RESULT_FILE, result)

    def _in_child(self) -> None:
        parent, self._forking = self._forking, os.getpid()
        if parent != self._pid:
            return  # a child of a child: its parent may be a thread that ends soon
        die_with_parent(parent)
        try:
            changes = json.loads((self._run_dir / ENVIRONMENT_FILE).read_text())
        except (OSError, ValueError) as error:
            print(f"elasticmoe: no environment for this launch: {error}", file=sys.stderr)
            os._exit(1)
        for name, value in changes.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def share_forkserver() -> None:
    """Have a child of the forkserver use it for its own children.

    CPython's child has the server's address and its end of the "alive" pipe, but not its process
    id, without which `ensure_running` would start another one.
    """
    module = multiprocessing.forkserver
    server: Any = module._forkserver
    start_one = server.ensure_running

    def ensure_running() -> None:
        known = server._forkserver_address and server._forkserver_alive_fd is not None
        if known and server._forkserver_pid is None:
            multiprocessing.resource_tracker.ensure_running()
        else:
            start_one()

    server.ensure_running = module.ensure_running = ensure_running


def _initialised_device() -> str:
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and cuda.is_initialized():
        return "an import initialised CUDA, which no forked process could use"
    return ""


def _problems(module: str) -> list[str]:
    return list(getattr(sys.modules.get(module), "problems", ()))


if os.environ.get(LAUNCHER) == str(os.getppid()):
    Forkserver(Path(os.environ["ELASTICMOE_RUN_DIR"])).run(
        int(os.environ[LAUNCHER]), os.environ[MODULES].split(",")
    )
