"""How a benchmark ends early: at its time limit, by SIGTERM, by Ctrl-C, always in the same way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from elasticmoe_cli.errors import CommandFailed


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """What runs here is interrupted as by Ctrl-C. Raises CommandFailed when the time is over."""
    late = False

    def alarm(*_: object) -> None:
        nonlocal late
        late = True
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:
        if late:
            raise CommandFailed(f"not done after {seconds:g} s: give more with --limit") from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
