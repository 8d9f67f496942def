"""What the launcher tells of the engine that it can start."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from elasticmoe_engine import model
from elasticmoe_engine.command import Command
from elasticmoe_engine.commands import Commands
from elasticmoe_engine.preflight import Instance, no_moe, too_old

VLLM = "elasticmoe_engine.vllm_entry:main"


class Facts:
    """Engine, version, model and flags of the command in force.

    engine: MODULE:FUNCTION, vLLM's own by default. ELASTICMOE_ENGINE_VERSION and
    ELASTICMOE_NUM_EXPERTS tell what the files don't.
    """

    def __init__(self, commands: Commands, engine: str) -> None:
        self._commands = commands
        self._counted: tuple[Command, int] | None = None
        self.engine = "vllm" if engine == VLLM else engine.partition(":")[0].partition(".")[0]
        self.version = os.environ.get("ELASTICMOE_ENGINE_VERSION") or _version_of(self.engine)

    @property
    def _command(self) -> Command:
        return self._commands.command

    @property
    def folder(self) -> Path | None:
        """The model's folder, None while its files are not on this machine."""
        return _folder(self._command)

    @property
    def num_experts(self) -> int:
        """Routed experts a layer; 0 none, -1 not known. Raises ModelError."""
        command, known = self._command, self._counted
        if known is not None and known[0] is command:
            return known[1]
        found = _count_experts(command)
        if found >= 0:
            self._counted = (command, found)
        return found

    @property
    def refusal(self) -> str:
        """Why no engine can be started with this version or model, "" when one can."""
        return too_old(self.version) or no_moe(self._command.model, self._experts_or_unknown)

    @property
    def problem(self) -> str:
        """What is wrong with version or model, in one line."""
        if refusal := self.refusal:
            return refusal
        try:
            experts = self.num_experts
        except model.ModelError as error:
            return str(error)
        if experts < 0:
            return (
                f"{self._command.model} is not on this machine, so its experts are not known: "
                "give a folder, or download it into the Hugging Face cache first"
            )
        return ""

    @property
    def _experts_or_unknown(self) -> int:
        try:
            return self.num_experts
        except model.ModelError:
            return -1

    def as_json(self) -> dict[str, Any]:
        """As in `GET /state`."""
        return {
            "engine": self.engine,
            "engine_version": self.version,
            "model": self._command.model,
            "num_experts": self._experts_or_unknown,
            "fingerprint": self._command.fingerprint,
            "flags": self._command.readable_flags,
            **self._commands.as_json(),
        }

    def instance(self, *, warm: bool, warm_error: str, idle: bool) -> Instance:
        """As a preflight sees it."""
        facts = self.as_json()
        return Instance(
            warm=warm,
            warm_error=warm_error,
            version=self.version,
            model=self._command.model,
            folder=self.folder,
            num_experts=facts["num_experts"],
            fingerprint=facts["fingerprint"],
            flags=facts["flags"],
            parallel=int(self._command.value("--tensor-parallel-size") or 1),
            idle=idle,
        )


def needs_new_launcher(present: Command, other: Command) -> str:
    """Why `other` can't take the place of the command in force, "" when it can."""
    here, there = (f"{one.host or '*'}:{one.port}" for one in (present, other))
    if here != there:
        return f"it serves at {there}, this launcher at {here}: another address needs new pods"
    try:
        ours = _count_experts(present)
    except model.ModelError:
        ours = -1
    try:
        theirs = _count_experts(other)
    except model.ModelError as error:
        return str(error) if ours > 0 else ""
    if ours > 0 and theirs < 0:
        return f"{other.model} is not on this machine: put it there, or give another model"
    if ours > 0 and theirs != ours:
        return (
            f"{other.model} has {theirs} routed experts a layer, the group was made for {ours}: "
            "another model needs new pods"
        )
    return ""


def _folder(command: Command) -> Path | None:
    return model.find_folder(
        command.model,
        os.environ,
        command.value("--revision") or "",
        command.value("--download-dir") or "",
    )


def _count_experts(command: Command) -> int:
    """Routed experts a layer; 0 none, -1 not known. Raises ModelError."""
    given = os.environ.get("ELASTICMOE_NUM_EXPERTS", "")
    if given.isdecimal():
        return int(given)
    folder = _folder(command)
    return -1 if folder is None else model.count_experts(folder)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
