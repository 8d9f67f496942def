"""What the project ships is taken by a real API server: the chart's objects, deploy/, examples."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from support import helm
from support.cluster import KubectlError, kubectl

EXAMPLES = sorted(
    path
    for path in (helm.ROOT / "deploy" / "examples").glob("*.yaml")
    # KEDA brings the resource that its example is of.
    if path.stem != "keda"
)
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "namespaces": {"watch": {"allNamespaces": False, "namespaces": ["default", "kube-public"]}},
    "no rights": {"rbac": {"create": False}},
    "no policies": {
        "networkPolicies": {"operator": {"create": False}, "groups": {"create": False}}
    },
}


def taken(objects: list[dict[str, Any]], *words: str) -> list[str]:
    """Kinds that the API server would take, each field known. Raises KubectlError."""
    stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    told = kubectl(
        *("apply", "--dry-run=server", "--validate=strict", *words, "-o", "name", "-f", "-"),
        stdin=stdin,
    )
    return [line.partition("/")[0].partition(".")[0] for line in told.split()]


def without_namespaces(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A dry run makes none, so what is in them goes to the one given."""
    for one in objects:
        one["metadata"].pop("namespace", None)
    return [one for one in objects if one["kind"] != "Namespace"]


@pytest.mark.parametrize("case", VALUES)
def test_the_charts_objects_are_taken(namespace: str, case: str) -> None:
    objects = helm.template(VALUES[case], "other")
    kinds = [one["kind"].lower() for one in objects]
    assert taken(objects) == kinds
    assert "deployment" in kinds


def test_the_plain_manifests_are_taken(namespace: str) -> None:
    built = kubectl("kustomize", str(helm.ROOT / "deploy" / "operator"))
    objects = list(yaml.safe_load_all(built))
    assert taken(objects) == [one["kind"].lower() for one in objects]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_taken(namespace: str, path: Any) -> None:
    objects = without_namespaces(list(yaml.safe_load_all(path.read_text())))
    assert taken(objects, "-n", namespace) == [one["kind"].lower() for one in objects]


def test_a_field_that_is_not_known_is_refused(namespace: str) -> None:
    (example,) = (one for one in EXAMPLES if one.stem == "deepseek-v3-multinode")
    (body,) = yaml.safe_load_all(example.read_text())
    body["spec"]["scaling"]["warmStandbys"] = 1
    with pytest.raises(KubectlError, match="unknown field"):
        taken([body], "-n", namespace)
