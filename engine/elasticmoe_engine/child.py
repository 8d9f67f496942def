"""What runs in a forked engine process."""

from __future__ import annotations

import importlib
import multiprocessing
import socket
import sys
from collections.abc import Callable
from typing import Any


def run(entry: str, sock: socket.socket, argv: list[str], spec: dict[str, Any]) -> None:
    """Call `entry` (MODULE:FUNCTION) as (sock, argv, spec); its result is the exit status."""
    # The child of a forkserver has a start method already, and an engine that sets one would fail.
    multiprocessing.set_start_method(None, force=True)
    module, _, name = entry.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    sys.exit(function(sock, argv, spec))
