"""Groups of one name in two namespaces, and an operator that watches one namespace alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.cluster import Group, kubectl, listed, manifest
from support.release import OPERATOR_USER, install, may


def test_groups_of_one_name_in_two_namespaces(
    shared_group: Group, group: Callable[..., Group]
) -> None:
    other = group(shared_group.name)
    before = shared_group.uids()
    assert shared_group.get("secret", "moe-keys")["data"] != other.get("secret", "moe-keys")["data"]
    with shared_group.traffic() as users:
        other.scale(3)
        other.settled(3)
        other.kubectl("delete", "emoe", other.name, "--timeout=90s", limit=100)
        users.progress(5)
        result = users.stop()
    assert result.failed == 0, result.errors
    shared_group.settled(2)
    assert shared_group.uids() == before


@pytest.fixture(scope="module")
def narrow(shared_group: Group) -> Iterator[Group]:
    """A group in the only namespace that the operator watches; it watches all again afterwards."""
    watched = shared_group.namespace
    try:
        install(
            *("--set", "watch.allNamespaces=false"),
            *("--set", f"watch.namespaces={{{watched}}}"),
        )
        yield shared_group
    finally:
        install()


def test_an_operator_of_one_namespace_resizes_there_and_looks_nowhere_else(
    narrow: Group, namespace: str
) -> None:
    elsewhere = Group(namespace, "moe")
    elsewhere.apply(manifest("moe"))
    narrow.scale(3)
    narrow.settled(3)
    narrow.scale(2)
    narrow.settled(2)
    assert elsewhere.status() == {}
    assert "finalizers" not in elsewhere.body()["metadata"]
    assert not listed("-n", namespace, "pods,statefulsets,deployments,secrets")


def test_an_operator_of_one_namespace_has_no_right_elsewhere(narrow: Group, namespace: str) -> None:
    questions = (
        "list elasticmoedeployments",
        "patch elasticmoedeployments/status",
        "list pods",
        "delete pods",
        "get secrets",
        "create statefulsets.apps",
    )
    assert {
        one: may(OPERATOR_USER, one, "-n", narrow.namespace) for one in questions
    } == dict.fromkeys(questions, True)
    assert {one: may(OPERATOR_USER, one, "-n", namespace) for one in questions} == dict.fromkeys(
        questions, False
    )
    everywhere = ("list namespaces", "list customresourcedefinitions", "list nodes", "list pods")
    assert {one: may(OPERATOR_USER, one, "-A") for one in everywhere} == dict.fromkeys(
        everywhere, False
    )
    labels = ("-l", "app.kubernetes.io/name=elasticmoe-operator", "-o", "name")
    assert not kubectl("get", "clusterroles,clusterrolebindings", *labels).strip()
