"""The user's `vllm serve …`: read, checked, and refused in one line where it can't work. Pure.

vLLM's own parser would need vLLM's imports; what the launcher has to know of the flags needs only
their names. A word that starts with a dash begins a flag, what follows belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GATE = "elasticmoe_engine.gate.Gate"
DEFAULT_PORT = 8000
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ash", "env", "exec"})
_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-asc": "--api-server-count",
    "-n": "--nnodes",
    "-r": "--node-rank",
}
_REFUSED = {
    "--headless": "a rank has its own API server: leave out --headless",
    "--uds": "ranks are reached by TCP: leave out --uds and give --host and --port",
    "--grpc": "the gate needs the HTTP server: leave out --grpc",
    "--nnodes": "a rank lives on one node: leave out --nnodes",
    "--node-rank": "a rank lives on one node: leave out --node-rank",
    "--elastic-ep-max-dp-size": "the group's maximum sets it: leave out --elastic-ep-max-dp-size",
}
_ONLY_ONE = {
    "--pipeline-parallel-size": "elastic EP knows no pipeline parallelism: "
    "leave out --pipeline-parallel-size, use --tensor-parallel-size",
    "--api-server-count": "elastic EP needs one API server a rank: leave out --api-server-count",
}
_LOCAL = frozenset(
    {
        "--host",
        "--port",
        "--model",
        "--config",
        "--api-key",
        "--root-path",
        "--middleware",
        "--download-dir",
        "--device-ids",
        "--uvicorn-log-level",
        "--disable-uvicorn-access-log",
        "--disable-access-log-for-endpoints",
        "--log-config-file",
        "--enable-log-requests",
        "--max-log-len",
        "--ssl-keyfile",
        "--ssl-certfile",
        "--ssl-ca-certs",
        "--enable-ssl-refresh",
    }
)
"""Flags that may differ from rank to rank."""


class CommandError(ValueError):
    """The command can't be run by a launcher; the text says what to change."""


@dataclass(frozen=True)
class Flag:
    """One flag. name: with dashes, up to a dot as vLLM's parser takes it. words: as given."""

    name: str
    values: tuple[str, ...]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command that was checked. flags: of the configuration file first, then of the line.

    host: "" for all addresses.
    """

    program: str
    model: str
    host: str
    port: int
    flags: tuple[Flag, ...]

    def value(self, name: str) -> str | None:
        """The last value of a flag, None when it is not given."""
        found = [flag for flag in self.flags if flag.name == name]
        return (found[-1].values or ("",))[-1] if found else None

    @property
    def agreed(self) -> tuple[str, ...]:
        """The flags that must be the same in the whole group, sorted, one word each."""
        words = {
            "=".join((flag.name, *([" ".join(flag.values)] if flag.values else [])))
            for flag in self.flags
            if flag.name not in _LOCAL
        }
        return tuple(sorted(words))

    @property
    def readable_flags(self) -> str:
        """`agreed` as one line that `flags_that_differ` reads."""
        return shlex.join(self.agreed)

    @property
    def fingerprint(self) -> str:
        """A short hash of `agreed`."""
        return hashlib.sha256("\n".join(self.agreed).encode()).hexdigest()[:16]

    @property
    def eplb_config(self) -> dict[str, Any]:
        """What the user's --eplb-config flags make together. Raises CommandError."""
        merged: dict[str, Any] = {}
        for flag in self.flags:
            name, _, key = flag.name.partition(".")
            if name != "--eplb-config":
                continue
            text = " ".join(flag.values)
            if key:
                merged[key] = _json_or_text(text)
                continue
            given = _json_or_text(text)
            if not isinstance(given, dict):
                raise CommandError(f"--eplb-config {text}: give a JSON object")
            merged |= given
        return merged


def flags_that_differ(ours: str, theirs: str) -> str:
    """What two `readable_flags` have not in common, in words; "" when nothing."""
    one, other = set(shlex.split(ours)), set(shlex.split(theirs))
    parts = []
    if one - other:
        parts.append(f"only here: {shlex.join(sorted(one - other))}")
    if other - one:
        parts.append(f"only in the group: {shlex.join(sorted(other - one))}")
    return "; ".join(parts)


def parse(words: Sequence[str]) -> Command:
    """Read and check a command line. Raises CommandError."""
    program = _program(words)
    rest = list(words[2:])
    positional = rest.pop(0) if rest and not rest[0].startswith("-") else None
    line = _flags(rest)
    flags = tuple(_configured(line)) + tuple(line)
    _refuse(flags)
    command = Command(program, "", "", DEFAULT_PORT, flags)
    model = positional or command.value("--model")
    if not model:
        raise CommandError("name the model right after `vllm serve`")
    port = command.value("--port") or str(DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise CommandError(f"--port {port}: give a number from 1 to 65535")
    parallel = command.value("--tensor-parallel-size") or "1"
    if not parallel.isdecimal():
        raise CommandError(f"--tensor-parallel-size {parallel}: give a number")
    command = Command(program, model, command.value("--host") or "", int(port), flags)
    if "num_redundant_experts" in command.eplb_config:
        raise CommandError(
            "the group's size sets the redundant experts: "
            "leave num_redundant_experts out of --eplb-config"
        )
    return command


def _program(words: Sequence[str]) -> str:
    if not words:
        raise CommandError("give the engine's command after `--`: vllm serve MODEL [flags]")
    name = Path(words[0]).name
    if name in _SHELLS:
        raise CommandError(
            f"`{name} …` can't be started warm: give `vllm serve MODEL [flags]` itself, "
            "and set variables in the container's environment"
        )
    if name != "vllm" or len(words) < 2 or words[1] != "serve":
        raise CommandError(
            f"`{shlex.join(words[:3])}` is not `vllm serve`: give vllm serve MODEL [flags]"
        )
    return words[0]


def _flags(words: Sequence[str]) -> list[Flag]:
    flags: list[Flag] = []
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            name, equals, value = word.partition("=")
            flags.append(Flag(_name(name), (value,) if equals else (), (word,)))
        elif not flags:
            raise CommandError(f"`{word}`: name the model right after `vllm serve`, then the flags")
        else:
            last = flags[-1]
            flags[-1] = Flag(last.name, (*last.values, word), (*last.words, word))
    return flags


def _name(word: str) -> str:
    head, dot, rest = _SHORT.get(word, word).partition(".")
    return head.replace("_", "-") + dot + rest


def _configured(line: Iterable[Flag]) -> list[Flag]:
    """The flags in the file that --config names, by its top-level keys."""
    path = next((flag.values[0] for flag in line if flag.name == "--config" and flag.values), None)
    if path is None:
        return []
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--config {path} can't be read: {error}") from None
    flags: list[Flag] = []
    for raw in text.splitlines():
        key = re.fullmatch(r"([\w.-]+)\s*:\s*(.*)", raw)
        if key:
            value = re.sub(r"\s+#.*", "", key[2]).strip("\"' ")
            flags.append(Flag(_name("--" + key[1]), (value,) if value else ()))
        elif raw.strip() and not raw.lstrip().startswith("#") and flags:
            flags[-1] = Flag(flags[-1].name, (*flags[-1].values, raw.strip()))
    if any(flag.name.startswith("--eplb-config") for flag in flags):
        raise CommandError(f"--config {path} sets eplb-config: give --eplb-config as a flag")
    return flags


def _refuse(flags: Iterable[Flag]) -> None:
    for flag in flags:
        if flag.name.startswith(("--data-parallel", "-dp")):
            raise CommandError(f"the group sets data parallelism: leave out {flag.name}")
        if flag.name in _REFUSED:
            raise CommandError(_REFUSED[flag.name])
        if flag.name in _ONLY_ONE and flag.values[-1:] != ("1",):
            raise CommandError(_ONLY_ONE[flag.name])
        if flag.name == "--middleware" and GATE in flag.values:
            raise CommandError(f"the launcher adds the gate itself: leave out --middleware {GATE}")


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
