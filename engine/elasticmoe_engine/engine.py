"""One engine while it runs: its first process, warm or cold, and the processes to watch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Protocol

from elasticmoe_engine.processes import children, name_of

CODE_WAIT_S = 0.1
"""How long an exit status may take from the forkserver, which reaps, to here."""


@dataclass(frozen=True)
class Exit:
    """How a process ended. code: exit status, negative for a signal, None when not known."""

    process: str
    code: int | None
    reason: str


class First(Protocol):
    """The engine's first process: the API server."""

    pid: int

    def code(self) -> int | None:
        """Its exit status once it has ended, None when not known."""

    def beside(self) -> list[int]:
        """The engine's other processes that last as long as it does."""


class WarmFirst:
    """Forked from the forkserver, as are all that the engine starts by multiprocessing."""

    def __init__(self, process: BaseProcess, forkserver: int) -> None:
        assert process.pid is not None
        self._process, self._forkserver = process, forkserver
        self.pid = process.pid

    def code(self) -> int | None:
        """The forkserver's word; 255 is what multiprocessing says without one."""
        self._process.join(CODE_WAIT_S)
        code = self._process.exitcode
        return None if code == 255 else code

    def beside(self) -> list[int]:
        """The forkserver's other children, and vLLM's own that were started otherwise."""
        return [pid for pid in children(self._forkserver) if pid != self.pid] + _titled(self.pid)


class ColdFirst:
    """A plain `vllm serve` in a session of its own."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        tied = [sys.executable, "-m", "elasticmoe_engine.tied", str(os.getpid())]
        self._process = subprocess.Popen([*tied, *command], env=environ, start_new_session=True)
        self.pid = self._process.pid

    def code(self) -> int | None:
        """As the kernel says."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(CODE_WAIT_S)
        return None

    def beside(self) -> list[int]:
        """vLLM's own; what else it starts may come and go."""
        return _titled(self.pid)


def _titled(parent: int) -> list[int]:
    return [pid for pid in children(parent) if name_of(pid).startswith("VLLM::")]


class Watch:
    """Tells of the end of processes as it happens, by pidfd."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fds: dict[int, tuple[int, int]] = {}
        self._names: dict[int, str] = {}

    def add(self, pids: Iterable[int]) -> None:
        """Watch these too, and learn their present names."""
        for pid in pids:
            if pid not in self._names:
                try:
                    fd = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
                self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
                self._fds[fd] = (fd, pid)
            self._names[pid] = name_of(pid) or self._names.get(pid, "process")

    def add_fd(self, fd: int) -> None:
        """End a wait also when this can be read."""
        self._epoll.register(fd, select.EPOLLIN)

    def wait(self, seconds: float) -> list[int]:
        """Processes that have ended, at the latest after so many seconds."""
        ended = []
        for fd, _ in self._epoll.poll(seconds):
            if fd in self._fds:
                ended.append(self._fds.pop(fd)[1])
                os.close(fd)
        return ended

    def name(self, pid: int) -> str:
        """The last name that a watched process had."""
        return self._names.get(pid, "process")

    @property
    def alive(self) -> list[int]:
        """The watched processes that have not ended."""
        return sorted(pid for _, pid in self._fds.values())

    def forget(self) -> None:
        """Watch nothing any more."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._names.clear()


def described(process: str, code: int | None) -> Exit:
    """An exit in words."""
    if code is None:
        return Exit(process, None, f"{process} ended: see the engine's output before it")
    if code < 0:
        with contextlib.suppress(ValueError):
            return Exit(process, code, f"{process} was killed by {signal.Signals(-code).name}")
    return Exit(process, code, f"{process} ended with status {code}: see its output before it")
