"""The preStop hook: what it waits for, what it says, and when it ends early."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from elasticmoe_engine import leave
from elasticmoe_engine.local_http import Answer, Request, Serving, serve_unix


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave, "AGAIN_S", 0.02)
    monkeypatch.setattr(leave, "NOBODY_S", 0.2)


def sidecar(folder: Path, answer: Callable[[], Answer]) -> Serving:
    def handle(request: Request) -> Answer:
        assert (request.method, request.path) == ("POST", ("leave",))
        return answer()

    return serve_unix(folder / "sidecar.sock", handle)


def launcher(folder: Path, phase: str) -> Serving:
    state = {"engine": {"phase": phase}}
    return serve_unix(folder / "launcher.sock", lambda _: Answer(200, state))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(200, {"released": True}), "released after 0"),
        (Answer(200, {"released": False}), "the sidecar waits no longer"),
        (Answer(404, {"error": "no"}), "not released: the sidecar answered 404 {'error': 'no'}"),
    ],
)
def test_it_says_what_the_sidecar_answers(tmp_path: Path, answer: Answer, said: str) -> None:
    sidecar(tmp_path, lambda: answer)
    assert said in leave.leave(tmp_path, 5)


def test_it_waits_for_the_release(tmp_path: Path) -> None:
    go, asked = threading.Event(), threading.Event()

    def held() -> Answer:
        asked.set()
        go.wait(10)
        return Answer(200, {"released": True})

    sidecar(tmp_path, held)
    said: list[str] = []
    waiting = threading.Thread(target=lambda: said.append(leave.leave(tmp_path, 10)))
    waiting.start()
    assert asked.wait(10)
    assert not said
    go.set()
    waiting.join(10)
    assert said[0].startswith("released after")


def test_a_sidecar_that_comes_later_is_asked(tmp_path: Path) -> None:
    launcher(tmp_path, "running")
    timer = threading.Timer(0.5, sidecar, [tmp_path, lambda: Answer(200, {"released": True})])
    timer.start()
    assert leave.leave(tmp_path, 10).startswith("released after")


@pytest.mark.parametrize("phase", ["absent", "running"])
def test_a_sidecar_that_dies_meanwhile_is_asked_again(tmp_path: Path, phase: str) -> None:
    """Also without an engine: one that was there is given time to come back."""
    launcher(tmp_path, phase)
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
        "print(flush=True); c, _ = s.accept(); c.recv(1)"  # and ends
    )
    path = str(tmp_path / "sidecar.sock")
    first = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()

    def come_back() -> None:
        first.wait()
        sidecar(tmp_path, lambda: Answer(200, {"released": True}))

    threading.Thread(target=come_back).start()
    assert leave.leave(tmp_path, 10).startswith("released after")
    first.stdout.close()


def test_with_nothing_to_drain_and_nobody_to_ask_it_ends_early(tmp_path: Path) -> None:
    launcher(tmp_path, "absent")
    began = time.monotonic()
    said = leave.leave(tmp_path, 30)
    assert said.startswith("there is no engine and nothing to drain: no sidecar on ")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("phase", ["starting", "running", "stopping", "exited", None])
def test_with_an_engine_it_asks_until_the_time_is_over(tmp_path: Path, phase: str | None) -> None:
    if phase is not None:
        launcher(tmp_path, phase)
    said = leave.leave(tmp_path, 0.6)
    where = tmp_path / "sidecar.sock"
    assert said == f"not released in 0.6 s: no sidecar on {where} (No such file or directory)"


def test_a_frozen_sidecar_is_not_waited_for_longer_than_told(tmp_path: Path) -> None:
    sidecar(tmp_path, lambda: Answer(200) if threading.Event().wait(5) else Answer(500))
    assert leave.leave(tmp_path, 0.4) == "not released in 0.4 s"


def test_as_a_command_it_says_one_line_and_imports_little(tmp_path: Path) -> None:
    sidecar(tmp_path, lambda: Answer(200, {"released": True}))
    words = [sys.executable, "-X", "importtime", "-m", "elasticmoe_engine.leave"]
    options = ["--run-dir", str(tmp_path), "--timeout", "5"]
    done = subprocess.run([*words, *options], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("elasticmoe leave: released after")
    assert done.stdout.count("\n") == 1
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "http.client" in imported
    assert not imported & {"asyncio", "multiprocessing", "vllm", "elasticmoe_engine.launcher"}


def test_a_command_that_is_not_understood_ends_with_2(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "elasticmoe_engine.leave", "--run-dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--timeout" in done.stderr
