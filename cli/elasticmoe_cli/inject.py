"""Launcher and gate for an engine's Python environment that has nothing of this project."""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path

PACKAGE = "elasticmoe_engine"


def inject(folder: Path) -> Path:
    """Copy the engine's part (standard library only) into `folder`; returns it, for PYTHONPATH."""
    source = importlib.resources.files(PACKAGE)
    with importlib.resources.as_file(source) as path:
        shutil.copytree(
            path,
            folder / PACKAGE,
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
    return folder
