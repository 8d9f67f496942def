"""One group: what is known of its instances, what it should be, and the operation that brings it there."""

from __future__ import annotations

from collections.abc import Callable

from elasticmoe_protocol.messages import Hello, Refused, Report

from elasticmoe_coordinator.core.config import GroupConfig
from elasticmoe_coordinator.core.outbox import Outbox, ProbeAnswer, TargetRequest
from elasticmoe_coordinator.core.status import GroupStatus, OperationStatus


class Group:
    """Everything in, everything out; no clock, no socket, no chance of its own.

    Times (`now`) are Unix seconds. `new_id` makes ids for operations and launches.
    """

    def __init__(
        self, config: GroupConfig, *, term: int, now: float, new_id: Callable[[], str]
    ) -> None:
        raise NotImplementedError

    def hello(self, message: Hello, now: float) -> None: ...
    def report(self, message: Report, now: float) -> None: ...
    def refused(self, instance: str, message: Refused, now: float) -> None: ...
    def disconnected(self, instance: str, now: float) -> None: ...
    def probed(self, answer: ProbeAnswer, now: float) -> None: ...
    def set_target(self, request: TargetRequest, now: float) -> tuple[OperationStatus | None, bool]:
        """(the operation or None if there is nothing to do, True if this call began it). Raises Rejected."""
        raise NotImplementedError

    def restart(self, request: TargetRequest, now: float) -> tuple[OperationStatus, bool]:
        raise NotImplementedError

    def operation(self, operation_id: str, now: float) -> OperationStatus | None:
        raise NotImplementedError

    def tick(self, now: float) -> Outbox:
        raise NotImplementedError

    def status(self, now: float) -> GroupStatus:
        raise NotImplementedError
