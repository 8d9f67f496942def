"""How vLLM 0.33 is started on CPU: flags and environment for demo, tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERVED_MODEL_NAME = "tiny"
SLOTS = 12
"""Expert slots a rank: two ranks hold the tiny model's 16 experts with 8 redundant ones."""

EPLB_CONFIG: dict[str, Any] = {
    # asynchronous rebalancing needs NIXL
    "communicator": "torch_gloo",
    "use_async": False,
    "window_size": 100,
    "step_interval": 1000,
}

ENVIRONMENT = {
    # With the V1 model runner running requests are kept during a commit.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Or the first request for log-probabilities compiles something, and without a C++ compiler
    # that ends the engine.
    "TORCHDYNAMO_DISABLE": "1",
}


def environment(base: Mapping[str, str], *, joiner: bool = False) -> dict[str, str]:
    """Environment of a rank on top of `base`."""
    values = {**base, **ENVIRONMENT}
    values.pop("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", None)
    if joiner:
        values["VLLM_ELASTIC_EP_SCALE_UP_LAUNCH"] = "1"
    return values


def model_flags(kv_cache_mib: int = 128) -> list[str]:
    """Flags as a user gives them."""
    return [
        *("--served-model-name", SERVED_MODEL_NAME),
        *("--kv-cache-memory-bytes", str(kv_cache_mib << 20)),
        *("--max-model-len", "512"),
        *("--max-num-seqs", "16"),
        *("--dtype", "float32"),  # sums of bfloat16 differ with the layout, and then tokens do
        *("--distributed-executor-backend", "uni"),
        "--enforce-eager",
    ]


def elastic_flags(max_size: int) -> list[str]:
    """Flags that make a rank elastic, whatever the group's size is (the launcher adds them)."""
    return [
        *("--elastic-ep-max-dp-size", str(max_size)),
        "--enable-expert-parallel",
        "--enable-eplb",
        "--enable-elastic-ep",
    ]


def rank_flags(
    rank: int,
    size: int,
    *,
    rpc_port: int,
    address: str = "127.0.0.1",
    num_experts: int = 16,
    slots: int = SLOTS,
) -> list[str]:
    """Flags that give a rank its place among `size` ranks; for a joiner the new size."""
    eplb = {**EPLB_CONFIG, "num_redundant_experts": slots * size - num_experts}
    return [
        *("--data-parallel-size", str(size)),
        *("--data-parallel-rank", str(rank)),
        *("--data-parallel-address", address),
        *("--data-parallel-rpc-port", str(rpc_port)),
        "--data-parallel-external-lb",
        *("--eplb-config", json.dumps(eplb, separators=(",", ":"))),
    ]


def serve_command(
    venv: Path, model: Path, port: int, flags: list[str], host: str = "127.0.0.1"
) -> list[str]:
    """Command line of a plain API server, without launcher and gate."""
    return [
        str(venv / "bin" / "python"),
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model)),
        *("--host", host),
        *("--port", str(port)),
        *flags,
    ]
