"""The chart in a real cluster, and a namespace of its own for each test."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cluster import SYSTEM, Group, kubectl, manifest
from support.release import install

HERE = Path(__file__).parent
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def chart() -> None:
    """The operator, in all namespaces. Only in a cluster that is there for tests."""
    context = kubectl("config", "current-context").strip()
    assert context.startswith("kind-"), f"{context} is not a kind cluster: nothing is tested there"
    install()


@pytest.fixture
def namespace(chart: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace that enforces Pod Security *restricted*; what was in it is printed on failure."""
    yield from _namespace(request)


@pytest.fixture(scope="module")
def shared_namespace(chart: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for all tests of a file."""
    yield from _namespace(request)


def _namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    failed = request.session.testsfailed
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, RESTRICTED)
        yield name
    finally:
        if request.session.testsfailed > failed:
            describe(name)
        kubectl("-n", name, "delete", "emoe", "--all", "--wait=false")
        # Nobody has to wait for requests of a test that is over.
        kubectl("-n", name, "delete", "pods", "--all", "--force", "--grace-period=0")
        kubectl("delete", "namespace", name, "--timeout=90s", limit=100)


def describe(namespace: str) -> None:
    """Print what there is, for whoever reads the failure."""
    looks = (
        ("get", "pods", "-o", "wide"),
        ("get", "emoe", "-o", "yaml"),
        ("get", "events", "--sort-by=.lastTimestamp"),
    )
    for words in looks:
        print(kubectl("-n", namespace, *words), file=sys.stderr)
    labels = ("-l", "app.kubernetes.io/component=coordinator", "--tail=80")
    print(kubectl("-n", namespace, "logs", *labels), file=sys.stderr)
    operator = ("-l", "app.kubernetes.io/name=elasticmoe-operator", "--tail=80")
    print(kubectl("-n", SYSTEM, "logs", *operator), file=sys.stderr)


@pytest.fixture
def group(namespace: str) -> Callable[..., Group]:
    """Makes a group: `group(name, replicas=3, …)` applies it and waits until it serves."""
    return _maker(namespace)


def _maker(namespace: str) -> Callable[..., Group]:
    def make(name: str = "moe", *, wait: bool = True, env: Any = None, **spec: Any) -> Group:
        made = Group(namespace, name)
        body = manifest(name, **spec)
        if env:
            body["spec"]["template"]["spec"]["containers"][0]["env"] = [
                {"name": key, "value": value} for key, value in env.items()
            ]
        made.apply(body)
        if wait:
            made.settled(body["spec"]["replicas"])
        return made

    return make


@pytest.fixture(scope="module")
def shared(shared_namespace: str) -> Callable[..., Group]:
    """The same for a group that a file's tests share."""
    return _maker(shared_namespace)


@pytest.fixture(scope="module")
def shared_group(shared_namespace: str) -> Group:
    """One group for all tests of a file: they leave it with two ranks."""
    made: Group = _maker(shared_namespace)("moe")
    return made
