"""What a launcher refuses, what it tells, what it checks, and how it does without a warm start."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gate import until
from support.launcher import Launcher, LauncherGroup, kill, model_folder

SERVE = ("vllm", "serve", "sim")


def refused(tmp_path: Path, *words: str, run_dir: Path | None = None, port: int = 0) -> str:
    """The one line with which a launcher ends at once."""
    own = ["--run-dir", str(run_dir or tmp_path / "run"), "--probe-host", "127.0.0.1"]
    own += ["--probe-port", str(port)]
    command = [sys.executable, "-m", "elasticmoe_engine.launcher", *own, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("elasticmoe launcher: ")
    return line


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((), "give the engine's command after `--`: vllm serve MODEL [flags]"),
        (("vllm", "serve"), "name the model right after `vllm serve`"),
        (("python", "-m", "vllm"), "is not `vllm serve`"),
        (("sh", "-c", "vllm serve m"), "can't be started warm: give `vllm serve MODEL [flags]`"),
        (("bash", "start.sh"), "can't be started warm"),
        ((*SERVE, "--data-parallel-size", "4"), "leave out --data-parallel-size"),
        ((*SERVE, "-dp=4"), "leave out -dp"),
        ((*SERVE, "--data_parallel_rank=1"), "leave out --data-parallel-rank"),
        ((*SERVE, "--headless"), "leave out --headless"),
        ((*SERVE, "--uds", "/tmp/x"), "leave out --uds and give --host and --port"),
        ((*SERVE, "-pp", "2"), "leave out --pipeline-parallel-size"),
        ((*SERVE, "--api-server-count", "2"), "leave out --api-server-count"),
        ((*SERVE, "--port", "http"), "give a number from 1 to 65535"),
        ((*SERVE, "--config", "/nowhere.yaml"), "can't be read"),
    ],
)
def test_a_command_that_cannot_work_is_refused(
    tmp_path: Path, command: tuple[str, ...], said: str
) -> None:
    assert said in refused(tmp_path, "--", *command)


def test_a_configuration_file_with_data_parallel_flags_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max-model-len: 100\ndata-parallel-size: 2\n")
    line = refused(tmp_path, "--", *SERVE, "--config", str(file))
    assert "leave out --data-parallel-size" in line


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serving = ("--host", "127.0.0.1", "--port", str(port))
        said = f"127.0.0.1:{port} is in use: stop what listens there or give another --port"
        assert said in refused(tmp_path, "--", *SERVE, *serving)
        line = refused(tmp_path, "--", *SERVE, "--port", free(), port=port)
        assert f"127.0.0.1:{port} can't be had" in line
        assert "give another --probe-port" in line


def free() -> str:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return str(sock.getsockname()[1])


def test_a_run_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "can't be made" in refused(tmp_path, "--", *SERVE, run_dir=tmp_path / "file" / "run")
    assert "too long" in refused(tmp_path, "--", *SERVE, run_dir=tmp_path / ("x" * 120))


def test_an_engine_that_is_no_function_is_refused(tmp_path: Path) -> None:
    assert "give MODULE:FUNCTION" in refused(tmp_path, "--engine", "sim", "--", *SERVE)


# --- what it tells ------------------------------------------------------------------------------


def test_it_tells_what_it_can_start(tmp_path: Path) -> None:
    with Launcher(tmp_path, "--max-model-len", "99") as launcher:
        state = launcher.until_warm()
        assert (state["mode"], state["warm"], state["error"]) == ("warm", True, "")
        assert state["import_s"] > 0
        assert state["serving"] == {"host": "127.0.0.1", "port": launcher.port}
        assert state["facts"] == {
            "engine": "elasticmoe_sim",
            "engine_version": "0.33.0",
            "model": "sim",
            "num_experts": 16,
            "fingerprint": state["facts"]["fingerprint"],
            "flags": "--max-model-len=99",
            "command": "",
            "next_command": "",
            "next_problem": "",
        }
        assert (launcher.run_dir / "launcher.sock").stat().st_mode & 0o777 == 0o600


def test_in_a_shared_run_folder_the_group_may_open_its_socket(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(0o2777)
    with Launcher(tmp_path) as launcher:
        until(lambda: launcher.state())
        assert (launcher.run_dir / "launcher.sock").stat().st_mode & 0o777 == 0o660


START = {
    "launch": "one",
    "rank": 0,
    "size": 2,
    "joiner": False,
    "master_address": "127.0.0.1",
    "rpc_port": 1,
    "redundant_experts": 0,
    "max_size": 4,
}


@pytest.mark.parametrize(
    ("version", "config", "said"),
    [
        ("0.32.9", {"num_experts": 8}, "vLLM 0.32.9 is too old for elastic EP: use an image with"),
        ("0.33.0", {"hidden_size": 8}, "has no routed experts: elastic EP needs a Mixture-of-"),
    ],
)
def test_an_engine_or_model_that_cannot_work_is_told_and_never_started(
    tmp_path: Path, version: str, config: dict[str, Any], said: str
) -> None:
    folder = model_folder(tmp_path / "model", **config)
    command = ("vllm", "serve", str(folder))
    environ = {"ELASTICMOE_ENGINE_VERSION": version, "ELASTICMOE_NUM_EXPERTS": ""}
    with Launcher(tmp_path, command=command, **environ) as launcher:
        error = launcher.until_warm()["error"]
        assert said in error
        assert len(error.splitlines()) == 1
        assert said in launcher.log.read_text()
        assert launcher.start(START) == (409, {"error": error})
        assert launcher.state()["engine"]["phase"] == "absent"
        assert launcher.probe("/livez").status_code == 200


def test_experts_are_counted_in_the_models_configuration(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", text_config={"n_routed_experts": 24})
    command = ("vllm", "serve", str(folder))
    with Launcher(tmp_path, command=command, ELASTICMOE_NUM_EXPERTS="") as launcher:
        assert launcher.until_warm()["facts"]["num_experts"] == 24


def test_the_probe_port_answers_what_it_was_told(tmp_path: Path) -> None:
    with Launcher(tmp_path) as launcher:
        boot = launcher.until_warm()["boot"]
        assert launcher.probe("/livez").status_code == 200
        assert launcher.probe("/readyz").status_code == 503
        assert launcher.call("PUT", "/ready", {"ready": True}) == (200, {"ready": True})
        assert launcher.probe("/readyz").status_code == 200
        state = launcher.probe("/state").json()
        assert (state["boot"], state["ready"], state["engine"]["phase"]) == (boot, True, "absent")
        assert launcher.call("PUT", "/ready", {"ready": "yes"})[0] == 400
        launcher.call("PUT", "/ready", {"ready": False})
        assert launcher.probe("/readyz").status_code == 503
        assert launcher.probe("/engine").status_code == 404


# --- preflight ----------------------------------------------------------------------------------


@pytest.fixture
def checked(tmp_path: Path) -> Iterator[tuple[Launcher, dict[str, Any]]]:
    """A joiner, and what its group's rank 0 would ask it."""
    folder = model_folder(tmp_path / "model", num_experts=16)
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    command = ("vllm", "serve", str(folder))
    with Launcher(tmp_path, "--dtype", "float32", command=command) as launcher:
        state = launcher.until_warm()
        facts = state["facts"]
        same = {one: facts[one] for one in ("engine_version", "model", "fingerprint", "flags")}
        master = {"master_address": "127.0.0.1", "master_probe_port": state["probe_port"]}
        yield launcher, {"check": "c1", "slots": 8, **master, **same}


def test_a_joiner_like_its_group_passes(checked: tuple[Launcher, dict[str, Any]]) -> None:
    launcher, group = checked
    assert launcher.call("POST", "/preflight", group) == (
        200,
        {"check": "c1", "ok": True, "reason": ""},
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"engine_version": "0.34.0"}, "vLLM 0.33.0 here, 0.34.0 in the group: start this instanc"),
        ({"model": "other"}, "other in the group: start it with that one"),
        (
            {"fingerprint": "x", "flags": "--dtype=half"},
            "(only here: --dtype=float32; only in the group: --dtype=half): start this instance",
        ),
        ({"master_probe_port": 1}, "rank 0's launcher at 127.0.0.1:1 can't be reached"),
    ],
)
def test_a_joiner_unlike_its_group_is_told_why(
    checked: tuple[Launcher, dict[str, Any]], other: dict[str, Any], said: str
) -> None:
    launcher, group = checked
    status, answer = launcher.call("POST", "/preflight", group | other)
    assert (status, answer["ok"]) == (200, False)
    assert said in answer["reason"]
    assert len(answer["reason"].splitlines()) == 1


def test_a_joiner_without_weights_is_told(checked: tuple[Launcher, dict[str, Any]]) -> None:
    launcher, group = checked
    Path(group["model"], "model.safetensors").unlink()
    reason = launcher.call("POST", "/preflight", group)[1]["reason"]
    assert "no weight files" in reason


def test_an_instance_that_still_imports_is_no_joiner(tmp_path: Path) -> None:
    (tmp_path / "slow_import.py").write_text("import time\nwhile True: time.sleep(0.05)\n")
    options = ("--engine", "elasticmoe_sim.entry:main", "--preload", "slow_import")
    with Launcher(tmp_path, options=options, PYTHONPATH=str(tmp_path)) as launcher:
        assert until(launcher.state)["warm"] is False
        reason = launcher.call("POST", "/preflight", {})[1]["reason"]
        assert reason == "the engine's modules are still being imported: wait"


# --- without a warm start -----------------------------------------------------------------------


def test_where_the_imports_fail_it_starts_the_plain_command(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "argv = [sys.executable, '-m', 'elasticmoe_sim', '--model', *sys.argv[2:]]\n"
        "os.execv(sys.executable, argv)\n"
    )
    program.chmod(0o755)
    more = {
        "command": (str(program), "serve", "sim"),
        "options": ("--engine", "elasticmoe_sim.entry:main", "--preload", "no_such_module"),
    }
    with LauncherGroup(tmp_path, 2, **more) as group:
        for launcher in group.launchers:
            state = launcher.until_warm()
            assert (state["mode"], state["warm"]) == ("cold", False)
            assert state["error"].startswith("no_such_module: ModuleNotFoundError")
            assert "WARNING: no warm start" in launcher.log.read_text()
        group.start(2)
        assert group[1].status("/v1/models") == 200
        assert len(group[1].state()["engine"]["pids"]) == 2
        core = group[1].process_of("EngineCore")
        began = time.monotonic()
        kill(core)
        until(lambda: group[1].state()["engine"]["phase"] == "exited")
        assert time.monotonic() - began < 0.5
        group.stop()
        group.start(2)
        group[0].state()
        group[0].process.kill()
        until(group[0].gone)
