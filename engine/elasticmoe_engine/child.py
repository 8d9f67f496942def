"""What runs in the engine's first process, after the fork."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from elasticmoe_engine import warm
from elasticmoe_engine.launch import applied


def run(
    entry: str,
    sock: socket.socket,
    argv: list[str],
    spec: dict[str, Any],
    changes: dict[str, str | None],
) -> None:
    """Call `entry` (MODULE:FUNCTION) as (sock, argv, spec); its result is the exit status."""
    warm.set_environment(applied(os.environ, changes))
    # The child of a forkserver has a start method already, and an engine that sets one would fail.
    multiprocessing.set_start_method(None, force=True)
    if "--numa-bind" in argv:
        # vLLM binds by starting its engine core with another program: that start is a cold one.
        warm.spawn_from_forkserver(False)
    module, _, name = entry.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    status = function(sock, argv, spec)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: multiprocessing would wait for threads and children, and those are the launcher's.
    os._exit(status or 0)
