"""The chart as helm renders it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "elasticmoe"
NAMESPACE = "elasticmoe-system"

Object = dict[str, Any]


class HelmError(Exception):
    """helm refused; the text is what it says."""


def program() -> str:
    """The helm that scripts/cluster builds, else the one on the path. Raises HelmError."""
    cache = Path(os.environ.get("ELASTICMOE_CACHE") or Path.home() / ".cache" / "elasticmoe")
    built = cache / "cluster" / "bin" / "helm"
    found = str(built) if built.exists() else shutil.which("helm")
    if found is None:
        raise HelmError("there is no helm: run `scripts/cluster/cluster up`")
    return found


def run(*words: str, values: Mapping[str, Any] | None = None) -> str:
    """What a command of helm prints. values: over those of the chart. Raises HelmError."""
    given = yaml.safe_dump(dict(values or {}))
    # A helm that was built without its version's flags takes itself for a very old Kubernetes.
    command = [program(), words[0], "--kube-version", "1.35.0", "--values", "-", *words[1:]]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise HelmError(done.stderr or done.stdout)
    return done.stdout


def lint(values: Mapping[str, Any] | None = None) -> str:
    """Raises HelmError, for warnings too."""
    return run("lint", str(CHART), "--strict", values=values)


def template(
    values: Mapping[str, Any] | None = None, release: str = "elasticmoe", *more: str
) -> list[Object]:
    """The objects of a release. Raises HelmError."""
    words = ("template", release, str(CHART), "--namespace", NAMESPACE, *more)
    return [one for one in yaml.safe_load_all(run(*words, values=values)) if one]


def named(objects: list[Object], kind: str, name: str = "") -> Object:
    """The only object of a kind, or the one of a name."""
    found = [
        one for one in objects if one["kind"] == kind and name in ("", one["metadata"]["name"])
    ]
    assert len(found) == 1, [(one["kind"], one["metadata"]["name"]) for one in objects]
    return found[0]


def operator_container(objects: list[Object]) -> Object:
    """The container that runs the operator."""
    (container,) = named(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    found: Object = container
    return found


def options(container: Object) -> dict[str, list[str]]:
    """A container's args: each option with its values."""
    found: dict[str, list[str]] = {}
    words = list(container["args"])
    while words:
        word = words.pop(0)
        values = found.setdefault(word, [])
        if words and word.startswith("--") and not words[0].startswith("--"):
            values.append(words.pop(0))
    return found
