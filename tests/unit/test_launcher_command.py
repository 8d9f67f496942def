"""The user's command line: what is read of it, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from elasticmoe_engine.command import CommandError, flags_that_differ, parse


def command(text: str, *more: str) -> list[str]:
    return ["vllm", "serve", *text.split(), *more]


def test_model_and_address() -> None:
    found = parse(command("/models/m --host 10.0.0.1 --port=9000"))
    assert (found.model, found.host, found.port) == ("/models/m", "10.0.0.1", 9000)
    found = parse(command("--model m"))
    assert (found.model, found.host, found.port) == ("m", "", 8000)
    assert parse(["/opt/bin/vllm", "serve", "m"]).program == "/opt/bin/vllm"


REFUSED = [
    ("m --data-parallel-size 2", "leave out --data-parallel-size"),
    ("m --data_parallel_rank=1", "leave out --data-parallel-rank"),
    ("m -dp 2", "leave out -dp"),
    ("m -dpl 2", "leave out -dpl"),
    ("m --headless", "leave out --headless"),
    ("m --uds /tmp/s", "give --host and --port"),
    ("m --grpc", "leave out --grpc"),
    ("m --pipeline-parallel-size 2", "leave out --pipeline-parallel-size"),
    ("m -pp 2", "leave out --pipeline-parallel-size"),
    ("m --api-server-count 4", "leave out --api-server-count"),
    ("m --elastic-ep-max-dp-size 8", "leave out --elastic-ep-max-dp-size"),
    ("m --nnodes 2", "leave out --nnodes"),
    ("m --middleware elasticmoe_engine.gate.Gate", "leave out --middleware"),
    ("m --port no", "--port no: give a number"),
    ("m --port 70000", "--port 70000: give a number"),
    ("m --tensor-parallel-size two", "--tensor-parallel-size two: give a number"),
    ("m --eplb-config {", "give a JSON object"),
    ('m --eplb-config {"num_redundant_experts":8}', "leave num_redundant_experts out"),
    ("m --eplb-config.num_redundant_experts 8", "leave num_redundant_experts out"),
    ("--port 8000", "name the model right after"),
    ("m extra", "name the model right after"),
    ("m --config /nowhere.yaml", "/nowhere.yaml can't be read"),
]


@pytest.mark.parametrize(("text", "advice"), REFUSED)
def test_refused_with_one_line_that_says_what_to_do(text: str, advice: str) -> None:
    with pytest.raises(CommandError) as refusal:
        parse(command(text))
    assert advice in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["vllm"],
        ["vllm", "bench"],
        ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        ["sh", "-c", "exec vllm serve m"],
        ["/bin/bash", "-c", "vllm serve m"],
    ],
)
def test_only_vllm_serve_itself(words: list[str]) -> None:
    with pytest.raises(CommandError, match="vllm serve MODEL"):
        parse(words)


def test_one_api_server_may_be_said() -> None:
    parse(command("m --pipeline-parallel-size 1 --api-server-count 1"))


def test_a_configuration_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "# ours\nmodel: m\nport: 9001  # here\nmax_model_len: 512\nhf-overrides:\n  a: 1\n"
    )
    found = parse(command(f"--config {path}"))
    assert (found.model, found.port) == ("m", 9001)
    assert found.agreed == ("--hf-overrides=a: 1", "--max-model-len=512")
    assert parse(command(f"--config {path} --port 9002")).port == 9002


@pytest.mark.parametrize(
    "line", ["data-parallel-size: 2", "data_parallel_size: 2", "headless: true"]
)
def test_a_configuration_file_is_checked_too(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\n{line}\n")
    with pytest.raises(CommandError, match="leave out"):
        parse(command(f"--config {path}"))


def test_eplb_config_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("eplb-config:\n  window_size: 10\n")
    with pytest.raises(CommandError, match="give --eplb-config as a flag"):
        parse(command(f"m --config {path}"))


def test_eplb_config_is_merged_from_all_its_forms() -> None:
    found = parse(
        command('m --eplb-config {"a":1,"b":true} --eplb_config.c text --eplb-config.a 2')
    )
    assert found.eplb_config == {"a": 2, "b": True, "c": "text"}


def test_the_fingerprint_is_of_what_must_agree() -> None:
    one = parse(command("m --dtype float32 --port 1 --max_model_len=5 --api-key a b -tp 2"))
    other = parse(command("m --max-model-len 5 --host h --dtype=float32 --tensor-parallel-size 2"))
    assert one.fingerprint == other.fingerprint
    assert one.readable_flags == "--dtype=float32 --max-model-len=5 --tensor-parallel-size=2"
    third = parse(command("m --dtype float16"))
    assert third.fingerprint != one.fingerprint


def test_a_negative_number_is_a_value() -> None:
    assert parse(command("m --seed -1")).agreed == ("--seed=-1",)


def test_differing_flags_are_named() -> None:
    ours = parse(command("m --dtype float32 --enforce-eager")).readable_flags
    theirs = parse(command("m --dtype float16 --enforce-eager")).readable_flags
    assert flags_that_differ(ours, theirs) == (
        "only here: --dtype=float32; only in the group: --dtype=float16"
    )
    assert flags_that_differ(ours, ours) == ""
