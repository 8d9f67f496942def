"""A folder that looks like a model's, for those who look at one before they start an engine."""

from __future__ import annotations

import json
from pathlib import Path

NUM_EXPERTS = 16


def write_model(folder: Path) -> Path:
    """Make the folder if it is not there; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["Simulated"], "num_experts": NUM_EXPERTS}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder
