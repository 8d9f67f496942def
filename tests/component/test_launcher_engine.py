"""The real launcher with the simulated engine: started, stopped and started again, whole."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.contract import is_gone
from support.gate import head_of, request, until
from support.launcher import Launcher, LauncherGroup, kill

REPORT_LIMIT_S = 0.5


@pytest.fixture
def group(tmp_path: Path) -> Iterator[LauncherGroup]:
    with LauncherGroup(tmp_path, 2) as group:
        yield group


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """One alone: its engine waits for the rest of its group."""
    with Launcher(tmp_path) as launcher:
        launcher.until_warm()
        yield launcher


def spec(launch: str = "one", **more: object) -> dict[str, object]:
    base = {"rank": 1, "size": 2, "joiner": False, "master_address": "127.0.0.1", "rpc_port": 1}
    return {"launch": launch, **base, "redundant_experts": 0, "max_size": 4, **more}


# --- start and stop -----------------------------------------------------------------------------


def test_it_starts_stops_and_starts_again_from_the_same_warm_process(group: LauncherGroup) -> None:
    boots = {launcher.until_warm()["boot"] for launcher in group.launchers}
    first = group.start(2)
    pids = {launcher.state()["engine"]["pid"] for launcher in group.launchers}
    assert group[1].status("/v1/models") == 200
    group.stop(grace=5)
    second = group.start(2)
    assert group[0].status("/v1/models") == 200
    assert not pids & {launcher.state()["engine"]["pid"] for launcher in group.launchers}
    assert boots == {launcher.state()["boot"] for launcher in group.launchers}
    assert "anew" not in group[0].log.read_text()
    assert max(first, second) < 5


def test_connections_wait_while_there_is_no_engine(group: LauncherGroup) -> None:
    def ask(number: int) -> list[socket.socket]:
        asked = []
        for launcher in group.launchers:
            launcher.until_warm()
            connection = socket.create_connection(("127.0.0.1", launcher.port), timeout=15)
            connection.sendall(request("/v1/models", method="GET", Connection="close"))
            asked.append(connection)
        return asked

    for round_ in range(2):
        asked = ask(round_)
        group.start(2)
        for connection in asked:
            with connection:
                assert head_of(connection)[0] == 200
        group.stop()


def test_thousands_of_connections_wait(group: LauncherGroup) -> None:
    """More than the 2048 that uvicorn lets wait, also after it had the socket."""
    group.start(2)
    group.stop()
    connections = []
    try:
        for _ in range(3000):
            one = socket.socket()
            connections.append(one)
            one.settimeout(2)
            one.connect(("127.0.0.1", group[0].port))
    finally:
        for one in connections:
            one.close()


def test_the_same_launch_twice_is_one(launcher: Launcher) -> None:
    assert launcher.start(spec())[0] == 202
    pid = until(lambda: launcher.state()["engine"]["pid"])
    status, engine = launcher.start(spec())
    assert (status, engine["launch"], engine["pid"]) == (200, "one", pid)


def test_what_does_not_fit_is_a_conflict(launcher: Launcher) -> None:
    launcher.start(spec())
    status, answer = launcher.start(spec("other"))
    assert (status, answer["error"]) == (409, "launch one is starting: stop it first")
    assert launcher.stop("other")[0] == 409
    launcher.stop("one")
    launcher.until("absent")
    assert launcher.start(spec())[0] == 409, "an id is for one start"
    assert launcher.stop("one")[0] == 202, "it is gone, as ordered"
    assert launcher.stop("never")[0] == 409
    assert launcher.start(spec("two"))[0] == 202


@pytest.mark.parametrize(
    "wrong", [{"size": 1, "rank": 0}, {"size": 5}, {"rank": 2}, {"rank": "0"}, {"launch": ""}]
)
def test_a_wrong_spec_is_refused_in_one_line(launcher: Launcher, wrong: dict[str, object]) -> None:
    status, answer = launcher.start({**spec(), **wrong})
    assert status == 400
    assert len(answer["error"].splitlines()) == 1
    assert launcher.state()["engine"]["phase"] == "absent"


def test_a_stop_with_less_grace_shortens_it(group: LauncherGroup) -> None:
    joiner = group[1]
    joiner.until_warm()
    order = group.spec(1, 2, joiner=True)
    joiner.start(order)
    pid = until(lambda: joiner.state()["engine"]["pid"])
    os.kill(pid, signal.SIGSTOP)  # so it takes no SIGTERM
    until(lambda: "T (stopped)" in Path(f"/proc/{pid}/status").read_text())
    joiner.stop(order["launch"], grace=60)
    assert joiner.state()["engine"]["phase"] == "stopping"
    joiner.stop(order["launch"], grace=600)
    assert joiner.state()["engine"]["phase"] == "stopping"
    began = time.monotonic()
    joiner.stop(order["launch"], grace=0)
    joiner.until("absent")
    assert time.monotonic() - began < 1
    assert is_gone(pid)


# --- an end that nobody ordered -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["APIServer", "EngineCore"])
def test_a_sigkill_is_reported_at_once(group: LauncherGroup, name: str) -> None:
    group.start(2)
    assert group[1].call("PUT", "/ready", {"ready": True})[0] == 200
    assert group[1].probe("/readyz").status_code == 200
    pid = group[1].process_of(name)
    began = time.monotonic()
    kill(pid)
    engine = until(lambda: (e := group[1].state()["engine"])["phase"] == "exited" and e)
    assert time.monotonic() - began < REPORT_LIMIT_S
    assert name[:9] in engine["exit"]["process"]
    assert engine["exit"]["reason"]
    assert engine["exit"]["code"] == (-signal.SIGKILL if name == "APIServer" else None)
    assert group[1].probe("/readyz").status_code == 503
    assert group[1].probe("/livez").status_code == 200
    group.stop()
    group.start(2)


def test_an_engine_that_ends_while_it_starts_is_reported(tmp_path: Path) -> None:
    with Launcher(tmp_path, "--middleware", "no.such.Class") as launcher:
        launcher.until_warm()
        launcher.start(spec(rank=0, redundant_experts=1))
        engine = until(lambda: (e := launcher.state()["engine"])["phase"] == "exited" and e)
        assert engine["exit"] == {
            "process": "APIServer",
            "code": 1,
            "reason": "APIServer ended with status 1: see its output before it",
        }
        assert "do not divide" in launcher.log.read_text(), "the engine's output is forwarded"
        launcher.stop("one")
        launcher.until("absent")


# --- the whole tree -----------------------------------------------------------------------------


def test_nothing_outlives_a_launcher_that_is_killed(group: LauncherGroup) -> None:
    group.start(2)
    for launcher in group.launchers:
        launcher.state()
        assert len(launcher.seen) >= 2
        launcher.seen.add(launcher.forkserver)
        launcher.process.kill()
    for launcher in group.launchers:
        until(launcher.gone)
        until(lambda port=launcher.port: is_free(port))


def test_sigterm_ends_everything(group: LauncherGroup) -> None:
    group.start(2)
    for launcher in group.launchers:
        launcher.state()
        launcher.seen.add(launcher.forkserver)
        launcher.process.terminate()
    for launcher in group.launchers:
        assert launcher.process.wait(5) == 0
        assert launcher.gone()
        assert is_free(launcher.port)
        assert not list(launcher.run_dir.glob("*.sock"))


def test_told_to_end_it_stops_its_engine_in_order_and_says_so(group: LauncherGroup) -> None:
    """The others learn at once that a rank is gone, not from a silence."""
    group.start(2)
    launcher = group[0]
    assert launcher.call("PUT", "/ready", {"ready": True})[0] == 200
    url = f"http://127.0.0.1:{launcher.state()['probe_port']}/readyz"
    assert httpx.get(url).status_code == 200
    launcher.process.terminate()
    until(lambda: httpx.get(url).status_code == 503)
    assert launcher.call("GET", "/state")[1]["engine"]["phase"] in ("stopping", "absent")
    assert launcher.start(group.spec(0, 2)) == (409, {"error": "this launcher was told to end"})
    assert launcher.process.wait(5) == 0
    assert "told to end: stopping the engine" in launcher.log.read_text()
    assert launcher.gone()


def test_told_to_end_twice_it_does_not_wait_for_the_engine(group: LauncherGroup) -> None:
    group.start(2)
    launcher = group[0]
    os.kill(launcher.process_of("APIServer"), signal.SIGSTOP)  # so it takes no SIGTERM
    launcher.process.terminate()
    until(lambda: launcher.call("GET", "/state")[1]["engine"]["phase"] == "stopping")
    began = time.monotonic()
    launcher.process.terminate()
    assert launcher.process.wait(5) == 0
    assert time.monotonic() - began < 2
    assert launcher.gone()


def test_an_engine_that_hangs_is_killed_when_the_launcher_has_to_end(group: LauncherGroup) -> None:
    group.start(2)
    launcher = group[0]
    os.kill(launcher.process_of("APIServer"), signal.SIGSTOP)
    assert launcher.stop(launcher.state()["engine"]["launch"], 60)[0] == 202
    launcher.process.terminate()
    assert launcher.process.wait(8) == 0
    assert launcher.gone()


def test_a_new_launcher_takes_the_killed_ones_place(launcher: Launcher) -> None:
    boot = launcher.state()["boot"]
    launcher.process.kill()
    launcher.process.wait()
    launcher.begin()
    assert launcher.until_warm()["boot"] != boot
    assert launcher.start(spec())[0] == 202


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_killed_forkserver_is_made_anew(group: LauncherGroup) -> None:
    group.start(2)
    assert not group[1].gone()
    kill(group[1].forkserver)
    engine = until(lambda: (e := group[1].state()["engine"])["phase"] == "exited" and e)
    assert engine["exit"]["process"] == "forkserver"
    until(group[1].gone)
    group.stop()
    kill(group[0].forkserver)  # with no engine there
    until(lambda: not group[0].state()["warm"])
    group.start(2)
    for launcher in group.launchers:
        assert "importing the engine's modules anew" in launcher.log.read_text()
