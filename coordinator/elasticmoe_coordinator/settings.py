"""What a coordinator's process is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elasticmoe_coordinator.core.config import GroupConfig


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """bind: where sidecars connect (tcp://HOST:PORT). Ports may be 0: any free one.

    term: the lowest term to use, from the operator's record. ready_file: written (JSON: zmq, http,
    pid) once all ports are open. state_file: what the group is, for the next coordinator.
    """

    group: GroupConfig
    keys_dir: Path
    bind: str = "tcp://127.0.0.1:7410"
    http_host: str = "127.0.0.1"
    http_port: int = 7411
    term: int = 1
    ready_file: Path | None = None
    state_file: Path | None = None
