"""The CRD: what it refuses and in which words, its defaults, and the examples in deploy/.

An API server would tell best, and does in the tests on a cluster. Here a small reading of the
schema and a CEL evaluator stand for it.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import celpy
import pytest
import yaml
from elasticmoe_engine import command
from elasticmoe_operator import names
from elasticmoe_operator.core import conditions
from elasticmoe_operator.core import operation as ops
from elasticmoe_operator.core import spec as specs

ROOT = Path(__file__).parents[2]
CRD = yaml.safe_load((ROOT / "charts" / "elasticmoe" / "files" / "crd.yaml").read_text())
VERSION = CRD["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
MODEL = "org/model"

Schema = dict[str, Any]


# --- what an API server does ----------------------------------------------------------------------


def defaulted(schema: Schema, value: Any) -> Any:
    """A copy with the defaults put in."""
    if isinstance(value, list):
        return [defaulted(schema.get("items", {}), one) for one in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, one in schema.get("properties", {}).items():
        if name not in filled and "default" in one:
            filled[name] = copy.deepcopy(one["default"])
        if name in filled:
            filled[name] = defaulted(one, filled[name])
    return filled


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}


def problems(schema: Schema, value: Any, old: Any = None, path: str = "") -> Iterator[str]:
    """What is wrong with a value, one line each: "path: message"."""
    if "type" in schema and not isinstance(value, TYPES[schema["type"]]):
        yield f"{path}: not of type {schema['type']}"
        return
    yield from out_of_limits(schema, value, path)
    for rule in schema.get("x-kubernetes-validations", []):
        if not holds(rule["rule"], value, old):
            yield f"{path}{rule.get('fieldPath', '')}: {rule['message']}"
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from problems(schema["items"], one, None, f"{path}[{number}]")
    elif isinstance(value, dict):
        known = schema.get("properties", {})
        for name, one in value.items():
            before = old.get(name) if isinstance(old, dict) else None
            if name in known:
                yield from problems(known[name], one, before, f"{path}.{name}")
            elif "additionalProperties" in schema:
                yield from problems(schema["additionalProperties"], one, None, f"{path}.{name}")
            elif not (schema.get("x-kubernetes-preserve-unknown-fields") or path == ".metadata"):
                yield f"{path}.{name}: unknown field"


def out_of_limits(schema: Schema, value: Any, path: str) -> Iterator[str]:
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: not one of {schema['enum']}"
    least, most = schema.get("minimum"), schema.get("maximum")
    if (least is not None and value < least) or (most is not None and value > most):
        yield f"{path}: out of its limits"
    if isinstance(value, str) and len(value) > schema.get("maxLength", len(value)):
        yield f"{path}: too long"
    if isinstance(value, list) and len(value) > schema.get("maxItems", len(value)):
        yield f"{path}: too many items"
    for name in schema.get("required", []):
        if name not in value:
            yield f"{path}.{name}: required"


def holds(rule: str, value: Any, old: Any) -> bool:
    """A CEL rule; one that compares with the old value holds for what is new."""
    if "oldSelf" in rule and old is None:
        return True
    known = {"self": celpy.json_to_cel(value)}
    if old is not None:
        known["oldSelf"] = celpy.json_to_cel(old)
    return bool(program(rule).evaluate(known))


@functools.cache
def program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def refused(group: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
    """What an API server would say to a group that is made, or that was `before`."""
    old = defaulted(SCHEMA, before) if before else None
    return list(problems(SCHEMA, defaulted(SCHEMA, group), old))


# --- groups ---------------------------------------------------------------------------------------


def group(name: str = "qwen", *, engine: dict[str, Any] | None = None, **spec: Any) -> Any:
    """A group with an engine; spec: other fields of the spec."""
    container = {"name": "engine", "image": "vllm/vllm-openai:v0.33.0"}
    container |= {"args": [MODEL]} if engine is None else engine
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"template": {"spec": {"containers": [container]}}, **spec},
    }


def pod(**spec: Any) -> Any:
    """A group whose pod template has these fields too."""
    found = group()
    found["spec"]["template"]["spec"] |= spec
    return found


def with_args(*words: str) -> Any:
    return group(engine={"args": [MODEL, *words]})


def with_command(*words: str, **more: Any) -> Any:
    return group(engine={"command": list(words), **more})


ACCEPTED = {
    "the least": group(),
    "a long name": group("a" * 48),
    "more than maxReplicas": group(replicas=100),
    "fewer than minReplicas, as an HPA with its default minimum asks for": group(replicas=1),
    "one size only": group(minReplicas=4, maxReplicas=4, replicas=4),
    "no drain at all": group(scaling={"drainTimeoutSeconds": 0}),
    "a short drain": group(scaling={"drainTimeoutSeconds": 7}),
    "a command": with_command("vllm", "serve", MODEL, "--port", "9000"),
    "a command and args": with_command("vllm", "serve", args=[MODEL]),
    "a command of one word": with_command("vllm", args=["serve", MODEL]),
    "an empty command": with_command(args=[MODEL]),
    "one pipeline stage": with_args("--pipeline-parallel-size", "1", "--api-server-count=1"),
    "tensor parallelism": with_args("--tensor-parallel-size", "2", "-tp=2"),
    "what only looks like a refused flag": with_args("--node-ranking=1", "--dp", "--headlessly"),
    "the host's network": pod(hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet"),
    "a restart policy": pod(restartPolicy="Always"),
    "another container": pod(
        containers=[
            {"name": "engine", "args": [MODEL]},
            {"name": "other", "command": ["sh"], "args": ["--data-parallel-size=2", "--headless"]},
        ]
    ),
}

REFUSED = {
    "no ranks": (group(replicas=0), "can't be scaled to zero"),
    "fewer than none": (group(replicas=-1), "can't be scaled to zero"),
    "one rank": (group(minReplicas=1), "at least 2"),
    "limits the wrong way round": (group(minReplicas=9), "greater than maxReplicas"),
    "far too many": (group(maxReplicas=1025), "out of its limits"),
    "a drain as short as a lame duck": (
        group(scaling={"drainTimeoutSeconds": 6}),
        "longer than lameDuckSeconds",
    ),
    "a long lame duck": (group(scaling={"lameDuckSeconds": 300}), "longer than lameDuckSeconds"),
    "a prepare as long as vLLM's": (
        group(scaling={"prepareTimeoutSeconds": 271}),
        "out of its limits",
    ),
    "a commit as long as vLLM's": (
        group(scaling={"commitTimeoutSeconds": 571}),
        "out of its limits",
    ),
    "an unknown policy": (group(recovery={"policy": "Retry"}), "not one of"),
    "a typo": (group(replica=3), "unknown field"),
    "a long name": (group("a" * 49), "longer than 48"),
    "a name that begins with a digit": (group("3qwen"), "begin it with a letter"),
    "a name with a dot": (group("qwen.3"), "no dots"),
    "another restart policy": (pod(restartPolicy="Never"), "leave restartPolicy out"),
    "no engine": (pod(containers=[{"name": "vllm"}]), "no container named `engine`"),
    "a name of ours": (
        pod(containers=[{"name": "engine", "args": [MODEL]}, {"name": "elasticmoe-sidecar"}]),
        "are the operator's",
    ),
    "a shell": (with_command("bash", "-c", f"vllm serve {MODEL}"), "can't be started warm"),
    "a script": (with_command("/start.sh"), "can't be started warm"),
    "another way to start vLLM": (
        with_command("python3", "-m", "vllm.entrypoints.openai.api_server"),
        "can't be started warm",
    ),
    "another command of vLLM": (with_command("vllm", "bench"), "without `serve`"),
    "vllm alone": (with_command("vllm", args=[MODEL]), "without `serve`"),
    "serve without vllm": (group(engine={"args": ["serve", MODEL]}), "begin with the model"),
    "all of it in args": (group(engine={"args": ["vllm", "serve"]}), "begin with the model"),
    "no args": (group(engine={}), "begin with the model"),
    "data parallelism": (with_args("--data-parallel-size", "4"), "sets data parallelism"),
    "the same with underscores": (with_args("--data_parallel_size=4"), "sets data parallelism"),
    "the same, short": (with_args("-dpn", "0"), "sets data parallelism"),
    "the same in the command": (
        with_command("vllm", "serve", MODEL, "--data-parallel-rank=1"),
        "sets data parallelism",
    ),
    "the largest size": (with_args("--elastic-ep-max-dp-size", "8"), "maxReplicas sets it"),
    "headless": (with_args("--headless"), "leave out --headless"),
    "a unix socket": (with_args("--uds=/tmp/s"), "leave out --headless, --uds"),
    "gRPC": (with_args("--grpc"), "--grpc"),
    "nodes": (with_args("--nnodes", "2"), "lives on one node"),
    "a node's number": (with_args("--node_rank=1"), "lives on one node"),
    "pipeline stages": (with_args("--pipeline-parallel-size", "2"), "no pipeline parallelism"),
    "pipeline stages, short": (with_args("-pp=2"), "no pipeline parallelism"),
    "API servers": (with_args("--api-server-count", "4"), "one API server a rank"),
    "API servers in one word": (with_args("--api_server_count=4"), "one API server a rank"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_is_accepted(case: str) -> None:
    assert refused(ACCEPTED[case]) == []


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str) -> None:
    found, words = REFUSED[case]
    said = refused(found)
    assert len(said) == 1, said
    assert words in said[0]


def test_a_group_without_a_template_is_refused() -> None:
    found = group()
    del found["spec"]["template"]
    assert refused(found) == [".spec.template: required"]


def test_the_smallest_size_stays() -> None:
    before = group(minReplicas=3)
    assert refused(group(minReplicas=3, maxReplicas=16, replicas=5), before) == []
    (said,) = refused(group(minReplicas=4), before)
    assert "minReplicas can't be changed" in said
    # To leave it out is to ask for the default.
    (said,) = refused(group(), before)
    assert "minReplicas can't be changed" in said


def rules(schema: Schema) -> Iterator[dict[str, str]]:
    yield from schema.get("x-kubernetes-validations", [])
    for one in schema.get("properties", {}).values():
        yield from rules(one)
    if "items" in schema:
        yield from rules(schema["items"])


def test_each_rule_has_refused_something() -> None:
    said = [line for found, _ in REFUSED.values() for line in refused(found)]
    said += refused(group(minReplicas=4), group())
    for rule in rules(SCHEMA):
        assert any(line.endswith(rule["message"]) for line in said), rule


def test_a_rule_says_what_to_do() -> None:
    for rule in rules(SCHEMA):
        what, _, advice = rule["message"].partition(": ")
        assert what, rule
        assert len(advice.split()) > 1 or "has to be" in what, rule


@pytest.mark.parametrize("case", [name for name in ACCEPTED if "looks like" not in name])
def test_the_launcher_takes_what_is_accepted(case: str) -> None:
    read = specs.read(ACCEPTED[case] | {"metadata": metadata()})
    assert command.parse(read.engine_words).model == MODEL


@pytest.mark.parametrize("case", list(REFUSED)[list(REFUSED).index("a shell") :])
def test_the_launcher_refuses_what_is_refused(case: str) -> None:
    found, _ = REFUSED[case]
    with pytest.raises((specs.SpecError, command.CommandError)):
        command.parse(specs.read(found | {"metadata": metadata()}).engine_words)


def metadata() -> dict[str, Any]:
    return {"name": "qwen", "namespace": "default", "uid": "u", "generation": 1}


# --- its shape ------------------------------------------------------------------------------------


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Each field with its path."""
    yield path, schema
    for name, one in schema.get("properties", {}).items():
        yield from nodes(one, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


def test_names_are_those_of_the_operator() -> None:
    assert CRD["metadata"]["name"] == f"{names.PLURAL}.{names.GROUP}"
    assert CRD["spec"]["group"] == names.GROUP
    assert CRD["spec"]["scope"] == "Namespaced"
    assert VERSION["name"] == names.VERSION
    given = CRD["spec"]["names"]
    assert (given["kind"], given["plural"]) == (names.KIND, names.PLURAL)
    assert (given["shortNames"], given["categories"]) == (["emoe"], ["all"])


def test_scale_counts_active_ranks() -> None:
    assert VERSION["subresources"] == {
        "status": {},
        "scale": {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    }


def test_columns() -> None:
    always = [one["name"] for one in VERSION["additionalPrinterColumns"] if not one.get("priority")]
    assert always == ["Desired", "Active", "Ready", "Phase", "Available", "Age"]
    for one in VERSION["additionalPrinterColumns"]:
        path = re.sub(r"\[.*?\]", "", one["jsonPath"]).split(".")[1:]
        here = SCHEMA
        for name in path if path[0] != "metadata" else ():
            here = here.get("items", here)["properties"][name]


def test_each_field_is_described() -> None:
    for path, one in nodes(SCHEMA):
        if path != ".metadata" and not path.endswith("[]"):
            assert len(one.get("description", "")) > 5, path
        if path.endswith("Seconds"):
            assert "econds" in one["description"], path


def test_the_schema_is_structural() -> None:
    for path, one in nodes(SCHEMA):
        assert "type" in one or one.get("x-kubernetes-int-or-string"), path
        assert not {"$ref", "allOf", "oneOf", "not"} & set(one), path
        assert not ("properties" in one and "additionalProperties" in one), path
        assert one.get("nullable") is None, path


def test_a_rule_can_only_cost_so_much() -> None:
    containers = SCHEMA["properties"]["spec"]["properties"]["template"]["properties"]["spec"][
        "properties"
    ]["containers"]
    for path, one in nodes(containers):
        if one["type"] == "array":
            assert one["maxItems"] <= 256, path
        if one["type"] == "string":
            assert one["maxLength"] <= 4096, path
    # Regular expressions over 256 arguments of 4096 characters are past every budget.
    assert not any("matches(" in one["rule"] for one in rules(SCHEMA))


def test_a_status_has_no_rules_of_its_own() -> None:
    """So that a newer operator can write it where this CRD is older."""
    status = SCHEMA["properties"]["status"]
    assert list(rules(status)) == []
    with_enums = [path for path, one in nodes(status) if "enum" in one]
    assert with_enums == [".conditions[].status"]


def test_defaults_are_those_of_the_operator() -> None:
    bare = group() | {"metadata": metadata()}
    filled = defaulted(SCHEMA, bare)
    assert filled["spec"]["scaling"]["drainTimeoutSeconds"] == 300
    assert specs.read(filled) == specs.read(bare)
    assert "status" not in filled


def test_what_the_operator_says_of_operations_is_kept() -> None:
    """An API server drops fields that the schema doesn't have, and the operator would write anew
    for ever."""
    running = ops.begin("ScaleUp", "CreatePods", 2, 3, 1000.0).enter("Resize", 1010.5)
    status = {
        "operation": ops.to_status(running) | {"groupPhase": "prepare"},
        "history": [ops.ended_to_status(running.end("Succeeded", 1020.0))],
    }
    assert list(problems(SCHEMA["properties"]["status"], status)) == []


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("operation", "kind", ops.Kind),
        ("operation", "phase", ops.Phase),
        ("history", "result", ops.Result),
        ("conditions", "", conditions.Type),
    ],
)
def test_words_of_the_status_are_explained(part: str, name: str, words: Any) -> None:
    found = SCHEMA["properties"]["status"]["properties"][part]
    found = found.get("items", found)["properties"][name] if name else found
    for word in get_args(words):
        assert re.search(rf"\b{word}\b", found["description"]), word


# --- examples -------------------------------------------------------------------------------------


def objects(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


GROUPS = [
    (path.name, one) for path in EXAMPLES for one in objects(path) if one["kind"] == names.KIND
]


def test_there_are_examples() -> None:
    assert {"qwen3-30b-a3b-8xh100.yaml", "deepseek-v3-multinode.yaml"} <= {
        name for name, _ in GROUPS
    }


@pytest.mark.parametrize(("name", "example"), GROUPS, ids=[name for name, _ in GROUPS])
def test_an_example_is_accepted(name: str, example: dict[str, Any]) -> None:
    assert refused(example) == []
    read = specs.read(example | {"metadata": metadata()})
    assert command.parse(read.engine_words).model
    assert read.size_limited == ""
    mounts = {one["mountPath"] for one in read.engine.get("volumeMounts", [])}
    assert "/dev/shm" in mounts


@pytest.mark.parametrize("name", ["hpa.yaml", "keda.yaml"])
def test_an_autoscaler_knows_its_group(name: str) -> None:
    (scaler,) = objects(ROOT / "deploy" / "examples" / name)
    target = scaler["spec"]["scaleTargetRef"]
    (example,) = [one for _, one in GROUPS if one["metadata"]["name"] == target["name"]]
    assert (target["apiVersion"], target["kind"]) == (example["apiVersion"], example["kind"])
    spec = scaler["spec"]
    least = spec.get("minReplicas", spec.get("minReplicaCount"))
    most = spec.get("maxReplicas", spec.get("maxReplicaCount"))
    wanted = example["spec"]
    assert wanted["minReplicas"] <= least <= most <= wanted["maxReplicas"]


@pytest.mark.parametrize("name", ["hpa.yaml", "keda.yaml"])
def test_an_autoscaler_sees_a_resize_before_it_decides_again(name: str) -> None:
    (scaler,) = objects(ROOT / "deploy" / "examples" / name)
    spec = scaler["spec"]
    behavior = spec.get("behavior") or spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    up, down = behavior["scaleUp"], behavior["scaleDown"]
    # The longest that was measured on a GPU is 17.2 s (README), pods being warm.
    assert min(one["stabilizationWindowSeconds"] for one in (up, down)) > 3 * 17.2
    assert all(one["periodSeconds"] > 3 * 17.2 for way in (up, down) for one in way["policies"])
    assert down["stabilizationWindowSeconds"] >= 300
