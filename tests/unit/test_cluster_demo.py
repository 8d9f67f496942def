"""The demo in a cluster: what it applies, what it reads out of a status, what it says."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from elasticmoe_cli import cluster_demo, traffic
from elasticmoe_cli import cluster_figures as figures
from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.kubectl import Kubectl
from elasticmoe_cli.load import Result
from elasticmoe_vllm_cpu import flags
from rich.console import Console
from support.local import elasticmoe

PLAN = cluster_demo.Plan(vllm_cpu=Path("/cache/vllm-cpu"), engine_image="base:1")


def objects(plan: cluster_demo.Plan) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(cluster_demo.manifest(plan))}


def engine(plan: cluster_demo.Plan) -> dict[str, Any]:
    (found,) = objects(plan)["ElasticMoEDeployment"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


# --- what is applied ------------------------------------------------------------------------------


def test_real_vllm_is_started_as_everywhere_else() -> None:
    found = engine(PLAN)
    assert "command" not in found
    words = found["args"]
    assert words[0] == "/cache/vllm-cpu/tiny-model"
    at = words.index("--eplb-config")
    assert words[1:at] == flags.model_flags()
    assert json.loads(words[at + 1]) == flags.EPLB_CONFIG
    assert len(words) == at + 2
    environment = {one["name"]: one["value"] for one in found["env"]}
    assert environment.items() >= flags.ENVIRONMENT.items()
    assert environment["PATH"].startswith("/cache/vllm-cpu/bin:")
    assert environment["PYTHONPATH"] == "/opt/elasticmoe/plugin"


def test_real_vllm_is_mounted_where_it_was_made() -> None:
    found = objects(PLAN)
    mounts = {one["name"]: one for one in engine(PLAN)["volumeMounts"]}
    assert mounts["vllm-cpu"] == {
        "name": "vllm-cpu",
        "mountPath": "/cache/vllm-cpu",
        "readOnly": True,
    }
    volume, claim = found["PersistentVolume"], found["PersistentVolumeClaim"]
    assert volume["spec"]["hostPath"]["path"] == cluster_demo.ON_NODES
    assert volume["metadata"]["name"] == claim["spec"]["volumeName"] == cluster_demo.VOLUME
    assert volume["spec"]["claimRef"] == {
        "namespace": claim["metadata"]["namespace"],
        "name": claim["metadata"]["name"],
    }


@pytest.mark.parametrize("name", ["vllm-cpu", "sim"])
def test_everything_is_in_a_namespace_that_enforces_restricted(name: str) -> None:
    plan = cluster_demo.Plan(engine=name, vllm_cpu=Path("/cache/vllm-cpu"))
    found = objects(plan)
    namespace, group = found["Namespace"], found["ElasticMoEDeployment"]
    assert namespace["metadata"]["name"] == cluster_demo.NAMESPACE
    enforced = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert enforced == "restricted"
    assert group["metadata"]["namespace"] == cluster_demo.NAMESPACE
    assert group["metadata"]["name"] == cluster_demo.NAME
    assert group["spec"]["replicas"] == cluster_demo.SIZES[0]
    assert group["spec"]["maxReplicas"] >= max(cluster_demo.SIZES)
    volumes = group["spec"]["template"]["spec"]["volumes"]
    assert not [one for one in volumes if "hostPath" in one]
    assert "$" not in cluster_demo.manifest(plan).split("apiVersion", 1)[1]


def test_it_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTICMOE_CACHE", "/cache")
    done = elasticmoe("demo", "--cluster", "--print", "--engine-image", "base:1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == cluster_demo.manifest(PLAN)


def test_the_load_goes_to_the_service() -> None:
    text = (Path(__file__).parents[2] / "deploy" / "demo" / "load.yaml").read_text()
    pod = yaml.safe_load(figures.render(text, {"IMAGE": "moe:1", "CLIENTS": "4"}))
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "moe:1"
    words = container["args"]
    assert words[words.index("--url") + 1] == f"http://{cluster_demo.NAME}:8000"
    assert words[words.index("--clients") + 1] == "4"
    assert words[words.index("--model") + 1] == flags.SERVED_MODEL_NAME


@pytest.mark.parametrize(
    ("image", "values"),
    [
        ("elasticmoe:dev", ["image.repository=elasticmoe", "image.tag=dev"]),
        ("host:5000/a/moe:1", ["image.repository=host:5000/a/moe", "image.tag=1"]),
        ("a/moe@sha256:ab", ["image.repository=a/moe", "image.digest=sha256:ab"]),
        ("moe:1@sha256:ab", ["image.repository=moe", "image.tag=1", "image.digest=sha256:ab"]),
    ],
)
def test_an_image_as_values_of_the_chart(image: str, values: list[str]) -> None:
    assert figures.image_values(image) == [w for one in values for w in ("--set-string", one)]


@pytest.mark.parametrize("image", ["moe", "host:5000/moe", ":1", ""])
def test_an_image_without_a_tag_is_refused(image: str) -> None:
    with pytest.raises(CommandFailed, match="tag"):
        figures.image_values(image)


# --- what is read ---------------------------------------------------------------------------------


def status(size: int, **more: Any) -> dict[str, Any]:
    widths = ("desiredReplicas", "createdReplicas", "replicas", "readyReplicas")
    return {**dict.fromkeys(widths, size), "history": [], **more}


def operation(name: str, to: int, result: str = "Succeeded") -> dict[str, Any]:
    phases = [
        {"name": "CreatePods", "seconds": 18.7},
        {"name": "Resize", "seconds": 28.6},
        {"name": "Ready", "seconds": 0.1},
    ]
    return {"id": name, "kind": "ScaleUp", "from": 2, "to": to, "result": result, "phases": phases}


def test_a_resize_has_ended_when_nothing_is_left_to_do() -> None:
    history = [operation("old", 3), operation("new", 3)]
    assert figures.ended(status(3, history=history), 3, {"old"}) == history[1]
    assert figures.ended(status(3, history=history), 3, {"old", "new"}) is None
    assert figures.ended(status(3, history=history, readyReplicas=2), 3, {"old"}) is None
    assert figures.ended(status(3, history=history, operation={"id": "x"}), 3, {"old"}) is None
    failed = [operation("new", 3, "Failed")]
    assert figures.ended(status(3, history=failed), 3, set()) is None
    assert figures.ended({}, 3, set()) is None
    assert figures.ids(status(3, history=history)) == {"old", "new"}


def test_a_step_is_of_both_operations() -> None:
    inner = [{"phase": "prepare", "seconds": 25.0}, {"phase": "commit", "seconds": 2.0}]
    group = {"history": [{"id": "other", "phases": []}, {"id": "new", "phases": inner}]}
    step = figures.step(operation("new", 3), group, 50.0)
    assert (step.before, step.after, step.total_s) == (2, 3, 50.0)
    assert (step.create_s, step.prepare_s, step.commit_s, step.remove_s) == (18.7, 25.0, 2.0, 0.0)
    assert figures.sentence(step) == (
        "2 → 3 in 50.0 s (create pods 18.7, prepare 25.0, commit 2.0, ready 0.1)"
    )
    unknown = figures.step(operation("new", 3), {"history": []}, 50.0)
    assert "resize 28.6" in figures.sentence(unknown)


def test_the_figures_have_those_of_the_demo_on_a_host() -> None:
    report = figures.Report("sim", requests=9, start_s=1.0)
    report.resizes.append(figures.step(operation("new", 3), {"history": []}, 50.0))
    found = report.as_json()
    assert found.keys() >= {
        "engine",
        "steps",
        "requests",
        "failed",
        "longest_gap_s",
        "output_mismatches",
    }
    (step,) = found["steps"]
    assert step.keys() >= {"from", "to", "total_s", "prepare_s", "commit_s"}
    assert step["total_s"] == 50.0


def test_ready_ranks_are_asked() -> None:
    ranks = [
        {"address": "10.0.0.1", "servingPort": 8000, "ready": True},
        {"address": "10.0.0.2", "servingPort": 8000, "ready": False},
        {"address": "fd00::1", "servingPort": 8000, "ready": True},
    ]
    urls = figures.ready_ranks({"instances": ranks})
    assert urls == ["http://10.0.0.1:8000", "http://[fd00::1]:8000"]


# --- what is said ---------------------------------------------------------------------------------


def said(what: Any) -> str:
    console = Console(file=StringIO(), width=80)
    console.print(what)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_view() -> None:
    running = {
        "kind": "ScaleUp",
        "from": 2,
        "to": 3,
        "phase": "Resize",
        "groupPhase": "prepare",
        "startedAt": "2026-11-25T01:55:10.679Z",
        "message": "",
    }
    available = [{"type": "Available", "status": "True"}]
    totals = traffic.totals([Result(requests=7, chunks=70, longest_gap_s=1.0)])
    text = said(
        figures.view(
            "tiny",
            status(2, desiredReplicas=3, operation=running, conditions=available),
            totals,
        )
    )
    assert "tiny  Available  desired 3, created 2, registered 0, active 2, ready 2" in text
    assert "scale up 2 → 3" in text
    assert "resize: prepare" in text
    assert "7 requests, 0 failed, 70 chunks, longest gap 1.00 s" in text
    assert max(map(len, text.splitlines())) <= 80
    early = said(figures.view("tiny", {}, None))
    assert "not yet available" in early


def test_the_table_fits() -> None:
    report = figures.Report("vllm-cpu")
    report.resizes.append(figures.step(operation("new", 3), {"history": []}, 50.0))
    text = said(figures.table(report))
    assert "2 → 3" in text
    assert "18.70" in text
    assert max(map(len, text.splitlines())) <= 80


def test_totals_of_several_kinds_of_users() -> None:
    one = Result(requests=2, failed=1, chunks=20, longest_gap_s=0.5, errors=Counter({"a": 1}))
    other = Result(requests=3, failed=1, chunks=30, longest_gap_s=1.5, errors=Counter({"a": 1}))
    assert traffic.totals([one, other], ended=True) == {
        "requests": 5,
        "failed": 2,
        "chunks": 50,
        "longest_gap_s": 1.5,
        "errors": {"a": 2},
        "ended": True,
    }


# --- kubectl --------------------------------------------------------------------------------------


def test_commands_are_shown_as_one_types_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "kubectl"
    program.write_text(
        '#!/bin/sh\necho "$*"\n[ "$5" != bad ] || { echo no such thing >&2; exit 1; }\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    console = Console(file=StringIO(), width=40)
    kubectl = Kubectl(console, "moe", "kind")
    answer = asyncio.run(kubectl("apply", "-f", "-", stdin="x", source="file.yaml"))
    assert answer == "--context kind --namespace moe apply -f -\n"
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown == "$ kubectl --context kind --namespace moe apply -f - < file.yaml\n"
    with pytest.raises(CommandFailed, match="no such thing"):
        asyncio.run(kubectl("bad"))


def test_without_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandFailed, match="kubectl is not installed"):
        asyncio.run(Kubectl(Console(file=StringIO()), "moe")("get", "nodes"))
