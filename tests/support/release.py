"""The operator as helm installs it in a real cluster."""

from __future__ import annotations

import subprocess

from support.cluster import SYSTEM, operator_ready
from support.helm import CHART

RELEASE = "elasticmoe"
OPERATOR = f"{RELEASE}-operator"
OPERATOR_USER = f"system:serviceaccount:{SYSTEM}:{OPERATOR}"


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


def may(user: str, question: str, *where: str) -> bool:
    """Whether a user may do `verb resource[/subresource]`. where: -n NAMESPACE, or -A."""
    verb, resource = question.split()
    resource, _, part = resource.partition("/")
    words = ["auth", "can-i", verb, resource, *where, f"--as={user}"]
    words += [f"--subresource={part}"] if part else []
    done = subprocess.run(["kubectl", *words], capture_output=True, text=True, timeout=30)
    answer = (done.stdout.strip().splitlines() or [""])[-1].partition(" ")[0]
    assert answer in ("yes", "no"), done.stdout + done.stderr
    return answer == "yes"
