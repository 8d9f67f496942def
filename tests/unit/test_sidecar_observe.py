"""Parts of a report from what launcher and gate say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from elasticmoe_protocol.messages import EngineReport, Exit, LaunchSpec, ScaleOutcome
from elasticmoe_sidecar import metrics_text, observe
from elasticmoe_sidecar.engine import Failure
from elasticmoe_sidecar.journal import Started
from elasticmoe_sidecar.observe import TokenCount
from elasticmoe_sidecar.settings import Settings, incarnation_of
from elasticmoe_sidecar.states import (
    EngineState,
    GateState,
    LauncherFacts,
    LauncherState,
    OperationState,
    PhaseState,
    Serving,
)

WANTED = LaunchSpec(
    launch="L1",
    rank=1,
    size=2,
    joiner=False,
    master_address="127.0.0.1",
    rpc_port=1,
    redundant_experts=0,
    max_size=4,
)

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 0.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:num_requests_running{engine="10",model_name="m"} 50.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="m",reason="capacity"} 9.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0",model_name="m"} 1.0
vllm:generation_tokens_total{engine="1",model_name="m"} 1234.0
vllm:generation_tokens_created{engine="1",model_name="m"} 1.7e+09
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{engine="1",model_name="m"} 66.0
"""


def settings(tmp_path: Path, **fields: object) -> Settings:
    base = {
        "deployment": "d",
        "instance": "i",
        "coordinator": "tcp://127.0.0.1:1",
        "run_dir": tmp_path,
        "keys_dir": tmp_path,
        "address": "127.0.0.1",
        "rpc_port": 5,
    }
    return Settings(**(base | fields))  # type: ignore[arg-type]


def test_only_the_own_engines_series_count():
    read = metrics_text.read(TEXT, rank=1)
    assert (read.load.running, read.load.waiting, read.load.kv_cache) == (3.0, 2.0, 0.25)
    assert read.tokens == 1300


def test_an_engine_without_series_has_no_load():
    assert metrics_text.read("", rank=0).tokens == 0


def test_text_that_is_no_metrics_is_a_failure():
    assert isinstance(observe.load_of("vllm:num_requests_running{ 3\n", 0), Failure)


def test_tokens_only_grow_within_a_launch():
    count = TokenCount()
    for tokens in (10, 15, 0, 4):  # at 0 the engine began its series anew
        count.add("L1", tokens)
    assert count.total == 19
    count.add("L2", 3)
    assert count.total == 3


def test_facts_wait_until_the_number_of_experts_is_known(tmp_path):
    known = LauncherFacts(engine_version="0.33.0", model="m", num_experts=8, fingerprint="f")
    state = LauncherState(
        boot="B", serving=Serving(host="127.0.0.1", port=8000), probe_port=9, facts=known
    )
    facts = observe.facts(settings(tmp_path, ordinal=2), state, "0.1")
    assert facts is not None
    assert (facts.num_experts, facts.serving_port, facts.probe_port) == (8, 8000, 9)
    assert (facts.address, facts.rpc_port, facts.ordinal) == ("127.0.0.1", 5, 2)
    unknown = LauncherState(boot="B", facts=LauncherFacts())
    assert observe.facts(settings(tmp_path), unknown, "0.1") is None
    assert observe.facts(settings(tmp_path), LauncherState(boot="B"), "0.1") is None


def test_facts_name_the_command_in_force_and_the_next_one(tmp_path):
    known = LauncherFacts(num_experts=8, command="a", next_command="b", next_problem="no JSON")
    facts = observe.facts(settings(tmp_path), LauncherState(boot="B", facts=known), "0.1")
    assert facts is not None
    assert (facts.command, facts.next_command, facts.next_problem) == ("a", "b", "no JSON")
    older = msgspec.json.decode(
        b'{"boot": "B", "facts": {"num_experts": 8, "fingerprint": "f"}}', type=LauncherState
    )
    facts = observe.facts(settings(tmp_path), older, "0.1")
    assert facts is not None
    assert (facts.command, facts.next_command, facts.next_problem) == ("", "", "")


def test_a_launcher_with_an_error_is_introduced_without_the_number(tmp_path):
    failed = LauncherState(boot="B", facts=LauncherFacts(), error="no model configuration")
    facts = observe.facts(settings(tmp_path), failed, "0.1")
    assert facts is not None
    assert facts.num_experts == -1


def test_an_engine_that_went_with_its_launcher_is_reported_as_exited():
    anew = LauncherState(boot="B2")
    started = Started(launch="L1", boot="B1")
    report = observe.engine_report(anew, WANTED, started)
    assert (report.phase, report.launch, report.rank) == ("exited", "L1", 1)
    assert report.exit is not None
    assert "launcher" in report.exit.reason


def test_once_it_is_not_wanted_any_more_it_is_absent():
    anew = LauncherState(boot="B2")
    assert observe.engine_report(anew, None, Started(launch="L1", boot="B1")) == EngineReport()


def test_the_engine_is_reported_as_the_launcher_says():
    gone = Exit(process="core", code=-9, reason="killed")
    engine = EngineState(phase="exited", launch="L1", rank=1, size=2, exit=gone)
    report = observe.engine_report(LauncherState(boot="B", engine=engine), WANTED, None)
    assert report == EngineReport(phase="exited", launch="L1", rank=1, size=2, exit=gone)


def test_the_gates_words_are_passed_on():
    operation = OperationState(operation="op", target=3, state="failed", status=500, error="no")
    gate = GateState(launch="L1", progress=5, lag_s=0.5, dp_size=None, operation=operation)
    phase = PhaseState(phase="committing", epoch=4)
    report = observe.gate_report(gate, 100, phase)
    assert (report.progress, report.lag_s, report.dp_size) == (105, 0.5, 0)
    assert (report.phase, report.epoch, report.phase_error) == ("committing", "4", "")
    assert report.scale == ScaleOutcome(
        operation="op", target=3, state="failed", status=500, error="no"
    )


@pytest.mark.parametrize(
    ("phase", "error"), [(None, ""), (Failure("no answer"), "no answer")], ids=["none", "failure"]
)
def test_a_phase_that_was_not_read_is_empty(phase, error):
    report = observe.gate_report(GateState(), 0, phase)
    assert (report.phase, report.phase_error) == ("", error)


def test_the_incarnation_is_made_once(tmp_path):
    made = incarnation_of(settings(tmp_path))
    assert made
    assert incarnation_of(settings(tmp_path)) == made
    assert incarnation_of(settings(tmp_path, incarnation="uid")) == "uid"
