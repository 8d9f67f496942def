"""The operator as helm installs it in a real cluster."""

from __future__ import annotations

import subprocess

from support.cluster import SYSTEM, operator_ready
from support.helm import CHART

RELEASE = "elasticmoe"
OPERATOR = f"{RELEASE}-operator"


def helm(*words: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(["helm", *words], check=True, capture_output=True, text=True, timeout=180)


def install(*options: str) -> None:
    """Install or upgrade the chart, with the images of this checkout unless told otherwise."""
    helm(
        *("upgrade", "--install", RELEASE, str(CHART), "-n", SYSTEM, "--create-namespace"),
        *("--set", "image.tag=dev", "--set", "image.pullPolicy=Never"),
        *("--wait", "--timeout", "120s", *options),
    )
    operator_ready()
