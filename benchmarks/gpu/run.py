"""The demo on GPUs: 2 -> 3 -> 2 -> 3 under streaming load, then one SIGKILL of an engine core.

    python benchmarks/gpu/run.py --model FOLDER [--gpus 1] [--alone] [--out FILE]

--alone: then the same resizes with vLLM alone (see `../alone.py`), and both side by side.
Run it with the Python that has vLLM >= 0.33 and this project. One GPU is shared by all ranks; with
more there has to be one for each rank. ELASTICMOE_NCCL names the libnccl.so.2 to preload.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from elasticmoe_cli import demo
from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.profiles import Profile
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import alone
from limits import limited

SIZES = (2, 3, 2, 3)
MODEL_NAME = "m"
TOLERANCES = {"bfloat16": 0.5, "float32": 0.01}
"""Of a log-probability: the order in which ranks' parts are summed changes with the layout.

With model.py's weights and the demo's prompt transformers' bfloat16 is up to 0.44 off its float32.
"""

EPLB = {
    # Several ranks on one device: asynchronous rebalancing needs NIXL.
    "communicator": "pynccl",
    "use_async": False,
    "window_size": 100,
    "step_interval": 3000,
}
ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_CUMEM_ENABLE": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def profile(model: Path, gpus: int, dtype: str, caches: Path) -> Profile:
    """How a rank is started; on a shared GPU NCCL has to take each rank for a host of its own.

    caches: a folder in which each instance has vLLM's cache of its own, empty as in a new pod.
    """
    memory = ("--kv-cache-memory-bytes", str(2 << 30), "--gpu-memory-utilization", "0.25")
    environ = dict(ENVIRONMENT)
    by_number = {"NCCL_HOSTID": "rank{number}", "VLLM_CACHE_ROOT": f"{caches}/{{number}}"}
    if gpus > 1:
        by_number["CUDA_VISIBLE_DEVICES"] = "{number}"
    if library := os.environ.get("ELASTICMOE_NCCL"):
        environ |= {"LD_PRELOAD": library, "VLLM_NCCL_SO_PATH": library}
    return Profile(
        name="vllm",
        python=sys.executable,
        served_model=MODEL_NAME,
        command=[
            *("vllm", "serve", str(model)),
            *("--served-model-name", MODEL_NAME),
            *(memory if gpus == 1 else ()),
            *("--dtype", dtype),
            *("--max-model-len", "2048", "--max-num-seqs", "64"),
            *("--enforce-eager", "--attention-backend", "TRITON_ATTN"),
            *("--all2all-backend", "allgather_reducescatter"),
            *("--eplb-config", json.dumps(EPLB, separators=(",", ":"))),
        ],
        environ=environ,
        by_number=by_number,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="made by model.py")
    parser.add_argument("--gpus", type=int, default=1, help="1, or one for each of the three ranks")
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="bfloat16")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="compare with vLLM alone")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for all of it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.gpus not in (1, *range(max(SIZES), 65)):
        parser.error(f"--gpus is 1 or at least {max(SIZES)}")
    if not (options.model / "config.json").exists():
        parser.error(f"there is no model in {options.model}: write one with model.py")
    plan = demo.Plan(
        sizes=SIZES,
        clients=options.clients,
        max_tokens=16,
        tolerance=TOLERANCES[options.dtype],
        of_prompt=True,
        between=24,
        kill=True,
    )
    console = Console(width=120)
    try:
        with tempfile.TemporaryDirectory() as caches, limited(options.limit):
            own = profile(options.model.absolute(), options.gpus, options.dtype, Path(caches))
            report = demo.run(own, plan, console)
            if options.out:
                demo.write(options.out, report)
            if options.alone:
                other = alone.run(own, plan, console)
                console.print(alone.compare(report, other))
                if options.out:
                    figures = report.as_json() | {"alone": alone.as_json(other)}
                    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    except CommandFailed as failure:
        print(f"run.py: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        return 130
    return int(bool(report.failed or report.output_mismatches))


if __name__ == "__main__":
    sys.exit(main())
