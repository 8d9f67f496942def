"""The command line without processes: help, JSON, tables, and what the load adds up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from elasticmoe_cli import live
from elasticmoe_cli.api import Coordinator
from elasticmoe_cli.demo import Report, Step
from elasticmoe_cli.load import Result, difference, endpoints_of
from elasticmoe_cli.local import LocalGroup, Options
from elasticmoe_cli.main import app
from elasticmoe_coordinator.core.config import GroupConfig
from rich.console import Console

COMMANDS = [
    "",
    "coordinator",
    "sidecar",
    "join",
    "inject",
    "status",
    "scale",
    "restart",
    "version",
    "demo",
    "keys",
    "keys make",
    "keys rotate",
    "local",
    "local up",
    "local scale",
    "local status",
    "local down",
]


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        app(list(words), prog_name="elasticmoe")
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


# --- help and mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capfd: pytest.CaptureFixture[str], command: str) -> None:
    status, out, err = run(capfd, *command.split(), "--help")
    assert status == 0
    assert f"Usage: elasticmoe {command}".rstrip() in out
    assert not err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("scale --zzz 3", "no such option: --zzz (see `elasticmoe scale --help`)"),
        ("scale", "missing argument 'size' (see `elasticmoe scale --help`)"),
        ("scale many", "'size': Input should be a valid integer"),
        ("shrink 2", "no such command 'shrink' (see `elasticmoe --help`)"),
        ("coordinator --policy maybe", "'--policy'"),
        ("coordinator --restart-limit 0", "'--restart-limit'"),
        ("local up --engine tpu", "'--engine'"),
        ("join -- vllm serve m", "missing option '--coordinator'"),
    ],
)
def test_a_command_line_that_is_not_understood_is_told_in_one_line(
    capfd: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    status, out, err = run(capfd, *words.split())
    assert status == 2
    assert not out
    [line] = err.splitlines()
    assert line.startswith("elasticmoe: ")
    assert said in line
    assert "--help`)" in line


def test_without_a_command_the_help_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd)
    assert status == 2
    assert "demo" in out + err


def test_version_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "version", "--json")
    assert status == 0
    assert set(json.loads(out)) == {"version", "protocol"}


def test_status_as_json(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coordinator, "status", lambda _: group())
    status, out, _ = run(capfd, "status", "--json")
    assert status == 0
    assert json.loads(out) == group()


@pytest.mark.parametrize("state", ["succeeded", "failed"])
def test_an_operation_as_json(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    ended = operation(state=state, error="no GPU")
    monkeypatch.setattr(Coordinator, "scale", lambda *_: operation())
    monkeypatch.setattr(Coordinator, "until_ended", lambda *_: iter([operation(), ended]))
    status, out, err = run(capfd, "scale", "3", "--json")
    assert json.loads(out) == {"operation": ended}
    assert (status, err) == ((0, "") if state == "succeeded" else (1, "elasticmoe: no GPU\n"))


def test_nothing_to_do_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Coordinator, "scale", lambda *_: None)
    assert run(capfd, "scale", "3")[:2] == (0, "nothing to do: the group has that size\n")
    assert json.loads(run(capfd, "scale", "3", "--json")[1]) == {"operation": None}


def test_a_local_groups_limits_are_the_coordinators() -> None:
    """Each can be set, and says the same as the coordinator where it is not."""
    theirs = {one.name: one.default for one in fields(GroupConfig)}
    for one in fields(Options):
        name = one.name.removesuffix("_s")
        assert name in theirs
        if name not in ("deployment", "max_size"):
            assert one.default == theirs[name], name
    assert "--lame-duck 1.5" in " ".join(Options(lame_duck_s=1.5).words())


# --- inject --------------------------------------------------------------------------------------


def test_inject_replaces_what_was_there(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    before = os.umask(0o077)
    try:
        assert run(capfd, "inject", str(folder)) == (0, f"launcher and gate are in {folder}\n", "")
        package = folder / "elasticmoe_engine"
        (package / "of_an_older_version.py").write_text("")
        (package / "launcher.py").write_text("broken")
        assert run(capfd, "inject", str(folder))[0] == 0
    finally:
        os.umask(before)
    assert [path.name for path in folder.iterdir()] == ["elasticmoe_engine"]
    assert not (package / "of_an_older_version.py").exists()
    assert not list(package.rglob("__pycache__"))
    for path in package.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
    usage = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(folder)!r});"
            "import elasticmoe_engine.launcher, elasticmoe_engine.leave;"
            "print(elasticmoe_engine.launcher.__file__)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert usage.stdout.strip() == str(package / "launcher.py")


def test_inject_names_a_folder_that_cannot_be(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    status, out, err = run(capfd, "inject", str(tmp_path / "file"))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "choose another path" in err


def test_a_user_without_a_home_can_run_commands() -> None:
    program = (
        "import os, pwd;"
        "pwd.getpwuid = lambda _: (_ for _ in ()).throw(KeyError());"
        "os.environ.pop('HOME', None); import elasticmoe_cli.main"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- tables --------------------------------------------------------------------------------------


def operation(**more: Any) -> dict[str, Any]:
    return {
        "id": "op1",
        "kind": "scale_up",
        "fromSize": 2,
        "toSize": 3,
        "phase": "prepare",
        "state": "running",
        "attempt": 1,
        "reason": "",
        "error": "",
        "phases": [{"phase": "wait", "seconds": 0.01}, {"phase": "prepare", "seconds": 1.5}],
        **more,
    }


def instance(name: str, **more: Any) -> dict[str, Any]:
    return {
        "instance": name,
        "address": "127.0.0.1",
        "servingPort": 8000,
        "probePort": 9000,
        "rank": 0,
        "state": "active",
        "ready": True,
        "suspect": False,
        "fence": "open",
        "inFlight": 0,
        "held": 0,
        "running": 0.0,
        "waiting": 0.0,
        "kvCache": 0.0,
        "reason": "",
        **more,
    }


def group(**more: Any) -> dict[str, Any]:
    return {
        "deployment": "moe",
        "state": "Serving",
        "reason": "AsDesired",
        "message": "",
        "size": 2,
        "desired": 2,
        "generation": 4,
        "slotsPerRank": 8,
        "redundantExperts": 0,
        "elastic": True,
        "operation": None,
        "history": [],
        "instances": [instance("r0"), instance("r1", rank=1)],
        **more,
    }


def shown(what: Any) -> list[str]:
    console = Console(width=80, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_group_at_rest() -> None:
    head, columns, *rows = shown(live.status(group()))
    assert head == "moe  Serving  2 ranks, generation 4, 8 expert slots each (0 redundant)"
    assert columns.split()[:5] == ["name", "rank", "state", "ready", "fence"]
    assert [row.split()[:5] for row in rows] == [
        ["r0", "0", "active", "yes", "open"],
        ["r1", "1", "active", "yes", "open"],
    ]


def test_a_group_that_resizes_fits_in_80_columns() -> None:
    leaving = instance(
        "r2", rank=2, state="leaving", ready=False, fence="lame_duck", inFlight=12, kvCache=0.42
    )
    running = operation(kind="scale_down", fromSize=3, toSize=2, phase="lame_duck")
    lines = shown(
        live.status(
            group(
                state="Resizing",
                size=3,
                operation=running,
                instances=[*group()["instances"], leaving],
            )
        )
    )
    assert lines[0].startswith("moe  Resizing  3 ranks, generation 4")
    assert "scale down 3 → 2 ━" in lines[1]
    assert lines[1].endswith("lame duck  1.5 s")
    assert lines[-1].split() == [
        *("r2", "2", "leaving", "no", "lame", "duck", "12", "0", "0", "0", "42%"),
    ]
    assert len(lines) == 6, "no row is wrapped"


def test_what_keeps_a_group_from_its_size_is_shown() -> None:
    waits = instance("r2", rank=None, state="standby", ready=False, fence="", reason="no GPU")
    lines = shown(
        live.status(
            group(
                desired=3,
                reason="TooFewInstances",
                message="2 of 3 instances can serve",
                instances=[*group()["instances"], waits],
            )
        )
    )
    assert lines[0].startswith("moe  Serving  2 ranks (3 desired), generation 4")
    assert "TooFewInstances: 2 of 3 instances can serve" in lines
    assert "r2: no GPU" in lines
    assert any(line.split()[:4] == ["r2", "-", "standby", "no"] for line in lines)


def test_a_silent_instance_is_shown_as_such() -> None:
    lines = shown(live.status(group(instances=[instance("r0", suspect=True)])))
    assert "active, silent" in lines[-1]


def test_a_group_of_which_nothing_is_known_yet() -> None:
    status = group(
        state="Learning",
        reason="Learning",
        message="the coordinator asks who is there",
        size=0,
        desired=0,
        generation=0,
        slotsPerRank=0,
        instances=[],
    )
    assert shown(live.status(status)) == [
        "moe  Learning  0 ranks",
        "Learning: the coordinator asks who is there",
    ]


@pytest.mark.parametrize("phase", live.PHASES["scale_up"])
def test_the_bar_shows_how_many_phases_are_done(phase: str) -> None:
    [line] = shown(live.operation(operation(phase=phase, attempt=2)))
    assert line.startswith("scale up 2 → 3 ")
    assert line.endswith(f"{phase} (attempt 2)  1.5 s")
    row = live.operation(operation(phase=phase))
    bar = next(iter(row.columns[1].cells))  # type: ignore[union-attr]
    assert bar.completed == live.PHASES["scale_up"].index(phase)  # type: ignore[union-attr]


def test_an_operation_that_ended_is_one_line() -> None:
    ended = operation(state="succeeded", phase="")
    assert live.outcome(ended) == "scale up 2 → 3 succeeded in 1.5 s (prepare 1.5)"
    assert live.outcome(operation()) == "scale up 2 → 3 has begun: operation op1"
    assert live.phases([{"phase": "wait", "seconds": 0.01}]) == ""


def test_without_a_terminal_nothing_is_drawn(tmp_path: Path) -> None:
    """A log would be full of tables."""
    with (tmp_path / "log").open("w") as file, live.view(Console(file=file)) as show:
        show(live.status(group()))
    assert not (tmp_path / "log").read_text()


# --- load and demo -------------------------------------------------------------------------------


def test_the_longest_gap_is_kept() -> None:
    result = Result()
    for since, now in ((1.0, 1.5), (2.0, 4.0), (4.0, 5.0)):
        result.gap(since, now)
    assert (result.longest_gap_s, result.longest_gap_at) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ([-0.1, -0.2], [-0.1, -0.2], False),
        ([-0.1, -0.2], [-0.1, -0.2005], False),
        ([-0.1, -0.2], [-0.1, -0.21], True),
        ([-0.1], [-0.1, -0.2], True),
        ([-0.1], [float("nan")], True),
        ([], [], False),
    ],
)
def test_log_probabilities_are_compared(one: list[float], other: list[float], differ: bool) -> None:
    assert (difference(one, other) > 1e-3) is differ


def test_endpoints_of_a_status() -> None:
    [first, _] = endpoints_of(group())
    assert (first.name, first.url, first.probe) == (
        "r0",
        "http://127.0.0.1:8000",
        "http://127.0.0.1:9000",
    )


def test_a_report_has_exactly_these_figures() -> None:
    report = Report("sim", [Step(2, 3, 1.23456, 1.0, 0.2)], requests=5, longest_gap_s=0.12345)
    assert report.as_json() == {
        "engine": "sim",
        "steps": [{"from": 2, "to": 3, "total_s": 1.235, "prepare_s": 1.0, "commit_s": 0.2}],
        "requests": 5,
        "failed": 0,
        "longest_gap_s": 0.123,
        "output_mismatches": 0,
    }


def test_a_process_id_that_was_given_to_somebody_else_is_not_known(tmp_path: Path) -> None:
    group = LocalGroup(tmp_path)
    home = tmp_path / "instances" / "r0"
    home.mkdir(parents=True)
    (home / "pid.json").write_text(json.dumps({"pid": 1, "began": 12345}))
    assert group.instances() == ["r0"]
    assert group.pid("r0") is None
