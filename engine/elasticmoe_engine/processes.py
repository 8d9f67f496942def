"""Processes as Linux shows them: parents, children, names, and who dies with whom."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends (prctl(2)). Raises OSError."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Ends at once when `parent` is gone already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def children(pid: int) -> list[int]:
    """Children of a process, started by any of its threads."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        texts = [Path(f"/proc/{pid}/task/{task}/children").read_text() for task in tasks]
    except FileNotFoundError:
        if not Path(f"/proc/{pid}").exists():
            return []
        return [child for child, parent in _parents().items() if parent == pid]
    except OSError:
        return []
    return [int(child) for text in texts for child in text.split()]


def descendants(pid: int) -> set[int]:
    """All processes beneath a process that have not ended, or wait to be reaped."""
    parents = _parents()
    found = {pid}
    grown = True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        grown = bool(more)
        found |= more
    return found - {pid}


def _parents() -> dict[int, int]:
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (fields := _stat(int(entry))):
            found[int(entry)] = int(fields[1])
    return found


def _stat(pid: int) -> list[str]:
    """State, parent and so on (proc(5)); [] when there is no such process."""
    try:
        # The name, in parentheses, may contain anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and only waits for its parent."""
    return _stat(pid)[:1] == ["Z"]


def name_of(pid: int) -> str:
    """The title that a process gave itself, else its program's name; "" when it is gone."""
    with contextlib.suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        if title.startswith("VLLM::"):
            return title.strip()
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def kill(pid: int, number: int) -> None:
    """Send a signal; a process that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def reap(pid: int) -> None:
    """Take note of a child's end, if it has ended."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
