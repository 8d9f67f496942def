import json
from pathlib import Path

import pytest
from elasticmoe_sim.config import ConfigError, Timing, parse

ARGV = ["--data-parallel-size", "2", "--data-parallel-rank", "1"]


def test_reads_vllms_flags() -> None:
    argv = [
        *("sim", "--served-model-name", "a", "b", "--data_parallel_size=3", "-dpn", "2"),
        *("--data-parallel-address", "10.0.0.1", "--data-parallel-rpc-port", "99"),
        *("--eplb-config", '{"num_redundant_experts": 8, "use_async": false}'),
        *("--elastic-ep-max-dp-size", "4", "--middleware", "x.A", "--middleware", "y.B"),
    ]
    config = parse(argv, environ={})
    assert (config.rank, config.size, config.max_size) == (2, 3, 4)
    assert (config.master_address, config.rpc_port) == ("10.0.0.1", 99)
    assert config.redundant_experts == 8
    assert config.served_model_names == ("a", "b")
    assert config.middleware == ("x.A", "y.B")
    assert not config.joiner


def test_unknown_flags_and_their_values_mean_nothing() -> None:
    config = parse([*ARGV, "--kv-cache-memory-bytes", "1234", "--enforce-eager"], environ={})
    assert config.model == "sim"


def test_environment_makes_a_joiner() -> None:
    assert parse(ARGV, environ={"VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "1"}).joiner
    assert not parse(ARGV, environ={"VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "0"}).joiner


def test_launch_spec_wins_over_flags() -> None:
    spec = {
        "launch": "l",
        "rank": 0,
        "size": 4,
        "joiner": True,
        "master_address": "h",
        "rpc_port": 7,
        "redundant_experts": 16,
        "max_size": 8,
    }
    config = parse(ARGV, spec, environ={})
    assert (config.rank, config.size, config.max_size, config.joiner) == (0, 4, 8, True)
    assert (config.master_address, config.rpc_port, config.redundant_experts) == ("h", 7, 16)


@pytest.mark.parametrize("name", ["num_experts", "n_routed_experts", "num_local_experts"])
@pytest.mark.parametrize("nested", [False, True])
def test_counts_experts_in_the_models_configuration(
    tmp_path: Path, name: str, nested: bool
) -> None:
    values = {"text_config": {name: 64}} if nested else {name: 64}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert parse([str(tmp_path), *ARGV], environ={}).num_experts == 64


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data-parallel-size", "1"], "must be 2 or more"),
        (["--data-parallel-rank", "2"], "--data-parallel-rank 2 is not in 0 to 1"),
        (["--data-parallel-size", "4", "--elastic-ep-max-dp-size", "3"], "is over"),
        (["--eplb-config", '{"num_redundant_experts": 3}'], "do not divide among 2 ranks"),
        (["--eplb-config", "[]"], "give a JSON object"),
        (["--model", "/nowhere"], "no readable model configuration"),
    ],
)
def test_says_what_is_wrong(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(argv, environ={})


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="Mixture-of-Experts"):
        parse([str(tmp_path)], environ={})


def test_timing_comes_from_the_environment() -> None:
    timing = Timing.from_environ({"SIM_PREPARE_S": "2.5", "SIM_LIMIT_S": "1"})
    assert (timing.prepare_s, timing.limit_s, timing.commit_s) == (2.5, 1.0, 0.2)
    with pytest.raises(ConfigError, match="SIM_BOOT_S=soon: give seconds"):
        Timing.from_environ({"SIM_BOOT_S": "soon"})
