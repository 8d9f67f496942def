"""The chart in a real cluster, and a namespace of its own for each test."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cluster import SYSTEM, Group, KubectlError, kubectl, manifest
from support.release import install

HERE = Path(__file__).parent
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(300))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """A failure is shown with what was in the test's namespaces then."""
    report: Any = yield
    if report.failed and call.when != "teardown":
        given = getattr(item, "funcargs", {})
        names = {one.namespace for one in given.values() if isinstance(one, Group)}
        names |= {given[one] for one in ("namespace", "shared_namespace") if one in given}
        report.sections += [(f"namespace {one}", describe(one)) for one in sorted(names)]
    return report


def describe(namespace: str) -> str:
    """What there is, for whoever reads the failure."""
    lines = []
    component = "app.kubernetes.io/component"
    operator = "app.kubernetes.io/name=elasticmoe-operator"
    looks = (
        ("-n", namespace, "get", "pods", "-o", "wide"),
        ("-n", namespace, "get", "emoe", "-o", "yaml"),
        ("-n", namespace, "get", "events", "--sort-by=.lastTimestamp"),
        ("-n", namespace, "logs", "-l", f"{component}=coordinator", "--tail=80"),
        *(
            ("-n", namespace, "logs", "-l", f"{component}=rank", "-c", one, "--prefix", "--tail=30")
            for one in ("elasticmoe-sidecar", "engine")
        ),
        ("-n", SYSTEM, "logs", "-l", operator, "--tail=80"),
    )
    for words in looks:
        lines.append(f"$ kubectl {' '.join(words)}")
        try:
            lines.append(kubectl(*words))
        except (KubectlError, subprocess.TimeoutExpired) as error:
            lines.append(str(error))
    return "\n".join(lines)


@pytest.fixture(scope="session")
def chart() -> None:
    """The operator, in all namespaces. Only in a cluster that is there for tests."""
    context = kubectl("config", "current-context").strip()
    assert context.startswith("kind-"), f"{context} is not a kind cluster: nothing is tested there"
    install()


@pytest.fixture
def namespace(chart: None) -> Iterator[str]:
    """A namespace that enforces Pod Security *restricted*."""
    yield from _namespace()


@pytest.fixture(scope="module")
def shared_namespace(chart: None) -> Iterator[str]:
    """The same for all tests of a file."""
    yield from _namespace()


def _namespace() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    try:
        kubectl("label", "namespace", name, RESTRICTED)
        yield name
    finally:
        kubectl("-n", name, "delete", "emoe", "--all", "--wait=false")
        # Nobody has to wait for requests of a test that is over.
        kubectl("-n", name, "delete", "pods", "--all", "--force", "--grace-period=0")
        kubectl("delete", "namespace", name, "--timeout=90s", limit=100)


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
