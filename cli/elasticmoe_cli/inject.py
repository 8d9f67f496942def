"""Launcher and gate for an engine's Python environment that has nothing of this project."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import tempfile
from pathlib import Path

PACKAGE = "elasticmoe_engine"


def inject(folder: Path) -> Path:
    """Copy the engine's part (standard library only) into `folder`; returns it, for PYTHONPATH.

    Any user can read it. What an earlier call left there is replaced, as a whole; one that was
    broken off does not matter. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = importlib.resources.files(PACKAGE)
    with (
        importlib.resources.as_file(source) as path,
        # What an engine compiled there may be another user's.
        tempfile.TemporaryDirectory(
            prefix=".new-", dir=folder, ignore_cleanup_errors=True
        ) as fresh,
    ):
        new, old = Path(fresh, PACKAGE), Path(fresh, "old")
        shutil.copytree(path, new, ignore=shutil.ignore_patterns("__pycache__"))
        for one in (new, *new.rglob("*")):
            one.chmod(0o755 if one.is_dir() else 0o644)
        if (folder / PACKAGE).exists():
            os.replace(folder / PACKAGE, old)
        os.replace(new, folder / PACKAGE)
    return folder
