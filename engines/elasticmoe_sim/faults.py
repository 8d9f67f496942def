"""Misbehaviour on demand.

`SIM_FAULTS` sets it for a launch; `SIM_FAULTS_FILE` names a file that is read whenever its time
stamp changes, so that a test can switch faults while the engine runs. Words separated by blanks,
each for all ranks or, as `2:hang`, for one:

hang          the engine core stops making tokens, and with it the whole group; /health stays 200
hang_api      the API server's event loop stops for as long as the word stands in the file
crash_api     the API server kills itself with SIGKILL
crash_core    the engine core kills itself with SIGKILL
fail_prepare  the next prepare fails on this rank
fail_commit   the next commit fails on this rank
hang_joiner   a joiner stops half-way through the bootstrap: the old engines die after the limit
slow=F        tokens, prepare and commit take F times as long
refuse        every resize is refused, as after a failed prepare
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

NAMES = frozenset(
    [
        "hang",
        "hang_api",
        "crash_api",
        "crash_core",
        "fail_prepare",
        "fail_commit",
        "hang_joiner",
        "slow",
        "refuse",
    ]
)


def parse(text: str, rank: int) -> dict[str, str]:
    """Faults for `rank` out of `text`; raises ValueError for an unknown word."""
    found = {}
    for word in text.split():
        target, colon, fault = word.rpartition(":")
        name, _, value = fault.partition("=")
        if name not in NAMES:
            raise ValueError(f"unknown fault {name!r}; known are: {', '.join(sorted(NAMES))}")
        if not colon or int(target) == rank:
            found[name] = value
    return found


class Faults:
    """The faults that stand now for one rank."""

    def __init__(self, rank: int, environ: Mapping[str, str] = os.environ) -> None:
        self._rank = rank
        self._given = parse(environ.get("SIM_FAULTS", ""), rank)
        self._path = environ.get("SIM_FAULTS_FILE", "")
        self._stamp: tuple[int, int] = (0, 0)
        self._read: dict[str, str] = {}

    @property
    def watched(self) -> bool:
        """Whether faults may change while the engine runs."""
        return bool(self._path)

    def now(self) -> dict[str, str]:
        """Faults by name with their values."""
        if self._path:
            try:
                stat = os.stat(self._path)
                stamp = (stat.st_mtime_ns, stat.st_size)
                if stamp != self._stamp:
                    self._read = parse(Path(self._path).read_text(), self._rank)
                    self._stamp = stamp
            except FileNotFoundError:
                self._read, self._stamp = {}, (0, 0)
        return self._given | self._read

    def __contains__(self, name: str) -> bool:
        return name in self.now()

    @property
    def slowness(self) -> float:
        """Factor on every duration."""
        return float(self.now().get("slow") or 1.0)
