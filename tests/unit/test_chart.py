"""The chart: values and their schema; with helm, what each switch renders; and what is made from
it: deploy/operator and docs/reference."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from elasticmoe_operator import names
from elasticmoe_operator.clients import kubernetes
from support import helm

ROOT = helm.ROOT
VALUES = yaml.safe_load((helm.CHART / "values.yaml").read_text())
SCHEMA = json.loads((helm.CHART / "values.schema.json").read_text())
CHART = yaml.safe_load((helm.CHART / "Chart.yaml").read_text())
CRD_FILE = helm.CHART / "files" / "crd.yaml"
NAMESPACED: dict[str, Any] = {"watch": {"allNamespaces": False, "namespaces": ["red", "blue"]}}
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace"}

needs_helm = pytest.mark.cluster


def script(name: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / "scripts" / name), "--check"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


# --- files ----------------------------------------------------------------------------------------


def differences(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    """Values that the schema doesn't know, and the other way round."""
    known = schema.get("properties")
    if schema["type"] != "object" or known is None:
        return
    if schema.get("additionalProperties") is not False and path != "global":
        yield f"{path}: the schema takes anything"
    for name in known.keys() ^ value.keys():
        # Kubernetes knows it, and few need it.
        if f"{path}.{name}" != "resources.claims":
            yield f"{path}.{name}"
    for name in known.keys() & value.keys():
        yield from differences(known[name], value[name], f"{path}.{name}".lstrip("."))


def test_schema_and_values_know_the_same() -> None:
    assert list(differences(SCHEMA, VALUES)) == []


def test_versions_are_those_of_the_product() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert CHART["version"] == CHART["appVersion"] == project["version"]


def test_the_reference_is_up_to_date() -> None:
    done = script("reference-docs")
    assert done.returncode == 0, done.stderr


def test_the_plain_crd_is_the_one_of_the_chart() -> None:
    plain = (ROOT / "deploy" / "operator" / "crd.yaml").read_text()
    assert plain.endswith(CRD_FILE.read_text())


# --- with helm ------------------------------------------------------------------------------------


@needs_helm
@pytest.mark.parametrize("values", [{}, NAMESPACED], ids=["cluster", "namespaces"])
def test_helm_finds_no_fault(values: dict[str, Any]) -> None:
    assert "0 chart(s) failed" in helm.lint(values)


@needs_helm
def test_the_plain_manifests_are_up_to_date() -> None:
    done = script("deploy-manifests")
    assert done.returncode == 0, done.stderr


@needs_helm
def test_crd() -> None:
    crd = helm.named(helm.template(), "CustomResourceDefinition")
    assert crd["spec"] == yaml.safe_load(CRD_FILE.read_text())["spec"]
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    crd = helm.named(helm.template({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert "annotations" not in crd["metadata"]
    kinds = {one["kind"] for one in helm.template({"crds": {"install": False}})}
    assert "CustomResourceDefinition" not in kinds


RULES = {
    "elasticmoe.io/elasticmoedeployments": "get list watch patch",
    "elasticmoe.io/elasticmoedeployments/status": "get patch",
    "elasticmoe.io/elasticmoedeployments/finalizers": "update",
    "/events": "create patch",
    "/pods": "get list watch patch delete",
    "apps/deployments": "get list watch create patch",
    "apps/statefulsets": "get list watch create patch delete",
    "/configmaps": "get create patch",
    "/secrets": "get create patch",
    "/serviceaccounts": "get create patch",
    "/services": "get create patch",
    "policy/poddisruptionbudgets": "get create patch",
    "networking.k8s.io/networkpolicies": "get create patch",
}
"""In each namespace that is watched."""
SCANNING = {
    "/namespaces": "get list watch",
    "apiextensions.k8s.io/customresourcedefinitions": "get list watch",
}


def rights(role: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for rule in role["rules"]:
        assert set(rule) == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                key = f"{group}/{resource}"
                assert key not in found
                found[key] = " ".join(rule["verbs"])
    return found


def test_there_are_rights_to_all_kinds_that_the_operator_writes() -> None:
    known = {key.rpartition("/")[2] for key in RULES}
    assert set(kubernetes._PLURALS.values()) <= known


def subject() -> dict[str, str]:
    return {
        "kind": "ServiceAccount",
        "name": "elasticmoe-operator",
        "namespace": helm.NAMESPACE,
    }


@needs_helm
def test_rights_in_the_whole_cluster() -> None:
    objects = helm.template()
    role = helm.named(objects, "ClusterRole", "elasticmoe-operator")
    assert rights(role) == RULES | SCANNING
    binding = helm.named(objects, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == "elasticmoe-operator"
    assert binding["subjects"] == [subject()]
    assert not [one for one in objects if one["kind"] in ("Role", "RoleBinding")]


@needs_helm
def test_rights_in_some_namespaces() -> None:
    objects = helm.template(NAMESPACED)
    assert {one["kind"] for one in objects} & CLUSTER_SCOPED == {"CustomResourceDefinition"}
    roles = [one for one in objects if one["kind"] == "Role"]
    bindings = [one for one in objects if one["kind"] == "RoleBinding"]
    for found in (roles, bindings):
        assert [one["metadata"]["namespace"] for one in found] == ["red", "blue"]
    assert all(rights(one) == RULES for one in roles)
    assert all(one["roleRef"]["kind"] == "Role" for one in bindings)
    assert all(one["subjects"] == [subject()] for one in bindings)


@needs_helm
def test_nobody_gets_a_wildcard() -> None:
    for one in helm.template():
        for rule in one.get("rules") or ():
            words = [word for part in rule.values() for word in part]
            assert not any("*" in word for word in words), one["metadata"]["name"]


@needs_helm
def test_users_get_roles_that_add_to_view_and_edit() -> None:
    objects = helm.template()
    for name, added, verbs in (
        ("viewer", {"view", "edit", "admin"}, "get list watch"),
        (
            "editor",
            {"edit", "admin"},
            "get list watch create update patch delete deletecollection",
        ),
    ):
        role = helm.named(objects, "ClusterRole", f"elasticmoe-operator-{name}")
        prefix = "rbac.authorization.k8s.io/aggregate-to-"
        labels = role["metadata"]["labels"]
        assert {one.removeprefix(prefix) for one in labels if one.startswith(prefix)} == added
        assert rights(role)["elasticmoe.io/elasticmoedeployments"] == verbs
        # Its status is the operator's record of what it has begun.
        assert rights(role)["elasticmoe.io/elasticmoedeployments/status"] == "get"
    without = helm.template({"rbac": {"userRoles": False}})
    assert len([one for one in without if one["kind"] == "ClusterRole"]) == 1


@needs_helm
def test_without_rights_and_account() -> None:
    values = {
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "mine"},
    }
    objects = helm.template(values)
    kinds = {one["kind"] for one in objects}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding", "Role", "ServiceAccount"}
    pod = helm.named(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "mine"
    with pytest.raises(helm.HelmError, match=r"give serviceAccount\.name"):
        helm.template({"serviceAccount": {"create": False}})


@needs_helm
def test_the_operator_never_runs_twice() -> None:
    spec = helm.named(helm.template(), "Deployment")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}


@needs_helm
def test_the_pod_is_restricted() -> None:
    pod = helm.named(helm.template(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": names.USER,
        "runAsGroup": names.USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [list(one)[1] for one in pod["volumes"]] == ["emptyDir"]
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


@needs_helm
def test_arguments() -> None:
    container = helm.operator_container(helm.template())
    assert container["args"][0] == "operator"
    assert helm.options(container) == {
        "operator": [],
        "--image": ["elasticmoe:0.1.0"],
        "--all-namespaces": [],
        "--image-pull-policy": ["IfNotPresent"],
        "--network-policy": [],
        "--log-format": ["json"],
        "--log-level": ["info"],
        "--health-port": ["8080"],
        "--metrics-port": ["8081"],
    }
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"health": 8080, "metrics": 8081}
    probe = container["livenessProbe"]["httpGet"]
    assert (probe["path"], probe["port"]) == ("/healthz", "health")
    fields = {one["name"]: one["valueFrom"]["fieldRef"]["fieldPath"] for one in container["env"]}
    assert fields == {"POD_NAMESPACE": "metadata.namespace", "POD_NAME": "metadata.name"}


@needs_helm
def test_other_arguments() -> None:
    values = NAMESPACED | {
        "imagePullSecrets": ["one", "two"],
        "image": {"pullPolicy": "Always"},
        "networkPolicies": {"groups": {"create": False}},
        "log": {"format": "plain", "level": "debug"},
        "extraArgs": ["--more"],
        "extraEnv": [{"name": "A", "value": "b"}],
    }
    objects = helm.template(values)
    container = helm.operator_container(objects)
    given = helm.options(container)
    assert given["--namespace"] == ["red", "blue"]
    assert "--all-namespaces" not in given
    assert given["--image-pull-secret"] == ["one", "two"]
    assert given["--image-pull-policy"] == [container["imagePullPolicy"]] == ["Always"]
    assert "--no-network-policy" in given
    assert "--network-policy" not in given
    assert (given["--log-format"], given["--log-level"]) == (["plain"], ["debug"])
    assert container["args"][-1] == "--more"
    assert {"name": "A", "value": "b"} in container["env"]
    pod = helm.named(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]


DIGEST = "sha256:" + "0a" * 32


@needs_helm
@pytest.mark.parametrize(
    ("values", "image"),
    [
        ({"image": {"tag": "v9"}}, "elasticmoe:v9"),
        ({"image": {"tag": "v9", "digest": DIGEST}}, f"elasticmoe@{DIGEST}"),
        ({"global": {"imageRegistry": "r.example/team/"}}, "r.example/team/elasticmoe:0.1.0"),
        ({"image": {"repository": "r.example/moe"}}, "r.example/moe:0.1.0"),
    ],
)
def test_image(values: dict[str, Any], image: str) -> None:
    container = helm.operator_container(helm.template(values))
    assert container["image"] == image
    assert helm.options(container)["--image"] == [image]


@needs_helm
def test_where_the_pod_runs() -> None:
    placed = {
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "k", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
    }
    more = {"podAnnotations": {"a": "1"}, "podLabels": {"team": "x", names.NAME: "other"}}
    template = helm.named(helm.template(placed | more), "Deployment")["spec"]["template"]
    for key, value in placed.items():
        assert template["spec"][key] == value
    assert template["metadata"]["annotations"] == {"a": "1"}
    assert template["metadata"]["labels"]["team"] == "x"
    # The groups' NetworkPolicies let in the pods of this name.
    assert template["metadata"]["labels"][names.NAME] == names.OPERATOR_APP


@needs_helm
@pytest.mark.parametrize("release", ["elasticmoe", "moe"])
def test_all_that_selects_the_pod_finds_it(release: str) -> None:
    values = {"metrics": {"operator": {"serviceMonitor": {"create": True}}}}
    objects = helm.template(values, release)
    deployment = helm.named(objects, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    service = helm.named(objects, "Service")
    policy = helm.named(objects, "NetworkPolicy")
    monitor = helm.named(objects, "ServiceMonitor")
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels
    matched = monitor["spec"]["selector"]["matchLabels"].items()
    assert matched <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]


@needs_helm
def test_who_reaches_the_operator() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}
    policies = {"operator": {"metricsFrom": [peer]}}
    spec = helm.named(helm.template({"networkPolicies": policies}), "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    health, metrics = spec["ingress"]
    assert health == {"ports": [{"port": "health", "protocol": "TCP"}]}
    assert metrics == {"ports": [{"port": "metrics", "protocol": "TCP"}], "from": [peer]}
    policies = {"operator": {"create": False}}
    kinds = {one["kind"] for one in helm.template({"networkPolicies": policies})}
    assert "NetworkPolicy" not in kinds


@needs_helm
def test_no_monitors_unless_asked_for() -> None:
    kinds = {one["kind"] for one in helm.template()}
    assert not kinds & {"ServiceMonitor", "PodMonitor"}
    off = {"metrics": {"operator": {"service": {"create": False}}}}
    assert "Service" not in {one["kind"] for one in helm.template(off)}
    off["metrics"]["operator"]["serviceMonitor"] = {"create": True}
    with pytest.raises(helm.HelmError, match="needs the Service"):
        helm.template(off)


@needs_helm
@pytest.mark.parametrize("values", [{}, NAMESPACED], ids=["cluster", "namespaces"])
def test_monitor_of_the_ranks(values: dict[str, Any]) -> None:
    wanted = {"create": True, "interval": "5s", "labels": {"release": "prometheus"}}
    objects = helm.template(values | {"metrics": {"ranks": {"podMonitor": wanted}}})
    monitor = helm.named(objects, "PodMonitor", "elasticmoe-operator-ranks")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    spec = monitor["spec"]
    selected = spec["selector"]["matchLabels"].items()
    assert selected <= names.labels("any", names.RANK).items()
    assert len(selected) == 2
    watched = {"matchNames": ["red", "blue"]} if values else {"any": True}
    assert spec["namespaceSelector"] == watched
    assert spec["podTargetLabels"] == [names.DEPLOYMENT]
    sidecar, engine = spec["podMetricsEndpoints"]
    assert (sidecar["port"], sidecar["interval"]) == ("metrics", "5s")
    assert engine["port"] == "http"
    (relabeling,) = engine["relabelings"]
    label = names.ACTIVE.replace(".", "_").replace("/", "_")
    assert relabeling["sourceLabels"] == [f"__meta_kubernetes_pod_label_{label}"]
    assert relabeling["action"] == "keep"


@needs_helm
def test_monitor_of_the_operator_without_a_service() -> None:
    operator = {"service": {"create": False}, "podMonitor": {"create": True}}
    objects = helm.template({"metrics": {"operator": operator}})
    monitor = helm.named(objects, "PodMonitor")
    labels = helm.named(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"


@needs_helm
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"wach": {}}, "additional properties 'wach' not allowed"),
        ({"log": {"levle": "info"}}, "'/log': additional properties 'levle' not allowed"),
        ({"log": {"level": "loud"}}, "'/log/level': value must be one of 'debug', 'info'"),
        ({"crds": {"keep": "yes"}}, "'/crds/keep': got string, want boolean"),
        ({"imagePullSecrets": [{"name": "x"}]}, "got object, want string"),
        ({"watch": {"namespaces": ["red"]}}, "set watch.allNamespaces to false too"),
        ({"watch": {"allNamespaces": False}}, "name the namespaces to watch"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_value_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(helm.HelmError) as refused:
        helm.template(values)
    assert words in str(refused.value)


@needs_helm
def test_a_parent_chart_may_have_more_globals() -> None:
    assert helm.template({"global": {"imageRegistry": "", "storageClass": "fast"}})


@needs_helm
def test_an_old_kubernetes_is_refused() -> None:
    with pytest.raises(helm.HelmError, match=r"requires kubeVersion: >=1\.29"):
        helm.template({}, "elasticmoe", "--kube-version", "1.28.0")


@needs_helm
def test_deploy_installs_what_the_chart_does() -> None:
    text = (ROOT / "deploy" / "operator" / "operator.yaml").read_text()
    plain = list(yaml.safe_load_all(text))
    chart = [one for one in helm.template() if one["kind"] != "CustomResourceDefinition"]
    assert [one["kind"] for one in plain] == ["Namespace", *(one["kind"] for one in chart)]
    assert not any("helm.sh/chart" in one["metadata"].get("labels", {}) for one in plain)
