"""Command line and environment of one launch, out of the user's command and a LaunchSpec. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from elasticmoe_engine.command import GATE, Command


class SpecError(ValueError):
    """A LaunchSpec that can't be launched; the text says why."""


@dataclass(frozen=True)
class LaunchSpec:
    """Fields as in the protocol's LaunchSpec. host_ip: this instance's own address, "" unknown."""

    launch: str
    rank: int
    size: int
    joiner: bool
    master_address: str
    rpc_port: int
    redundant_experts: int
    max_size: int
    command: str = ""
    fingerprint: str = ""
    host_ip: str = ""

    @classmethod
    def from_json(cls, body: Any) -> LaunchSpec:
        """Read a request's body; unknown fields are ignored. Raises SpecError."""
        if not isinstance(body, dict):
            raise SpecError("send a LaunchSpec as a JSON object")
        values: dict[str, Any] = {}
        for one in fields(cls):
            value = body.get(one.name, None if one.default is MISSING else one.default)
            if type(value).__name__ != one.type:
                raise SpecError(f"{one.name}: {value!r} is no {one.type}")
            values[one.name] = value
        spec = cls(**values)
        if not spec.launch:
            raise SpecError("launch: give an id")
        if not 2 <= spec.size <= spec.max_size:
            raise SpecError(f"size {spec.size} is not in 2 to {spec.max_size} (max_size)")
        if not 0 <= spec.rank < spec.size:
            raise SpecError(f"rank {spec.rank} is not in 0 to {spec.size - 1} (size {spec.size})")
        return spec


def arguments(command: Command, spec: LaunchSpec) -> list[str]:
    """What follows `vllm serve`."""
    words = [command.model]
    for flag in command.flags:
        if flag.name == "--model" or flag.name.partition(".")[0] == "--eplb-config":
            continue
        words += flag.words
    eplb = command.eplb_config | {"num_redundant_experts": spec.redundant_experts}
    words += [
        *("--data-parallel-size", str(spec.size)),
        *("--data-parallel-rank", str(spec.rank)),
        "--data-parallel-external-lb",
        *("--data-parallel-address", spec.master_address),
        *("--data-parallel-rpc-port", str(spec.rpc_port)),
        "--enable-expert-parallel",
        "--enable-eplb",
        "--enable-elastic-ep",
        *("--elastic-ep-max-dp-size", str(spec.max_size)),
        *("--eplb-config", json.dumps(eplb, separators=(",", ":"))),
    ]
    if command.value("--all2all-backend") is None:
        words += ["--all2all-backend", "allgather_reducescatter"]
    # The last middleware is the outermost.
    return [*words, "--middleware", GATE]


def environment(
    command: Command,
    spec: LaunchSpec,
    run_dir: Path,
    host_ip: str,
    token: str,
    environ: Mapping[str, str],
    *,
    warm: bool,
) -> dict[str, str | None]:
    """What to change in the environment; None is a variable to remove."""
    changes: dict[str, str | None] = {
        "ELASTICMOE_RUN_DIR": str(run_dir),
        "ELASTICMOE_LAUNCH": spec.launch,
        "ELASTICMOE_ADMIN_TOKEN": token,
        "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "1" if spec.joiner else None,
    }
    if host_ip:
        changes["VLLM_HOST_IP"] = host_ip
    nixl = command.value("--all2all-backend") == "nixl_ep"
    if "VLLM_USE_V2_MODEL_RUNNER" not in environ and not nixl:
        # With V2 a commit waits for the running requests; with V1 it keeps them.
        changes["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if environ.get("VLLM_PORT", "").startswith("tcp://"):
        # Kubernetes' link to a Service named `vllm`; vLLM takes it for its own port.
        changes["VLLM_PORT"] = None
    if warm:
        # This comes from the forkserver too, see `warm`.
        changes["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    return changes


def applied(environ: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """An environment after `environment`'s changes."""
    merged = dict(environ) | {name: text for name, text in changes.items() if text is not None}
    return {name: text for name, text in merged.items() if changes.get(name, text) is not None}
