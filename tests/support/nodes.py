"""Nodes of a kind cluster: containers that can be stopped, with images of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from support.cluster import eventually, kubectl, listed, on_node
from support.helm import ROOT


def workers() -> list[str]:
    """Names of the nodes that take pods."""
    return [
        one["metadata"]["name"]
        for one in listed("nodes")
        if "node-role.kubernetes.io/control-plane" not in one["metadata"]["labels"]
    ]


def is_ready(node: str) -> bool:
    """What Kubernetes thinks of a node."""
    (found,) = (one for one in listed("nodes") if one["metadata"]["name"] == node)
    conditions = {one["type"]: one["status"] for one in found["status"]["conditions"]}
    return conditions.get("Ready") == "True"


@contextmanager
def tagged(image: str, other: str) -> Iterator[None]:
    """An image has another name too, on all nodes."""
    names = [f"docker.io/library/{one}" for one in (image, other)]
    try:
        for node in workers():
            on_node(node, "ctr", "-n", "k8s.io", "images", "tag", "--force", *names)
        yield
    finally:
        for node in workers():
            on_node(node, "ctr", "-n", "k8s.io", "images", "rm", names[1])


@contextmanager
def labelled(node: str, label: str) -> Iterator[None]:
    """A node has a label `key=value`."""
    kubectl("label", "node", node, label, "--overwrite")
    try:
        yield
    finally:
        kubectl("label", "node", node, f"{label.partition('=')[0]}-")


@contextmanager
def drained(node: str) -> Iterator[None]:
    """`kubectl drain`, then the pods of a test are gone from it; usable again afterwards."""
    try:
        words = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=150s")
        kubectl("drain", node, *words, limit=160)
        yield
    finally:
        kubectl("uncordon", node)


@contextmanager
def stopped(node: str) -> Iterator[None]:
    """A node that vanished, as far as the cluster sees it; Ready again afterwards."""
    provider = _provider(node)
    cluster = provider.removeprefix("kind://docker/").partition("/")[0]
    _docker("kill", node)
    try:
        yield
    finally:
        _docker("start", node)
        # Outside of docker's own networks the pods' routes are gone.
        script = str(ROOT / "scripts" / "cluster" / "cluster")
        done = subprocess.run(
            [script, "network", "--name", cluster], capture_output=True, text=True, timeout=120
        )
        eventually(lambda: is_ready(node), 120, f"{node} is Ready again ({done.stderr.strip()})")


def _provider(node: str) -> str:
    found: str = json.loads(kubectl("get", "node", node, "-o", "json"))["spec"]["providerID"]
    return found


def _docker(*words: str) -> None:
    subprocess.run(["docker", *words], check=True, capture_output=True, text=True, timeout=60)
