"""Whether the coordinator is known to want the journal's goal still.

A journal may be older than what the group does now: the group may have gone on without an instance
whose sidecar was dead or frozen. So after a start of this process, and after a pause of it, what
has to be done together with others waits for the coordinator's word.
"""

from __future__ import annotations

import time
from collections.abc import Callable

STOOD_STILL_S = 2.0
"""Longer than any pause of a healthy process; the coordinator suspects it after 1.5 s."""


class Confirmation:
    """Ask `holds` at least twice in STOOD_STILL_S, so that only a real pause ends it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holds, self._turned = False, clock()

    def confirm(self) -> None:
        """The coordinator has just sent the goal that the journal has."""
        self._holds, self._turned = True, self._clock()

    def holds(self) -> bool:
        """Whether it was confirmed and this process never stood still since."""
        now = self._clock()
        if now - self._turned > STOOD_STILL_S:
            self._holds = False
        self._turned = now
        return self._holds
