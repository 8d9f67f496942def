"""What a sidecar is told when it starts."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Policy = Literal["declared", "follow"]

LAUNCHER_SOCKET = "launcher.sock"
GATE_SOCKET = "gate.sock"
SIDECAR_SOCKET = "sidecar.sock"
JOURNAL_FILE = "journal.msgpack"
INCARNATION_FILE = "incarnation"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `elasticmoe sidecar`.

    coordinator: ZeroMQ address (`tcp://host:port`). keys_dir: folder of this instance's keys.
    run_dir: the instance's run folder, shared with its launcher. address: where the other ranks
    reach the engine; host_ip: the engine's VLLM_HOST_IP, the address when empty. rpc_port: where
    rank 0 listens for the group. incarnation: the pod's UID; empty: made once, kept in the run
    folder. stop_grace_s: seconds from SIGTERM to SIGKILL of an engine that is stopped in order.
    leave_grace_s: longest wait for the coordinator's release. http_port: 0 lets the kernel choose.
    """

    deployment: str
    instance: str
    coordinator: str
    run_dir: Path
    keys_dir: Path
    address: str
    rpc_port: int
    host_ip: str = ""
    ordinal: int | None = None
    incarnation: str = ""
    policy: Policy = "declared"
    heartbeat_s: float = 0.5
    stop_grace_s: int = 10
    leave_grace_s: float = 600.0
    http_host: str = "127.0.0.1"
    http_port: int = 0

    @property
    def launcher_socket(self) -> Path:
        """Where the launcher answers."""
        return self.run_dir / LAUNCHER_SOCKET

    @property
    def gate_socket(self) -> Path:
        """Where the gate inside the API server answers."""
        return self.run_dir / GATE_SOCKET

    @property
    def own_socket(self) -> Path:
        """Where this sidecar answers those who share its run folder."""
        return self.run_dir / SIDECAR_SOCKET

    @property
    def journal_file(self) -> Path:
        """Where the newest goal is kept."""
        return self.run_dir / JOURNAL_FILE


def incarnation_of(settings: Settings) -> str:
    """The name of this pod or process tree: as told, or made once and kept in the run folder.

    Raises OSError when the run folder cannot be written.
    """
    if settings.incarnation:
        return settings.incarnation
    path = settings.run_dir / INCARNATION_FILE
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    made = uuid.uuid4().hex
    path.write_text(made + "\n")
    return made
