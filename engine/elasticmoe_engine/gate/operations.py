"""Resizes: each operation id runs once in this process, and its outcome is kept."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from elasticmoe_engine.gate.asgi import message_of

SCALE_PATH = "/scale_elastic_ep"

Post = Callable[[str, Any], Awaitable[tuple[int, bytes]]]


@dataclass(frozen=True)
class Operation:
    """One resize. status: the engine's HTTP status, None while it runs."""

    operation: str
    target: int
    state: Literal["running", "succeeded", "failed"] = "running"
    status: int | None = None
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """As it is answered."""
        return asdict(self)


class Operations:
    """All resizes of this engine's life. `claim` and `get` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: dict[str, Operation] = {}
        self.latest: Operation | None = None

    def get(self, name: str) -> Operation | None:
        """The operation as it stands."""
        return self._all.get(name)

    def claim(self, name: str, target: int) -> tuple[Operation, bool]:
        """The operation that answers for `name`, and whether the caller has to run it.

        Another one than `name` comes back when that one still runs.
        """
        with self._lock:
            known = self._all.get(name)
            if known is None and self.latest is not None and self.latest.state == "running":
                known = self.latest
            if known is not None:
                return known, False
            return self._keep(Operation(name, target)), True

    def release(self, operation: Operation) -> None:
        """Forget an operation that was claimed and not begun."""
        with self._lock:
            del self._all[operation.operation]
            self.latest = next(reversed(self._all.values()), None)

    async def run(self, operation: Operation, drain_timeout_s: int, post: Post) -> None:
        """Have the engine do it and keep what becomes of it."""
        body = {"new_data_parallel_size": operation.target, "drain_timeout": drain_timeout_s}
        status, error = 500, "the engine was stopped"
        try:
            status, answer = await post(SCALE_PATH, body)
            error = "" if status == 200 else message_of(answer) or f"the engine answered {status}"
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        finally:
            state: Literal["succeeded", "failed"] = "succeeded" if status == 200 else "failed"
            with self._lock:
                self._keep(replace(operation, state=state, status=status, error=error))

    def _keep(self, operation: Operation) -> Operation:
        self._all[operation.operation] = operation
        self.latest = operation
        return operation
