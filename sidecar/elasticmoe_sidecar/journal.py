"""The newest goal on disk, written before it is obeyed.

It also says for which launcher (its `boot`) an engine was ordered last. A launch id stands for one
life of one engine: when the launcher itself was replaced, the engine is gone and its launch is not
started a second time.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import msgspec
from elasticmoe_protocol.messages import Goal

logger = logging.getLogger(__name__)


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The last engine ordered: its launch id and the boot of the launcher that was asked."""

    launch: str
    boot: str


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """All that outlives the sidecar's process. term: the highest that it has seen, -1 for none."""

    term: int = -1
    goal: Goal | None = None
    started: Started | None = None


def stale(goal: Goal, present: Goal | None) -> str:
    """Why `goal` must not replace the present one; empty when it may, and for the same again."""
    if present is None or goal.term > present.term:
        return ""
    if goal.term < present.term:
        return f"term {goal.term} is over, term {present.term} has begun"
    if goal.leader != present.leader:
        return f"term {goal.term} is led by another coordinator"
    if goal.seq < present.seq:
        return f"goal {goal.seq} of term {goal.term} is older than goal {present.seq}"
    return ""


class Journal:
    """Contents on disk and in memory, always the same.

    Raises OSError from each method that writes: what is not on disk must not be obeyed.
    """

    def __init__(self, path: Path, deployment: str, instance: str) -> None:
        self._path = path
        self._deployment, self._instance = deployment, instance
        self._contents = self._load()

    @property
    def goal(self) -> Goal | None:
        """The newest goal accepted."""
        return self._contents.goal

    @property
    def term(self) -> int:
        """The highest term seen, -1 for none."""
        return self._contents.term

    @property
    def started(self) -> Started | None:
        """The last engine ordered."""
        return self._contents.started

    def objection(self, goal: Goal) -> str:
        """Why `goal` is not accepted; empty when it is, and when it is the present one again."""
        if (goal.deployment, goal.instance) != (self._deployment, self._instance):
            return (
                f"the goal is for {goal.deployment}/{goal.instance}, "
                f"this is {self._deployment}/{self._instance}"
            )
        return stale(goal, self.goal)

    def accept(self, goal: Goal) -> None:
        """Keep a goal to which there is no objection."""
        self._store(msgspec.structs.replace(self._contents, term=goal.term, goal=goal))

    def start(self, launch: str, boot: str) -> None:
        """Note that the launcher with this boot is about to be asked to start `launch`."""
        started = Started(launch=launch, boot=boot)
        if started != self.started:
            self._store(msgspec.structs.replace(self._contents, started=started))

    def _store(self, contents: Contents) -> None:
        fresh = self._path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(msgspec.msgpack.encode(contents))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._contents = contents

    def _load(self) -> Contents:
        try:
            contents = msgspec.msgpack.decode(self._path.read_bytes(), type=Contents)
        except FileNotFoundError:
            return Contents()
        except msgspec.MsgspecError as error:
            return self._set_aside(f"cannot be read ({error})")
        goal = contents.goal
        if goal and (goal.deployment, goal.instance) != (self._deployment, self._instance):
            return self._set_aside(f"belongs to {goal.deployment}/{goal.instance}")
        return contents

    def _set_aside(self, why: str) -> Contents:
        aside = self._path.with_name(f"{self._path.name}.bad-{time.time_ns()}")
        os.replace(self._path, aside)
        logger.error(
            "the journal %s %s: kept as %s, going on with an empty one",
            self._path,
            why,
            aside.name,
        )
        return Contents()
