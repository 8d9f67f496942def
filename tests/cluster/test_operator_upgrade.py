"""Another version of the operator, another mode of it, and an autoscaler."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest
from cluster.conftest import helm, install
from support.cluster import SYSTEM, Group, eventually, kubectl, manifest

NEWER = "newer"


@pytest.fixture(scope="module")
def newer_image() -> None:
    """The same image under another tag, on all nodes."""
    docker = ["docker", "tag", "elasticmoe:dev", f"elasticmoe:{NEWER}"]
    subprocess.run(docker, check=True, capture_output=True)
    saved = subprocess.run(
        ["docker", "save", f"elasticmoe:{NEWER}"], check=True, capture_output=True
    ).stdout
    for node in kubectl("get", "nodes", "-o", "name").split():
        name = node.partition("/")[2]
        words = ["docker", "exec", "-i", name, "ctr", "-n", "k8s.io", "images", "import", "-"]
        subprocess.run(words, input=saved, check=True, capture_output=True)


@pytest.fixture
def old_version_again() -> Iterator[None]:
    yield
    install()


def images(group: Group) -> set[str]:
    """Images of the sidecars."""
    return {
        one["image"]
        for pod in group.pods().values()
        for one in pod["spec"]["initContainers"]
        if one["name"] == "elasticmoe-sidecar"
    }


def test_an_upgrade_in_a_resize_and_before_one_touches_no_rank(
    newer_image: None, old_version_again: None, group: Callable[..., Group]
) -> None:
    moe = group(env={"SIM_PREPARE_S": "4"})
    before = moe.uids()
    with moe.traffic() as users:
        moe.scale(3)
        moe.phase("CreatePods", "Resize")
        install("--set", f"image.tag={NEWER}")
        moe.settled(3, limit=120)
        moe.scale(4)
        moe.settled(4, limit=120)
        result = users.stop()
    assert result.failed == 0, result.errors
    uids = moe.uids()
    assert {name: uids[name] for name in before} == before
    assert moe.restarts() == 0
    assert images(moe) == {"elasticmoe:dev"}
    assert moe.status()["revision"]["image"] == "elasticmoe:dev"
    # What needs new pods anyway brings the new images.
    moe.with_engine(env=[{"name": "SIM_TOKEN_S", "value": "0.01"}])
    moe.phase("Drain", "CreatePods", "Start")
    moe.settled(4, limit=150)
    assert images(moe) == {f"elasticmoe:{NEWER}"}


def test_a_namespace_alone(namespace: str) -> None:
    """No right outside of it, and a group there works; one elsewhere is left alone."""
    helm("uninstall", "elasticmoe", "-n", SYSTEM, "--wait")
    elsewhere = Group("default", "elsewhere")
    try:
        install(
            *("--set", "watch.allNamespaces=false"),
            *("--set", f"watch.namespaces={{{namespace}}}"),
        )
        who = f"--as=system:serviceaccount:{SYSTEM}:elasticmoe-operator"
        for resource in ("pods", "namespaces", "customresourcedefinitions.apiextensions.k8s.io"):
            words = ("auth", "can-i", "list", resource, "-n", "default", who)
            done = subprocess.run(["kubectl", *words], capture_output=True, text=True)
            assert done.stdout.strip() == "no", resource
        elsewhere.apply(manifest("elsewhere"))
        moe = Group(namespace, "moe")
        moe.apply(manifest("moe"))
        moe.settled(2)
        moe.scale(3)
        moe.settled(3)
        assert not elsewhere.body().get("status")
        moe.kubectl("delete", "emoe", "moe", "--timeout=60s", limit=70)
    finally:
        elsewhere.kubectl("delete", "emoe", "elsewhere", "--ignore-not-found", "--timeout=30s")
        helm("uninstall", "elasticmoe", "-n", SYSTEM, "--wait")
        install()


def test_an_autoscaler_with_its_default_minimum_reads_the_group(
    group: Callable[..., Group],
) -> None:
    """There are no metrics here: what counts is that it finds target, replicas and selector."""
    moe = group()
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "moe"},
        "spec": {
            "maxReplicas": 4,
            "scaleTargetRef": {
                "apiVersion": "elasticmoe.io/v1alpha1",
                "kind": "ElasticMoEDeployment",
                "name": "moe",
            },
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {
                        "name": "cpu",
                        "target": {"type": "Utilization", "averageUtilization": 50},
                    },
                }
            ],
        },
    }
    moe.apply(scaler)

    def able() -> bool:
        said = moe.get("hpa", "moe").get("status", {})
        words = {one["type"]: one["status"] for one in said.get("conditions") or []}
        return words.get("AbleToScale") == "True" and said.get("currentReplicas") == 2

    eventually(able, 60, "the autoscaler reads the scale")
    moe.kubectl("delete", "hpa", "moe")
    moe.settled(2)
