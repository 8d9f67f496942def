"""What the API server refuses, with a line that says what to do; and who may do what."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from support.cluster import SYSTEM, Group, KubectlError, kubectl, manifest

ENGINE = manifest("x")["spec"]["template"]["spec"]["containers"][0]


def with_engine(**changes: Any) -> dict[str, Any]:
    template = copy.deepcopy(manifest("x")["spec"]["template"])
    template["spec"]["containers"] = [{**ENGINE, **changes}]
    return {"template": template}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"replicas": 0}, "replicas"),
        ({"minReplicas": 1}, "minReplicas"),
        ({"minReplicas": 5, "maxReplicas": 4}, "maxReplicas"),
        ({"scaling": {"prepareTimeoutSeconds": 299}}, "prepareTimeoutSeconds"),
        ({"scaling": {"lameDuckSeconds": 20, "drainTimeoutSeconds": 10}}, "drainTimeoutSeconds"),
        (with_engine(name="vllm"), "engine"),
        (with_engine(command=["bash", "-c", "vllm serve x"]), "vllm serve"),
        (with_engine(args=["m", "--data-parallel-size", "2"]), "data parallelism"),
        (with_engine(args=["m", "--data_parallel_rank=1"]), "data parallelism"),
        (with_engine(args=["m", "--headless"]), "headless"),
        (with_engine(args=["m", "--elastic-ep-max-dp-size", "4"]), "elastic-ep-max-dp-size"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_bad_spec_is_refused_in_words(
    shared_namespace: str, spec: dict[str, Any], words: str
) -> None:
    body = json.dumps(manifest("bad", **spec))
    with pytest.raises(KubectlError, match=words):
        kubectl("-n", shared_namespace, "apply", "--dry-run=server", "-f", "-", stdin=body)


def test_what_may_not_change_does_not(shared_group: Group) -> None:
    with pytest.raises(KubectlError, match="minReplicas"):
        shared_group.patch(minReplicas=3)
    with pytest.raises(KubectlError, match="replicas"):
        shared_group.scale(0)


def test_explain_teaches(shared_namespace: str) -> None:
    text = kubectl("explain", "emoe.spec.scaling.warmStandby")
    assert "DESCRIPTION" in text
    assert "warm" in text.lower()


def test_all_pods_are_admitted_as_restricted(shared_group: Group) -> None:
    """The namespace enforces it: pods that run were admitted. Nothing of ours asks for more."""
    for pod in [*shared_group.pods().values(), shared_group.coordinator_pod()]:
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
        assert not pod["spec"].get("hostNetwork")
        assert pod["spec"]["automountServiceAccountToken"] is False


def test_network_policies_select_the_group(shared_group: Group) -> None:
    """Their objects only: the network of a kind cluster does not enforce them."""
    ranks = shared_group.get("networkpolicy", "moe-ranks")["spec"]
    mine = {"elasticmoe.io/deployment": "moe", "app.kubernetes.io/component": "rank"}
    assert ranks["podSelector"]["matchLabels"] == mine
    assert ranks["ingress"][0] == {"from": [{"podSelector": {"matchLabels": mine}}]}
    coordinator = shared_group.get("networkpolicy", "moe-coordinator")["spec"]
    ports = [[one["port"] for one in rule["ports"]] for rule in coordinator["ingress"]]
    assert ports == [[7410], [7411]]


def may(account: str, verb: str, resource: str, namespace: str = "default") -> bool:
    try:
        said = kubectl("auth", "can-i", verb, resource, "-n", namespace, f"--as={account}")
    except KubectlError as error:
        said = str(error)
    return said.split()[-1] == "yes"


OPERATOR = f"system:serviceaccount:{SYSTEM}:elasticmoe-operator"


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("list", "secrets"),
        ("watch", "secrets"),
        ("delete", "secrets"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("get", "pods/log"),
        ("get", "nodes"),
        ("delete", "deployments.apps"),
        ("create", "rolebindings.rbac.authorization.k8s.io"),
        ("create", "clusterroles.rbac.authorization.k8s.io"),
        ("patch", "customresourcedefinitions.apiextensions.k8s.io"),
        ("delete", "elasticmoedeployments.elasticmoe.io"),
        ("impersonate", "users"),
    ],
)
def test_what_the_operator_may_not_do(chart: None, verb: str, resource: str) -> None:
    assert not may(OPERATOR, verb, resource)


def test_what_the_operator_needs_it_may(chart: None) -> None:
    """So that the table above is about the right account."""
    assert may(OPERATOR, "patch", "statefulsets.apps")
    assert may(OPERATOR, "get", "secrets")


@pytest.mark.parametrize("account", ["moe-ranks", "moe-coordinator"])
def test_ranks_and_coordinator_may_do_nothing(shared_group: Group, account: str) -> None:
    who = f"system:serviceaccount:{shared_group.namespace}:{account}"
    for resource in ("pods", "secrets", "elasticmoedeployments.elasticmoe.io"):
        for verb in ("get", "list", "create", "patch"):
            assert not may(who, verb, resource, shared_group.namespace)
