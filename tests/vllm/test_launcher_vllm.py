"""The launcher and the gate with real vLLM on CPU: a group of two, started, stopped, started warm.

The test plays sidecar and coordinator over `launcher.sock` and `gate.sock`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from elasticmoe_engine.facts import VLLM
from elasticmoe_vllm_cpu import flags
from support import contract
from support.gate import until
from support.launcher import LauncherGroup, kill

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]

REPORT_LIMIT_S = 0.5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of vLLM: empty, as in a new pod."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[LauncherGroup]:
    """Three launchers; the tests use them one after the other, in this file's order."""
    venv = contract.vllm_cpu()
    eplb = json.dumps(flags.EPLB_CONFIG)
    with LauncherGroup(
        tmp_path_factory.mktemp("vllm"),
        3,
        *flags.model_flags(),
        *("--eplb-config", eplb),
        slots=flags.SLOTS,
        command=(str(venv / "bin" / "vllm"), "serve", str(venv / "tiny-model")),
        options=("--engine", VLLM),
        python=str(venv / "bin" / "python"),
        limit_s=120,
        **flags.environment({}),
        # What the files say is what counts here.
        ELASTICMOE_NUM_EXPERTS="",
        ELASTICMOE_ENGINE_VERSION="",
        VLLM_CACHE_ROOT=str(cache),
    ) as group:
        yield group


def completion(group: LauncherGroup, rank: int) -> str:
    body = {"model": flags.SERVED_MODEL_NAME, "prompt": "the quick", "max_tokens": 8}
    answer = httpx.post(
        group[rank].url + "/v1/completions", json={**body, "temperature": 0}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_it_is_warm_and_knows_the_model(group: LauncherGroup) -> None:
    began = time.monotonic()
    for launcher in group.launchers:
        state = launcher.until_warm()
        assert (state["mode"], state["error"]) == ("warm", ""), launcher.log.read_text()
        assert state["facts"]["engine"] == "vllm"
        assert state["facts"]["engine_version"].startswith("0.33.")
        assert state["facts"]["num_experts"] == 16
    print(f"all warm after {time.monotonic() - began:.1f} s, imports {state['import_s']:.1f} s")
    told = json.loads((group[0].run_dir / "warm.json").read_text())
    assert told["problems"] == []


def test_it_starts_a_group_and_starts_it_again(group: LauncherGroup, cache: Path) -> None:
    seconds = []
    for _ in range(2):
        seconds.append(group.start(2))
        assert completion(group, 0) == completion(group, 1)
        for rank in range(2):
            state = group[rank].gate("GET", "/state")[1]
            assert (state["dp_size"], state["dp_rank"], state["pause_mode"]) == (2, rank, "keep")
            assert group[rank].gate("GET", "/phase")[1]["phase"] == "idle"
            assert "vllm:num_requests_running" in group[rank].gate("GET", "/metrics")[1]
        stopped = group.stop(grace=10)
        print(f"started in {seconds[-1]:.1f} s, stopped in {stopped:.1f} s")
    # Where vLLM keeps what another process, which imports it all again, said of a model's class.
    assert not (cache / "modelinfos").exists()


def test_it_grows_and_shrinks_and_no_request_fails(group: LauncherGroup) -> None:
    group.start(2)
    expected = completion(group, 0)
    stop = threading.Event()

    def ask(rank: int) -> int:
        count = 0
        while not stop.is_set():
            assert completion(group, rank) == expected
            count += 1
        return count

    with ThreadPoolExecutor(4) as clients:
        asking = [clients.submit(ask, number % 2) for number in range(4)]
        try:
            for old, new in ((2, 3), (3, 2)):
                began = time.monotonic()
                outcomes = group.resize(old, new)
                assert [one["error"] for one in outcomes] == [""] * old
                print(f"{old} -> {new} in {time.monotonic() - began:.1f} s")
                if new == 3:
                    assert completion(group, 2) == expected
        finally:
            stop.set()
        assert sum(one.result() for one in asking) > 4
    states = [group[rank].gate("GET", "/state")[1] for rank in range(3)]
    assert [state["retired"] for state in states] == [False, False, True]
    assert [state["hold_refused"] + state["hold_timed_out"] for state in states] == [0, 0, 0]
    assert group[2].state()["engine"]["phase"] == "running", "a retired rank waits to be stopped"
    group.stop(grace=5)


@pytest.mark.parametrize("name", ["EngineCore", "APIServer"])
def test_a_sigkill_is_reported_at_once_and_leaves_nothing(group: LauncherGroup, name: str) -> None:
    group.start(2)
    assert completion(group, 1)
    pid = group[1].process_of(name)
    began = time.monotonic()
    kill(pid)
    engine = until(lambda: (e := group[1].state()["engine"])["phase"] == "exited" and e)
    assert time.monotonic() - began < REPORT_LIMIT_S
    assert name[:9] in engine["exit"]["process"]
    print(f"{name} killed, {engine['exit']} after {time.monotonic() - began:.2f} s")
    group.stop()


def test_nothing_outlives_a_launcher_that_is_killed(group: LauncherGroup) -> None:
    group.start(3)
    for launcher in group.launchers:
        launcher.state()
        launcher.seen.add(launcher.forkserver)
        launcher.process.kill()
    for launcher in group.launchers:
        until(launcher.gone)
