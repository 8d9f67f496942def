"""What an engine is started with: vLLM's command line, the environment, a launch's own values."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

SIM_MODEL = "sim"
SIM_NUM_EXPERTS = 16


class ConfigError(ValueError):
    """The engine can't start like this; the text says what to change."""


@dataclass(frozen=True)
class Timing:
    """Seconds, each settable as SIM_<NAME>, e.g. SIM_PREPARE_S=2.

    limit_s: for joiners to come and for all ranks to be ready; vLLM 0.33 has 300 s in its code.
    start_limit_s: for all ranks of a new group to come.
    commit_limit_s: 600 s in vLLM 0.33. watchdog_s: how often the API server looks whether its
    engine core lives (vLLM 0.33: 5 s). joiner_term_s: how long a joiner that waits in its
    handshake ignores SIGTERM (measured on vLLM 0.33: 30 s at least).
    """

    boot_s: float = 0.3
    prepare_s: float = 0.3
    commit_s: float = 0.2
    token_s: float = 0.01
    start_limit_s: float = 300.0
    limit_s: float = 300.0
    commit_limit_s: float = 600.0
    watchdog_s: float = 5.0
    joiner_term_s: float = 30.0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Timing:
        """Read SIM_* variables; raises ConfigError for one that is not a number."""
        values = {}
        for one in fields(cls):
            text = environ.get("SIM_" + one.name.upper())
            if text is None:
                continue
            try:
                values[one.name] = float(text)
            except ValueError:
                raise ConfigError(f"SIM_{one.name.upper()}={text}: give seconds") from None
        return cls(**values)


@dataclass(frozen=True)
class Config:
    """One rank's configuration, after checks."""

    rank: int = 0
    size: int = 2
    max_size: int = 2
    redundant_experts: int = 0
    num_experts: int = SIM_NUM_EXPERTS
    master_address: str = "127.0.0.1"
    rpc_port: int = 29550
    joiner: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    model: str = SIM_MODEL
    served_model_names: tuple[str, ...] = (SIM_MODEL,)
    max_model_len: int = 512
    max_num_seqs: int = 256
    middleware: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    timing: Timing = field(default_factory=Timing)


def parse(
    argv: Sequence[str],
    spec: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Read `argv` as `vllm serve` would; values of `spec` (a LaunchSpec as a dict) win.

    Flags of vLLM that mean nothing here are accepted and ignored. Raises ConfigError.
    """
    words = [_dashes(word) for word in argv]
    tag = words.pop(0) if words and not words[0].startswith("-") else None
    args, _ignored = _parser().parse_known_args(words)
    model = tag or args.model
    try:
        redundant = int(json.loads(args.eplb_config).get("num_redundant_experts", 0))
    except (ValueError, AttributeError):
        raise ConfigError(f"--eplb-config {args.eplb_config}: give a JSON object") from None
    config = Config(
        rank=args.data_parallel_rank,
        size=args.data_parallel_size,
        max_size=args.elastic_ep_max_dp_size or args.data_parallel_size,
        redundant_experts=redundant,
        num_experts=read_num_experts(model),
        master_address=args.data_parallel_address,
        rpc_port=args.data_parallel_rpc_port,
        joiner=environ.get("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", "0") not in ("", "0"),
        host=args.host,
        port=args.port,
        model=model,
        served_model_names=tuple(args.served_model_name or [model]),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        middleware=tuple(args.middleware),
        api_keys=tuple(args.api_key or []),
        timing=Timing.from_environ(environ),
    )
    if spec is not None:
        names = {"rank", "size", "joiner", "master_address", "rpc_port", "redundant_experts"}
        names.add("max_size")
        config = replace(config, **{name: spec[name] for name in names if name in spec})
    _check(config)
    return config


def read_num_experts(model: str) -> int:
    """Routed experts a layer of the model in folder `model`; raises ConfigError."""
    if model == SIM_MODEL:
        return SIM_NUM_EXPERTS
    path = Path(model) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no readable model configuration at {path} ({error}): "
            f"give --model a folder with a config.json, or `{SIM_MODEL}`"
        ) from None
    values = {**values, **values.get("text_config", {})}
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        if isinstance(values.get(name), int):
            return int(values[name])
    raise ConfigError(f"{path} names no experts: elastic EP needs a Mixture-of-Experts model")


def _check(config: Config) -> None:
    slots = config.num_experts + config.redundant_experts
    if config.size < 2:
        raise ConfigError("--data-parallel-size must be 2 or more with an external load balancer")
    if not 0 <= config.rank < config.size:
        raise ConfigError(
            f"--data-parallel-rank {config.rank} is not in 0 to {config.size - 1} "
            f"(--data-parallel-size {config.size})"
        )
    if config.size > config.max_size:
        raise ConfigError(
            f"--data-parallel-size {config.size} is over --elastic-ep-max-dp-size {config.max_size}"
        )
    if config.redundant_experts < 0 or slots % config.size:
        raise ConfigError(
            f"{config.num_experts} experts and num_redundant_experts={config.redundant_experts} "
            f"do not divide among {config.size} ranks"
        )


def _dashes(word: str) -> str:
    """vLLM takes --a_b for --a-b."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m elasticmoe_sim",
        description="Simulated vLLM 0.33 engine: one rank of an elastic group.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default=SIM_MODEL)
    add("--served-model-name", nargs="+")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--data-parallel-size", "-dp", type=int, default=2)
    add("--data-parallel-rank", "-dpn", type=int, default=0)
    add("--data-parallel-address", "-dpa", default="127.0.0.1")
    add("--data-parallel-rpc-port", "-dpp", type=int, default=29550)
    add("--elastic-ep-max-dp-size", type=int, default=0)
    add("--eplb-config", default="{}")
    add("--max-model-len", type=int, default=512)
    add("--max-num-seqs", type=int, default=256)
    add("--middleware", action="append", default=[])
    add("--api-key", nargs="+")
    return parser
