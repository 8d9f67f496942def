"""What the group wants done outside itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from elasticmoe_protocol.messages import EngineReport, Goal


@dataclass(frozen=True)
class Probe:
    """Ask a silent instance's launcher directly (`GET http://address:port/state`)."""

    instance: str
    address: str
    port: int


@dataclass(frozen=True)
class ProbeAnswer:
    """What came of a Probe. engine: None when nothing answered."""

    instance: str
    engine: EngineReport | None


Level = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Note:
    """A line for the log. about: the operation or instance concerned."""

    level: Level
    text: str
    about: str = ""


@dataclass
class Outbox:
    """Everything to send after one turn."""

    goals: list[Goal] = field(default_factory=list)
    introduce: list[str] = field(default_factory=list)
    """Instances that should say Hello."""
    probes: list[Probe] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


@dataclass(frozen=True)
class TargetRequest:
    """Somebody wants this size. operation_id: theirs; said again it is the same operation."""

    operation_id: str
    size: int
    drain_timeout: int | None = None


class Rejected(Exception):
    """A request that the group does not take.

    code: "invalid" (422), "conflict" (409, `operation` is the running one), "not_ready" (409).
    reason: one line that says what to do.
    """

    def __init__(
        self, code: Literal["invalid", "conflict", "not_ready"], reason: str, operation: str = ""
    ) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.operation = operation
