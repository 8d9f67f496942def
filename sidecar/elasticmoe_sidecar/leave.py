"""How an instance leaves: it says so and stays until the coordinator releases it.

In Kubernetes the engine container's preStop hook asks (`POST /leave`) and waits, because a native
sidecar gets its SIGTERM only after the other containers ended. Elsewhere SIGTERM itself asks, where
the group follows who is there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from elasticmoe_sidecar.settings import Policy


class Leave:
    """Whether this instance is leaving, and when its process may end."""

    def __init__(self, policy: Policy, grace_s: float, changed: Callable[[], None]) -> None:
        self._policy, self._grace_s, self._changed = policy, grace_s, changed
        self._deadline = 0.0
        self._may_end = False
        self._released = asyncio.Event()
        self._terminated, self._now = asyncio.Event(), asyncio.Event()
        self.asked = False

    def ask(self) -> None:
        """Begin to leave; the grace runs from the first time that this is asked."""
        if not self.asked:
            self.asked = True
            self._deadline = time.monotonic() + self._grace_s
            self.note(self._may_end)
            self._changed()

    def note(self, released: bool) -> None:
        """The newest goal says whether a leaving instance may end."""
        self._may_end = released
        if self.asked and released:
            self._released.set()

    def let_go(self) -> None:
        """Release this instance without the coordinator's word."""
        self._released.set()

    async def released(self) -> bool:
        """Wait for the release; False when the grace is over first."""
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                await self._released.wait()
        except TimeoutError:
            return False
        return True

    def terminate(self) -> None:
        """SIGTERM came; a second one ends the wait."""
        stay = self.asked or self._policy == "follow"
        if self._terminated.is_set() or not stay:
            self._now.set()
        else:
            self.ask()
        self._terminated.set()

    async def ended(self) -> None:
        """Wait until the process should end."""
        await self._terminated.wait()
        waits = [asyncio.create_task(self.released()), asyncio.create_task(self._now.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
