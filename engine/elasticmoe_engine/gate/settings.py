"""What the launcher tells the gate, in the environment of the API server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TOKEN_HEADER = b"x-elasticmoe-token"
VLLM_STATE = "vllm.entrypoints.serve.elastic_ep.middleware"
"""vLLM's module with the process-local flags of a resize."""


@dataclass(frozen=True)
class Settings:
    """hold_max: requests held at once. hold_s: seconds that one is held at most.

    run_dir: None outside of a launcher; then there is no socket and no admin path is open.
    """

    run_dir: Path | None = None
    launch: str = ""
    token: str = ""
    hold_max: int = 1024
    hold_s: float = 60.0
    engine_state: str = VLLM_STATE

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read ELASTICMOE_*; raises ValueError for a number that is none."""
        run_dir = environ.get("ELASTICMOE_RUN_DIR")
        return cls(
            run_dir=Path(run_dir) if run_dir else None,
            launch=environ.get("ELASTICMOE_LAUNCH", ""),
            token=environ.get("ELASTICMOE_ADMIN_TOKEN", ""),
            hold_max=int(environ.get("ELASTICMOE_HOLD_MAX", "1024")),
            hold_s=float(environ.get("ELASTICMOE_HOLD_SECONDS", "60")),
            engine_state=environ.get("ELASTICMOE_ENGINE_STATE", VLLM_STATE),
        )
