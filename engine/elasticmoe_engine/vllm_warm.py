"""Imports what vLLM's processes need, so that they find it imported. Runs in the forkserver.

The modules in `_NEEDED` must import or there is no warm start; the rest only makes it quicker, and
what fails there is told in `problems`.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

from elasticmoe_engine.warm import MODEL_FOLDER

_NEEDED = (
    "uvloop",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.common.cli_args",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.distributed.elastic_ep.external_elastic_ep",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.serve.elastic_ep.middleware",
)
_USEFUL = (
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.entrypoints.generate.api_router",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.structured_output",
    "vllm.model_executor.model_loader",
)
problems: list[str] = []


def _try(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        problems.append(f"{name}: {type(error).__name__}: {error}")
        return None


def _worker() -> str:
    platform = importlib.import_module("vllm.platforms").current_platform
    return "vllm.v1.worker.cpu_worker" if platform.is_cpu() else "vllm.v1.worker.gpu_worker"


def _import_model() -> None:
    """Of the model's class vLLM wants to know some facts, which it asks of another process that
    imports all of vLLM again, for half a minute where no earlier answer lies in a cache. A class
    that is registered as imported is asked itself."""
    folder = os.environ.get(MODEL_FOLDER)
    if not folder:
        return
    try:
        with open(os.path.join(folder, "config.json")) as file:
            names = json.load(file).get("architectures") or []
        registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
        for name in names:
            lazy = registry.models.get(name)
            module = _try(lazy.module_name) if hasattr(lazy, "module_name") else None
            if module is not None:
                registry.register_model(name, getattr(module, lazy.class_name))
    except Exception as error:
        problems.append(f"model class: {type(error).__name__}: {error}")


for _name in _NEEDED:
    importlib.import_module(_name)
for _name in (*_USEFUL, _worker()):
    _try(_name)
_import_model()
