"""What the operator and the groups' pods may not do, asked of the API server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.cluster import SYSTEM, Group, kubectl
from support.release import OPERATOR_USER, may

MAY = [
    "patch elasticmoedeployments",
    "patch elasticmoedeployments/status",
    "create statefulsets.apps",
    "delete pods",
    "get secrets",
    "create events",
]
MAY_NOT = [
    "list secrets",
    "watch secrets",
    "delete secrets",
    "create pods",
    "create pods/exec",
    "create pods/portforward",
    "get pods/log",
    "impersonate users",
    "create pods/ephemeralcontainers",
    "create serviceaccounts/token",
    "impersonate serviceaccounts",
    "list nodes",
    "get nodes",
    "patch nodes",
    "delete namespaces",
    "delete elasticmoedeployments",
    "create elasticmoedeployments",
    "list configmaps",
    "create roles.rbac.authorization.k8s.io",
    "create clusterrolebindings.rbac.authorization.k8s.io",
    "patch customresourcedefinitions.apiextensions.k8s.io",
    "create daemonsets.apps",
    "delete deployments.apps",
    "list persistentvolumes",
]


def test_the_operator_may_do_its_work_and_no_more(chart: None) -> None:
    asked = {one: may(OPERATOR_USER, one, "-n", "default") for one in (*MAY, *MAY_NOT)}
    assert asked == {**dict.fromkeys(MAY, True), **dict.fromkeys(MAY_NOT, False)}


@pytest.mark.parametrize("account", ["moe-ranks", "moe-coordinator"])
def test_pods_of_a_group_may_do_nothing(shared_group: Group, account: str) -> None:
    namespace = shared_group.namespace
    user = f"system:serviceaccount:{namespace}:{account}"
    questions = ["get pods", "list secrets", "get configmaps", "patch elasticmoedeployments"]
    assert not any(may(user, one, "-n", namespace) for one in questions)
    shared_group.get("serviceaccount", account)


def test_pods_of_a_group_carry_no_token(shared_group: Group) -> None:
    for pod in (*shared_group.pods().values(), shared_group.coordinator_pod()):
        assert pod["spec"]["automountServiceAccountToken"] is False
        volumes = [one["name"] for one in pod["spec"]["volumes"]]
        assert not [one for one in volumes if one.startswith("kube-api-access")]


def test_only_the_sidecar_reads_keys_and_only_its_part(shared_group: Group) -> None:
    for pod in shared_group.pods().values():
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        secret = volumes["elasticmoe-keys"]["secret"]
        assert [one["key"] for one in secret["items"]] == ["sidecar.json"]
        every = [*pod["spec"]["containers"], *pod["spec"]["initContainers"]]
        mounts = {one["name"]: {mount["name"] for mount in one["volumeMounts"]} for one in every}
        readers = [name for name, found in mounts.items() if "elasticmoe-keys" in found]
        assert readers == ["elasticmoe-sidecar"]


def test_everything_runs_as_pod_security_restricted_asks(shared_group: Group) -> None:
    # The namespace enforces it, so the pods would not be there; the operator's own has no such one.
    words = ("get", "pods", "-l", "app.kubernetes.io/name=elasticmoe-operator", "-o", "json")
    (operator,) = json.loads(kubectl("-n", SYSTEM, *words))["items"]
    for pod in (operator, shared_group.coordinator_pod(), *shared_group.pods().values()):
        every = [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
        for container in every:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]
            if container["name"] != "engine":  # the user's own
                assert context["readOnlyRootFilesystem"] is True


def test_network_policies_select_the_group_and_let_in_who_has_to(shared_group: Group) -> None:
    """The network plugin of a kind cluster enforces none, so this is about what they say."""

    def pods(component: str) -> dict[str, Any]:
        labels = {
            "app.kubernetes.io/component": component,
            "elasticmoe.io/deployment": shared_group.name,
        }
        return {"podSelector": {"matchLabels": labels}}

    ranks = shared_group.get("networkpolicy", "moe-ranks")["spec"]
    assert {"podSelector": ranks["podSelector"]} == pods("rank")
    assert ranks["policyTypes"] == ["Ingress"]
    assert {"from": [pods("rank")]} in ranks["ingress"]
    open_ports = [
        {port["port"] for port in one["ports"]} for one in ranks["ingress"] if "from" not in one
    ]
    assert open_ports == [{8000, 7413}]

    coordinator = shared_group.get("networkpolicy", "moe-coordinator")["spec"]
    assert {"podSelector": coordinator["podSelector"]} == pods("coordinator")
    by_port = {one["ports"][0]["port"]: one["from"] for one in coordinator["ingress"]}
    assert by_port[7410] == [pods("rank")]
    (operator,) = by_port[7411]
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": SYSTEM}
    ((label, value),) = operator["podSelector"]["matchLabels"].items()
    assert kubectl("-n", SYSTEM, "get", "pods", "-l", f"{label}={value}", "-o", "name")
