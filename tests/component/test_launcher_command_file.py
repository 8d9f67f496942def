"""A launcher whose command comes in a file and changes, with the simulated engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.contract import free_port
from support.gate import until
from support.launcher import Launcher, LauncherGroup

SERVE = ("vllm", "serve", "sim")


def write(file: Path, revision: str, *flags: str, port: int) -> None:
    """Atomically, as it comes in a pod."""
    words = [*SERVE, "--host", "127.0.0.1", "--port", str(port), *flags]
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"revision": revision, "command": words}))
    new.replace(file)


def facts(launcher: Launcher) -> dict[str, Any]:
    found: dict[str, Any] = launcher.state()["facts"]
    return found


def told(launcher: Launcher) -> tuple[str, str, str]:
    found = facts(launcher)
    return found["command"], found["next_command"], found["flags"]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[LauncherGroup]:
    with LauncherGroup(tmp_path, 2, command_file=True) as group:
        for launcher in group.launchers:
            launcher.until_warm()
        yield group


def rewrite(group: LauncherGroup, revision: str, *flags: str) -> None:
    for launcher in group.launchers:
        write(launcher.command_file, revision, *flags, port=launcher.port)


def test_an_engine_keeps_its_command_and_the_next_one_has_the_new_one(
    group: LauncherGroup,
) -> None:
    group.start(2)
    before = [facts(launcher) for launcher in group.launchers]
    rewrite(group, "two", "--max-model-len", "98")
    for launcher, known in zip(group.launchers, before, strict=True):
        until(lambda launcher=launcher: facts(launcher)["next_command"] == "two")
        assert facts(launcher) == known | {"next_command": "two"}
        assert "command two lies in" in launcher.log.read_text()
    assert [launcher.state()["engine"]["phase"] for launcher in group.launchers] == ["running"] * 2

    # Written last of all, right before the stop: the quickest restart starts it.
    rewrite(group, "three", "--max-model-len", "99")
    group.stop()
    group.start(2)
    for launcher in group.launchers:
        assert told(launcher) == ("three", "", "--max-model-len=99")
        assert facts(launcher)["fingerprint"] != before[0]["fingerprint"]
        [model] = httpx.get(f"{launcher.url}/v1/models").json()["data"]
        assert model["max_model_len"] == 99


def test_without_an_engine_it_is_taken_over_at_once(group: LauncherGroup) -> None:
    rewrite(group, "two", "--seed", "1")
    until(lambda: told(group[0]) == ("two", "", "--seed=1"))
    rewrite(group, "three", "--headless")
    until(lambda: "leave out --headless" in facts(group[0])["next_problem"])
    assert told(group[0]) == ("two", "three", "--seed=1")
    assert group[0].state()["error"] == "", "it can serve, with the command in force"
    group[0].command_file.unlink()
    until(lambda: "can't be read" in facts(group[0])["next_problem"])
    assert told(group[0]) == ("two", "", "--seed=1")


def test_an_engine_of_another_command_than_the_groups_is_not_started(group: LauncherGroup) -> None:
    known = facts(group[0])
    spec = group.spec(0, 2)
    status, answer = group[0].start(spec | {"fingerprint": "f"})
    assert (status, answer["error"]) == (
        409,
        "the flags in force here are not those that the group starts with",
    )
    status, answer = group[0].start(spec | {"command": "two"})
    assert (status, answer["error"]) == (
        409,
        "command one is in force here, the group starts two",
    )
    assert group[0].state()["engine"]["phase"] == "absent"
    same = {"command": "one", "fingerprint": known["fingerprint"]}
    assert group[0].start(spec | same)[0] == 202


def test_a_lost_engine_is_followed_by_one_of_the_new_command(group: LauncherGroup) -> None:
    group.start(2)
    rewrite(group, "two", "--seed", "1")
    os.kill(group[1].process_of("EngineCore"), 9)
    until(lambda: group[1].state()["engine"]["phase"] == "exited")
    assert told(group[1])[0] == "one", "the engine is not cleared away yet"
    group.stop()
    assert {told(launcher)[0] for launcher in group.launchers} == {"two"}
    group.start(2)
    assert group[0].status("/v1/models") == 200


def refused(tmp_path: Path, *words: str) -> str:
    own = ["--run-dir", str(tmp_path / "run"), "--probe-host", "127.0.0.1", "--probe-port", "0"]
    command = [sys.executable, "-m", "elasticmoe_engine.launcher", *own, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    return line.removeprefix("elasticmoe launcher: ")


def test_a_launcher_takes_one_command(tmp_path: Path) -> None:
    file = tmp_path / "command.json"
    write(file, "one", port=free_port())
    assert "not both" in refused(tmp_path, "--command-file", str(file), "--", *SERVE)
    assert "by --command-file" in refused(tmp_path)
    line = refused(tmp_path, "--command-file", str(tmp_path / "no.json"))
    assert (
        line == f"--command-file {tmp_path}/no.json: it can't be read (No such file or directory)"
    )
    file.write_text("{}")
    assert '"revision": give a text' in refused(tmp_path, "--command-file", str(file))
