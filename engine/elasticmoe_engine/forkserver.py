"""The warm forkserver as the launcher sees it. All calls come from the launcher's main thread.

The main thread, because the kernel ties the forkserver's life to the thread that started it.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import socket
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from elasticmoe_engine import child, warm


@dataclass(frozen=True)
class Warmth:
    """How the imports went; see `warm.RESULT_FILE`."""

    ok: bool
    seconds: float
    error: str


class Forkserver:
    """Starts processes from one that has the engine's modules imported."""

    def __init__(self, run_dir: Path, modules: list[str]) -> None:
        self._result = run_dir / warm.RESULT_FILE
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([warm.__name__])
        package = str(Path(__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["ELASTICMOE_RUN_DIR"] = str(run_dir)
        os.environ[warm.LAUNCHER] = str(os.getpid())
        os.environ[warm.MODULES] = ",".join(modules)

    def start(self) -> None:
        """Begin the imports; a forkserver that runs is left alone. Raises OSError."""
        self._result.unlink(missing_ok=True)
        multiprocessing.forkserver.ensure_running()

    @property
    def pid(self) -> int | None:
        """The forkserver's process, alive or not."""
        server: Any = multiprocessing.forkserver._forkserver
        return server._forkserver_pid  # type: ignore[no-any-return]

    @property
    def tracker_pid(self) -> int | None:
        """The helper that multiprocessing starts beside it."""
        tracker: Any = multiprocessing.resource_tracker._resource_tracker
        return getattr(tracker, "_pid", None)

    def warmth(self) -> Warmth | None:
        """How the imports went, None while they run."""
        try:
            found = json.loads(self._result.read_text())
        except (OSError, ValueError):
            return None
        if found.get("pid") != self.pid:
            return None
        return Warmth(found["ok"], found["seconds"], found["error"])

    def fork(
        self,
        name: str,
        entry: str,
        sock: socket.socket,
        argv: list[str],
        spec: dict[str, Any],
        changes: dict[str, str | None],
    ) -> BaseProcess:
        """Start the engine's first process. Raises OSError or EOFError without a forkserver."""
        process = self._context.Process(
            target=child.run, name=name, args=(entry, sock, argv, spec, changes)
        )
        process.start()
        return process
