"""First module of the forkserver: what every engine process is forked from.

A forkserver is a plain multiprocessing one with the engine's modules imported. This module ties it
to the launcher's life, and has everything that the engine starts by multiprocessing's `spawn` come
from the same forkserver, with the environment of its parent, as a spawned process has it.

`spawn`, because vLLM 0.33 takes no other word for a start that is not `fork` (and a forked engine
core would keep rank 0's handshake listener open), and its CPU platform insists on it.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elasticmoe_engine.processes import die_with_parent

LAUNCHER = "ELASTICMOE_LAUNCHER_PID"
MODULES = "ELASTICMOE_PRELOAD"
MODEL_FOLDER = "ELASTICMOE_MODEL_FOLDER"
RESULT_FILE = "warm.json"
"""In the run folder: {"pid", "ok", "seconds", "error", "threads", "problems"}."""
_ENVIRON = "elasticmoe_environ"


class Forkserver:
    """This process, as the parent of engine processes."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._pid = self._forking = os.getpid()

    def run(self, launcher: int, modules: list[str]) -> None:
        """Tie, prepare, import, and say in the result file how it went."""
        die_with_parent(launcher)
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
        share_forkserver()
        hand_down_environment()
        spawn_from_forkserver(True)
        # What is never collected is never written to: the children share it.
        gc.collect()
        gc.freeze()
        result = {
            "pid": self._pid,
            "ok": not error,
            "seconds": round(time.monotonic() - began, 3),
            "error": error,
            "threads": len(os.listdir("/proc/self/task")),
            "problems": [text for name in modules for text in _problems(name)],
        }
        new = self._run_dir / f".{RESULT_FILE}"
        new.write_text(json.dumps(result))
        new.replace(self._run_dir / RESULT_FILE)

    def _in_child(self) -> None:
        parent, self._forking = self._forking, os.getpid()
        if parent == self._pid:  # not a child of a child: its parent may be a thread that ends soon
            die_with_parent(parent)


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


def hand_down_environment() -> None:
    """Have a process that is started from a child of the forkserver get its parent's environment.

    It travels with what multiprocessing sends to prepare a new process.
    """
    module: Any = multiprocessing.spawn
    describe, prepare = module.get_preparation_data, module.prepare

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**describe(name), _ENVIRON: dict(os.environ)}

    def prepare_with_environment(data: dict[str, Any]) -> None:
        environ = data.pop(_ENVIRON, None)
        if environ is not None:
            set_environment(environ)
        prepare(data)

    module.get_preparation_data = get_preparation_data
    module.prepare = prepare_with_environment


def set_environment(environ: Mapping[str, str]) -> None:
    """Make this process's environment the given one."""
    threads = os.environ.get("OMP_NUM_THREADS")
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update({k: v for k, v in environ.items() if os.environ.get(k) != v})
    wanted, torch = os.environ.get("OMP_NUM_THREADS", ""), sys.modules.get("torch")
    if torch is not None and wanted != threads and wanted.isdecimal():
        torch.set_num_threads(int(wanted))  # it read the variable when it was imported


def spawn_from_forkserver(warm: bool) -> None:
    """Whether multiprocessing's `spawn` means the forkserver in this process and its children."""
    module: Any = multiprocessing.context
    contexts = module._concrete_contexts
    contexts["spawn"] = contexts["forkserver"] if warm else module.SpawnContext()


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
