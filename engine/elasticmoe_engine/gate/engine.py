"""What the gate reads of the engine in whose process it lives. All of it may be missing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any


def _no() -> bool:
    return False


class Engine:
    """The engine's process-local flags, its data-parallel place, its server and its metrics."""

    def __init__(self, state_module: str) -> None:
        self._state_module = state_module
        self.app: Any = None
        """Starlette's application, known from the first scope on."""
        self.scaling: Callable[[], bool] = _no
        """Whether the engine refuses requests because it commits a new layout."""
        self.retired: Callable[[], bool] = _no
        """Whether this rank is out of the layout for good."""
        self._bind()

    def _bind(self) -> None:
        # Bound once: a look-up per request would cost more than the call.
        try:
            module = importlib.import_module(self._state_module)
        except ImportError:
            return
        self.scaling = getattr(module, "get_scaling_elastic_ep", _no)
        self.retired = getattr(module, "get_elastic_ep_rank_retired", _no)

    @property
    def server(self) -> Any:
        """The uvicorn.Server, None while not known."""
        return getattr(getattr(self.app, "state", None), "server", None)

    @property
    def open_connections(self) -> int:
        """Connections that the server has accepted and not closed."""
        try:
            return len(self.server.server_state.connections)
        except AttributeError:
            return 0

    def place(self) -> tuple[int, int, str]:
        """DP size, DP rank, and the pause mode of a commit; 0, 0 and "" where not known."""
        try:
            client = self.app.state.engine_client
            parallel = client.vllm_config.parallel_config
            size, rank = int(parallel.data_parallel_size), int(parallel.data_parallel_rank)
        except (AttributeError, TypeError, ValueError):
            return 0, 0, ""
        try:
            return size, rank, str(client.engine_core._eep_commit_pause_mode())
        except Exception:  # a private method: whatever it does one day, the rest is still known
            return size, rank, ""

    def metrics(self) -> tuple[str, str]:
        """The process's Prometheus registry as text, and its content type. Raises ImportError."""
        client = importlib.import_module("prometheus_client")
        registry = client.REGISTRY
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry = client.CollectorRegistry()
            importlib.import_module("prometheus_client.multiprocess").MultiProcessCollector(
                registry
            )
        return client.generate_latest(registry).decode(), str(client.CONTENT_TYPE_LATEST)
