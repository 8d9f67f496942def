"""The engine container's preStop hook: asks the sidecar to leave the group, and waits.

python3 -m elasticmoe_engine.leave --run-dir DIR --timeout SECONDS

A native sidecar is told to end only after the engine's container has ended. By then it is too late
to drain, so this asks before. It ends with status 0 whatever happens: a hook that fails changes
nothing but makes noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elasticmoe_engine.local_http import call_unix

AGAIN_S = 0.5
NOBODY_S = 10.0
"""A sidecar's container may take so long to start again. Who has no engine waits no longer."""


def leave(run_dir: Path, timeout_s: float) -> str:
    """Ask until the sidecar answers or the time is over; returns what happened, in one line."""
    began = seen = time.monotonic()
    trouble = ""
    while (left := began + timeout_s - time.monotonic()) > 0:
        try:
            status, answer = call_unix(run_dir / "sidecar.sock", "POST", "/leave", timeout=left)
            return _outcome(status, answer, time.monotonic() - began)
        except (FileNotFoundError, ConnectionRefusedError, PermissionError) as error:
            trouble = f": no sidecar on {run_dir / 'sidecar.sock'} ({error.strerror})"
        except (OSError, ValueError):  # it was there and went away, or does not answer
            seen, trouble = time.monotonic(), ""
        if time.monotonic() - seen > NOBODY_S and _no_engine(run_dir):
            return f"there is no engine and nothing to drain{trouble}"
        time.sleep(AGAIN_S)
    return f"not released in {timeout_s:g} s{trouble}"


def _outcome(status: int, answer: Any, took_s: float) -> str:
    if status != 200 or not isinstance(answer, dict):
        return f"not released: the sidecar answered {status} {answer}"
    if answer.get("released"):
        return f"released after {took_s:.1f} s"
    return f"not released in {took_s:.1f} s: the sidecar waits no longer"


def _no_engine(run_dir: Path) -> bool:
    """By the launcher's own word."""
    try:
        _, state = call_unix(run_dir / "launcher.sock", "GET", "/state")
        return bool(state["engine"]["phase"] == "absent")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what can't be understood ends with 2."""
    parser = argparse.ArgumentParser(
        prog="elasticmoe_engine.leave",
        description="Has this instance leave its group, and waits until it may end.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, help="folder of sidecar.sock and launcher.sock")
    add("--timeout", type=float, required=True, metavar="SECONDS", help="longest wait")
    args = parser.parse_args(argv)
    print(f"elasticmoe leave: {leave(args.run_dir, args.timeout)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
