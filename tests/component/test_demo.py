"""The demo with the simulated engine, as a user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from elasticmoe_cli import demo, profiles
from elasticmoe_cli.load import Load
from rich.console import Console
from support.contract import is_gone
from support.gate import until
from support.local import SIM, elasticmoe


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where demos make their folders: the path of a unix socket may not be long."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scratch: Path) -> None:
    monkeypatch.setenv("ELASTICMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(scratch))
    for name, value in SIM.items():
        monkeypatch.setenv(name, value)


def test_the_demo_writes_its_figures(tmp_path: Path, scratch: Path) -> None:
    out = tmp_path / "out.json"
    done = elasticmoe("demo", "--engine", "sim", "--out", str(out), limit_s=110)
    assert not done.stderr, done.stderr
    assert done.returncode == 0
    report = json.loads(out.read_text())
    assert set(report) == {
        "engine",
        "steps",
        "requests",
        "failed",
        "longest_gap_s",
        "output_mismatches",
    }
    assert report["engine"] == "sim"
    sizes = [(one["from"], one["to"]) for one in report["steps"]]
    assert sizes == [(2, 3), (3, 2), (2, 3), (3, 2)]
    for one in report["steps"]:
        assert set(one) == {"from", "to", "total_s", "prepare_s", "commit_s"}
        assert one["total_s"] >= one["prepare_s"] + one["commit_s"] > 0
    assert report["requests"] > 4 * demo.BETWEEN
    assert (report["failed"], report["output_mismatches"]) == (0, 0)
    assert 0 < report["longest_gap_s"] < 5
    assert len(done.stdout.splitlines()[1]) <= 80
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert list(scratch.glob("elasticmoe-*")) == [], "nothing is left behind"


def test_the_demo_ends_with_a_loss(scratch: Path) -> None:
    """`--kill`: the last thing is a killed engine; its requests are not among the figures."""
    console = Console(file=StringIO(), width=80)
    plan = demo.Plan(sizes=(2, 3), kill=True)
    report = demo.run(profiles.find("sim"), plan, console, scratch / "g")
    assert (report.failed, report.output_mismatches, len(report.steps)) == (0, 0, 1)
    recovery = report.as_json()["recovery"]
    assert 0 <= recovery["noticed_s"] < 5
    assert recovery["noticed_s"] < recovery["all_healthy_s"] <= recovery["first_token_s"]
    assert "one engine killed: noticed after" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_demo_that_is_ended_leaves_nothing_behind(scratch: Path) -> None:
    """SIGTERM while it starts: its group ends with it."""
    words = [sys.executable, "-m", "elasticmoe_cli", "demo", "--engine", "sim"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            files = until(lambda: list(scratch.glob("elasticmoe-*/instances/*/pid.json")), 30)
            pids = [json.loads(until(file.read_text))["pid"] for file in files]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 130
            assert all(is_gone(pid) for pid in pids)
            assert list(scratch.glob("elasticmoe-*")) == []
        finally:
            process.terminate()


async def test_users_whose_group_never_serves_can_be_stopped() -> None:
    """They wait for a ready rank; that is no reason to wait for them."""
    began = time.monotonic()
    async with Load(list, "sim", clients=2) as load:
        await load.stop()
    assert time.monotonic() - began < 5
    assert load.result.requests == 0
