"""kubectl and helm as subprocesses: what the demo does, anybody can type."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from rich.console import Console

from elasticmoe_cli.errors import CommandFailed

LINE = 1 << 20
"""Longest line of output that is read: a whole status."""


class Kubectl:
    """Runs commands against one cluster and one namespace, each shown first.

    context: of the kubeconfig; empty for the current one.
    """

    def __init__(self, console: Console, namespace: str, context: str = "") -> None:
        self._console = console
        self._namespace, self._context = namespace, context

    def words(self, *arguments: str) -> list[str]:
        """A kubectl command in the namespace."""
        context = ["--context", self._context] if self._context else []
        return ["kubectl", *context, "--namespace", self._namespace, *arguments]

    async def __call__(
        self, *arguments: str, stdin: str | None = None, source: str = "", quiet: bool = False
    ) -> str:
        """Run kubectl; its output. source: file that is fed to it. Raises CommandFailed."""
        return await self.run(self.words(*arguments), stdin=stdin, source=source, quiet=quiet)

    async def helm(self, *arguments: str) -> str:
        """Run helm. Raises CommandFailed."""
        context = ["--kube-context", self._context] if self._context else []
        return await self.run(["helm", *context, *arguments])

    async def run(
        self,
        words: Sequence[str],
        *,
        stdin: str | None = None,
        source: str = "",
        quiet: bool = False,
    ) -> str:
        """Run any command. Raises CommandFailed with what it said."""
        if not quiet:
            self.show(words, source)
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except FileNotFoundError:
            raise CommandFailed(f"{words[0]} is not installed: it is needed here", 2) from None
        try:
            out, err = await process.communicate(None if stdin is None else stdin.encode())
        except asyncio.CancelledError:
            _end(process)
            raise
        if process.returncode:
            said = err.decode(errors="replace").strip().splitlines()[-3:]
            raise CommandFailed(f"{shlex.join(words[:6])} …: {' '.join(said)}")
        return out.decode()

    @asynccontextmanager
    async def lines(self, *arguments: str) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of a command that goes on and on; ended with the block."""
        process = await asyncio.create_subprocess_exec(
            *self.words(*arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LINE,
        )
        assert process.stdout is not None
        stdout = process.stdout

        async def read() -> AsyncIterator[str]:
            while line := await stdout.readline():
                yield line.decode(errors="replace").strip()

        try:
            yield read()
        finally:
            _end(process)
            await process.wait()

    def show(self, words: Sequence[str], source: str = "") -> None:
        """Print a command, to be typed again."""
        text = shlex.join(words) + (f" < {source}" if source else "")
        self._console.print(f"$ {text}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _end(process: asyncio.subprocess.Process) -> None:
    """Not by `terminate`: it may reap the process, which asyncio then misses."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
