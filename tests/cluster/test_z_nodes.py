"""Nodes that are drained and nodes that vanish. Last: slow, and they move the pods of everybody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from support.cluster import MODEL, Group, eventually, manifest, operator_pod
from support.nodes import drained, stopped

SPREAD = {
    "podAntiAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {
                "weight": 100,
                "podAffinityTerm": {
                    "topologyKey": "kubernetes.io/hostname",
                    "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "rank"}},
                },
            }
        ]
    }
}


def spread(group: Callable[..., Group]) -> Group:
    """Three ranks, on a node each where there are three."""
    template: dict[str, Any] = manifest("moe")["spec"]["template"]
    template["spec"]["affinity"] = SPREAD
    return group(replicas=3, template=template)


def node_of(pod: dict[str, Any]) -> str:
    node: str = pod["spec"]["nodeName"]
    return node


def answers(url: str) -> bool:
    """Whether a few requests in a row, each by a connection of its own, are answered."""
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
    try:
        return all(
            httpx.post(f"{url}/v1/completions", json=body, timeout=3).is_success for _ in range(6)
        )
    except httpx.HTTPError:
        return False


@pytest.mark.timeout(400)
def test_a_drained_node_costs_no_request(group: Callable[..., Group]) -> None:
    moe = spread(group)
    node = node_of(moe.pods()["moe-1"])
    with moe.traffic() as users:
        with drained(node):
            assert node not in {node_of(one) for one in moe.pods().values() if _bound(one)}
            moe.settled(3, limit=150)
            users.progress(10)
        result = users.stop()
    assert result.failed == 0, result.errors


@pytest.mark.timeout(500)
def test_a_group_recovers_from_a_node_that_vanished(group: Callable[..., Group]) -> None:
    moe = spread(group)
    url = moe.url()
    kept = {node_of(moe.coordinator_pod()), node_of(operator_pod())}
    lost = {name: node_of(one) for name, one in moe.pods().items()}
    node = next(one for one in lost.values() if one not in kept)
    uids = moe.uids()
    with stopped(node):
        eventually(lambda: not answers(url), 30, "the loss is felt")
        # Fewer ranks serve once the missing one was waited for in vain.
        eventually(lambda: answers(url), 120, "requests are answered again")
        moe.settled(3, limit=180)
        assert node not in {node_of(one) for one in moe.pods().values()}
        assert answers(url)
    moe.settled(3)
    after = moe.uids()
    gone = [name for name, where in lost.items() if where == node]
    assert all(after[one] != uids[one] for one in gone)
    assert all(after[one] == uids[one] for one in uids if one not in gone)


@pytest.mark.timeout(500)
def test_the_coordinator_s_node_vanishes(group: Callable[..., Group]) -> None:
    moe = spread(group)
    url = moe.url()
    with stopped(node_of(moe.coordinator_pod())):
        eventually(lambda: not answers(url), 30, "the loss is felt")
        eventually(lambda: answers(url), 180, "requests are answered again")
        moe.settled(3, limit=180)
    moe.settled(3)


def _bound(pod: dict[str, Any]) -> bool:
    return "nodeName" in pod["spec"]
