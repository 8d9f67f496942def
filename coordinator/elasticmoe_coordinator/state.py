"""The coordinator's own journal: one file, so that it knows its group also before anybody answers.

It may be lost: then the sidecars' journals are all that there is, and a coordinator that none of
the group's sidecars answers (all frozen, say) takes the group for a new one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
from elasticmoe_protocol.messages import Record

from elasticmoe_coordinator.core.learning import Memory

logger = logging.getLogger(__name__)


class _Contents(msgspec.Struct, frozen=True, kw_only=True):
    deployment: str
    term: int
    record: Record


class StateFile:
    """`path` None: nothing is kept."""

    def __init__(self, path: Path | None, deployment: str) -> None:
        self._path, self._deployment = path, deployment
        self._kept: Memory | None = None

    def load(self) -> Memory | None:
        """What was kept; None for nothing, and (with a line in the log) for what is no use."""
        if self._path is None or not self._path.exists():
            return None
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_Contents)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            logger.error("%s is not used, the sidecars are asked: %s", self._path, error)
            return None
        if found.deployment != self._deployment:
            logger.error("%s is not used: it belongs to %s", self._path, found.deployment)
            return None
        return Memory(found.term, found.record)

    def keep(self, memory: Memory | None) -> None:
        """Write it down when it is new. Raises OSError."""
        if self._path is None or memory is None or memory == self._kept:
            return
        contents = _Contents(deployment=self._deployment, term=memory.term, record=memory.record)
        fresh = self._path.with_name(f".{self._path.name}.new")
        fresh.write_bytes(msgspec.json.encode(contents))
        os.replace(fresh, self._path)
        self._kept = memory
