"""Command line and environment of a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from elasticmoe_engine.command import parse
from elasticmoe_engine.launch import LaunchSpec, SpecError, applied, arguments, environment

BODY: dict[str, Any] = {
    "launch": "l1",
    "rank": 2,
    "size": 3,
    "joiner": True,
    "master_address": "10.0.0.1",
    "rpc_port": 13400,
    "redundant_experts": 20,
    "max_size": 4,
    "host_ip": "10.0.0.3",
}
SPEC = LaunchSpec.from_json(BODY)


def value(words: list[str], name: str) -> str:
    assert words.count(name) == 1
    return words[words.index(name) + 1]


def test_the_place_in_the_group_is_added() -> None:
    command = parse(["vllm", "serve", "m", "--dtype", "float32", "--served-model-name", "a", "b"])
    words = arguments(command, SPEC)
    assert words[:6] == ["m", "--dtype", "float32", "--served-model-name", "a", "b"]
    assert value(words, "--data-parallel-size") == "3"
    assert value(words, "--data-parallel-rank") == "2"
    assert value(words, "--data-parallel-address") == "10.0.0.1"
    assert value(words, "--data-parallel-rpc-port") == "13400"
    assert value(words, "--elastic-ep-max-dp-size") == "4"
    assert value(words, "--eplb-config") == '{"num_redundant_experts":20}'
    assert value(words, "--all2all-backend") == "allgather_reducescatter"
    switches = {"--data-parallel-external-lb", "--enable-expert-parallel", "--enable-eplb"}
    assert switches | {"--enable-elastic-ep"} <= set(words)


def test_the_gate_is_the_last_middleware() -> None:
    command = parse(["vllm", "serve", "m", "--middleware", "their.Own"])
    assert arguments(command, SPEC)[-2:] == ["--middleware", "elasticmoe_engine.gate.Gate"]


def test_eplb_config_is_given_once_with_the_users_values() -> None:
    command = parse(
        ["vllm", "serve", "m", "--eplb-config", '{"use_async": false}', "--eplb-config.x", "1"]
    )
    words = arguments(command, SPEC)
    assert value(words, "--eplb-config") == '{"use_async":false,"x":1,"num_redundant_experts":20}'
    assert "--eplb-config.x" not in words


def test_the_users_all2all_backend_stays() -> None:
    command = parse(["vllm", "serve", "m", "--all2all-backend=nixl_ep"])
    words = arguments(command, SPEC)
    assert "--all2all-backend" not in words
    assert "--all2all-backend=nixl_ep" in words


def changes(words: str = "m", environ: dict[str, str] | None = None, **spec: Any) -> Any:
    return environment(
        parse(["vllm", "serve", *words.split()]),
        LaunchSpec.from_json(BODY | spec),
        Path("/run"),
        "10.0.0.3",
        "secret",
        environ or {},
        warm=True,
    )


def test_environment_of_a_joiner() -> None:
    assert changes() == {
        "ELASTICMOE_RUN_DIR": "/run",
        "ELASTICMOE_LAUNCH": "l1",
        "ELASTICMOE_ADMIN_TOKEN": "secret",
        "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "1",
        "VLLM_HOST_IP": "10.0.0.3",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }


def test_joining_is_gone_at_a_restart() -> None:
    made = changes(joiner=False)
    assert made["VLLM_ELASTIC_EP_SCALE_UP_LAUNCH"] is None
    before = {"VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "1", "PATH": "/bin"}
    after = applied(before, made)
    assert "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH" not in after
    assert after["PATH"] == "/bin"


def test_the_model_runner_is_the_users_choice_or_nixls() -> None:
    assert "VLLM_USE_V2_MODEL_RUNNER" not in changes(environ={"VLLM_USE_V2_MODEL_RUNNER": "1"})
    assert "VLLM_USE_V2_MODEL_RUNNER" not in changes("m --all2all-backend nixl_ep")


def test_a_service_link_is_no_port() -> None:
    assert changes(environ={"VLLM_PORT": "tcp://10.96.0.7:80"})["VLLM_PORT"] is None
    assert "VLLM_PORT" not in changes(environ={"VLLM_PORT": "5000"})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rank": "2"}, "rank"),
        ({"joiner": 1}, "joiner"),
        ({"size": True}, "size"),
        ({"launch": ""}, "launch: give an id"),
        ({"size": 1, "rank": 0}, "size 1 is not in 2 to 4"),
        ({"size": 5}, "size 5 is not in 2 to 4"),
        ({"rank": 3}, "rank 3 is not in 0 to 2"),
        ({"master_address": None}, "master_address"),
    ],
)
def test_a_spec_that_cannot_be_launched(change: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        LaunchSpec.from_json(BODY | change)


def test_a_spec_has_unknown_fields_ignored_and_may_lack_its_own_address() -> None:
    body = {key: value for key, value in BODY.items() if key != "host_ip"} | {"new": 1}
    assert LaunchSpec.from_json(body).host_ip == ""
    with pytest.raises(SpecError):
        LaunchSpec.from_json([])
