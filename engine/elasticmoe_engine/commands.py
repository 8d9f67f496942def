"""Which command is in force, and which one lies in the file and waits for the next start.

A file's command is taken over while there is no engine, so an engine and what is told of it always
belong to one command. What can't be taken over is told, and what was in force stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from elasticmoe_engine.command import Command, CommandError, parse

REVISION_LIMIT = 128
Seen = tuple[int, int, int, int]
"""Device, inode, time of change (of content or mode) and size: if one differs, it is read again."""


class Adopted(NamedTuple):
    """A command with its name. revision: "" for a command that came without a file."""

    command: Command
    revision: str = ""


class Commands:
    """The command of a launcher. `look` and `adopt` belong to one thread, the rest to all.

    path: the file, None where the command can't change. objection: (command in force, another one)
    -> why the other one can't take its place without a new launcher, "" when it can.
    """

    def __init__(
        self,
        adopted: Adopted,
        path: Path | None = None,
        objection: Callable[[Command, Command], str] = lambda present, other: "",
    ) -> None:
        self.adopted = adopted
        self.next_revision = ""
        """Of the command in the file as long as it is not in force."""
        self.problem = ""
        """Why the file's command can't be taken over, one line."""
        self._path, self._objection = path, objection
        self._next: Adopted | None = None
        self._seen: Seen | None = None

    @classmethod
    def of_file(cls, path: Path, objection: Callable[[Command, Command], str]) -> Commands:
        """With the file's command in force. Raises CommandError with the file's name."""
        try:
            return cls(_read(path), path, objection)
        except CommandError as error:
            raise CommandError(f"--command-file {path}: {error}") from None

    @property
    def command(self) -> Command:
        """The command in force."""
        return self.adopted.command

    def as_json(self) -> dict[str, str]:
        """As in the facts of `GET /state`."""
        return {
            "command": self.adopted.revision,
            "next_command": self.next_revision,
            "next_problem": self.problem,
        }

    def look(self) -> str:
        """Read the file if it changed; returns a line when there is something new to say.

        By its path, never by an open file: a ConfigMap's folder is another one after each change.
        """
        if self._path is None:
            return ""
        seen = _seen(self._path)
        if seen is not None and seen == self._seen:
            return ""
        before = (self.next_revision, self.problem)
        self._seen = seen
        found, revision, problem = self._judge(self._path)
        self._next, self.next_revision, self.problem = found, revision, problem
        if (revision, problem) == before:
            return ""
        if problem:
            return f"WARNING: the command in {self._path} can't be taken over: {problem}"
        if revision:
            return f"command {revision} lies in {self._path}: the next engine starts with it"
        return ""

    def adopt(self) -> bool:
        """Put the file's command in force, if there is one that can be. Only without an engine."""
        if self._next is None:
            return False
        self.adopted, self._next, self.next_revision = self._next, None, ""
        return True

    def _judge(self, path: Path) -> tuple[Adopted | None, str, str]:
        """What may be taken over, the revision that is not in force, what is wrong with it."""
        revision = ""
        try:
            content = _content(path)
            revision = content["revision"]
            found = Adopted(parse(content["command"]), revision)
            if found == self.adopted:
                return None, "", ""
            objection = self._objection(self.command, found.command)
        except (CommandError, RecursionError) as error:  # of JSON within a flag, too
            objection = " ".join(str(error).split())
        return (None, revision, objection) if objection else (found, revision, "")


def _seen(path: Path) -> Seen | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return (about.st_dev, about.st_ino, about.st_ctime_ns, about.st_size)


def _read(path: Path) -> Adopted:
    content = _content(path)
    return Adopted(parse(content["command"]), content["revision"])


def _content(path: Path) -> Any:
    """The file's object, with a revision and a list of words. Raises CommandError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CommandError(f"it can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"it is no JSON ({error})") from None
    known = content if isinstance(content, dict) else {}
    revision, words = known.get("revision"), known.get("command")
    if not _is_text(revision) or not 0 < len(revision or "") <= REVISION_LIMIT:
        raise CommandError(f'"revision": give a text of 1 to {REVISION_LIMIT} characters')
    if not isinstance(words, list) or not all(_is_text(word) for word in words):
        raise CommandError('"command": give a list of words: ["vllm", "serve", MODEL, …]')
    return known


def _is_text(value: Any) -> bool:
    """Whether it can be told in JSON, and be an argument of a process."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
