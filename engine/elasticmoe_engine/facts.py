"""What the launcher tells of the engine that it can start."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from elasticmoe_engine import model
from elasticmoe_engine.command import Command
from elasticmoe_engine.preflight import Instance, no_moe, too_old

VLLM = "elasticmoe_engine.vllm_entry:main"


class Facts:
    """Engine, version, model and flags. `engine` is MODULE:FUNCTION, vLLM's own by default.

    ELASTICMOE_ENGINE_VERSION and ELASTICMOE_NUM_EXPERTS tell what the files don't.
    """

    def __init__(self, command: Command, engine: str) -> None:
        self._command = command
        experts = os.environ.get("ELASTICMOE_NUM_EXPERTS", "")
        self._experts = int(experts) if experts.isdecimal() else None
        self.engine = "vllm" if engine == VLLM else engine.partition(":")[0].partition(".")[0]
        self.version = os.environ.get("ELASTICMOE_ENGINE_VERSION") or _version_of(self.engine)

    @property
    def folder(self) -> Path | None:
        """The model's folder, None while its files are not on this machine."""
        command = self._command
        return model.find_folder(
            command.model,
            os.environ,
            command.value("--revision") or "",
            command.value("--download-dir") or "",
        )

    @property
    def num_experts(self) -> int:
        """Routed experts a layer; 0 none, -1 not known. Raises ModelError."""
        if self._experts is None:
            folder = self.folder
            if folder is None:
                return -1
            self._experts = model.count_experts(folder)
        return self._experts

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


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
