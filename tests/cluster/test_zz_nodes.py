"""Nodes that are drained or vanish. Last, because the cluster takes a while to be whole again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cluster import Group, eventually, kubectl

CLUSTER = Path(__file__).parents[2] / "scripts" / "cluster" / "cluster"


def ready_nodes() -> int:
    lines = kubectl("get", "nodes", "--no-headers").splitlines()
    return sum(1 for line in lines if line.split()[1].startswith("Ready"))


@pytest.mark.timeout(400)
def test_a_node_with_a_rank_is_drained(group: Callable[..., Group]) -> None:
    moe = group(replicas=3)
    node = moe.pods()["moe-1"]["spec"]["nodeName"]
    words = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=240s")
    selector = "--pod-selector=elasticmoe.io/deployment=moe"
    try:
        kubectl("drain", node, *words, selector, limit=250)
        moe.settled(3, limit=150)
        assert all(pod["spec"]["nodeName"] != node for pod in moe.pods().values())
    finally:
        kubectl("uncordon", node)


@pytest.mark.timeout(400)
def test_a_node_that_vanishes_is_survived(group: Callable[..., Group]) -> None:
    moe = group(replicas=3)
    coordinator = moe.coordinator_pod()["spec"]["nodeName"]
    pods = moe.pods()
    name, node = next(
        (name, pod["spec"]["nodeName"])
        for name, pod in pods.items()
        if pod["spec"]["nodeName"] != coordinator
    )
    gone = pods[name]["metadata"]["uid"]
    whole = ready_nodes()
    try:
        subprocess.run(["docker", "stop", "-t1", node], check=True, capture_output=True)
        eventually(lambda: moe.uids().get(name) not in (None, gone), 200, "another pod elsewhere")
        moe.settled(3, limit=150)
    finally:
        subprocess.run(["docker", "start", node], check=True, capture_output=True)
        cluster = moe.kubectl("config", "current-context").strip().removeprefix("kind-")
        subprocess.run([CLUSTER, "network", "--name", cluster], check=True, capture_output=True)
        eventually(lambda: ready_nodes() == whole, 90, "all nodes are back")
