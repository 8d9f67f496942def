"""A launcher as the first process of a container."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from elasticmoe_engine.local_http import call_unix
from elasticmoe_engine.processes import children, is_zombie
from support.contract import free_port
from support.gate import until
from support.launcher import Launcher


def own_processes() -> bool:
    """Whether this user may make a container's view of processes."""
    words = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not own_processes(), reason="needs the right to make a PID namespace")
def test_as_a_containers_first_process_it_reaps_orphans_and_ends_when_told(tmp_path: Path) -> None:
    orphan = tmp_path / "orphan.py"
    orphan.write_text(
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(0.2)\n"  # its parent is gone by then
        "    os._exit(0)\n"
        "os.wait()\n"
        f"os.execv({sys.executable!r}, {[sys.executable, '-m', 'elasticmoe_engine.launcher']!r} + "
        "sys.argv[1:])\n"
    )
    run_dir = tmp_path / "run"
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable]
    words += [str(orphan), "--run-dir", str(run_dir), "--probe-port", "0"]
    words += ["--probe-host", "127.0.0.1", "--engine", "elasticmoe_sim.entry:main"]
    words += ["--", "vllm", "serve", "sim", "--host", "127.0.0.1", "--port", str(free_port())]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    try:

        def warm() -> bool:
            try:
                return bool(call_unix(run_dir / "launcher.sock", "GET", "/state")[1]["warm"])
            except OSError:
                assert process.poll() is None, log.read_text()
                return False

        until(warm, 30)
        [first] = children(process.pid)
        until(lambda: not any(is_zombie(pid) for pid in children(first)), 5)
        os.kill(first, 15)
        assert process.wait(8) == 0
        assert not list(run_dir.glob("*.sock"))
    finally:
        process.kill()
        process.wait()


def test_an_engines_output_is_seen_as_it_comes(tmp_path: Path) -> None:
    """Without a newline at its end, into a pipe: nothing may wait in a buffer."""
    engine = tmp_path / "talks.py"
    engine.write_text(
        "import time\n"
        "def main(sock, argv, spec):\n"
        "    print('the engine says', end=' ')\n"
        "    time.sleep(60)\n"
    )
    options = ("--engine", "talks:main")
    environ = {"PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": ""}
    with Launcher(tmp_path, options=options, **environ) as launcher:
        launcher.until_warm()
        body = {
            "launch": "one",
            "rank": 0,
            "size": 2,
            "joiner": False,
            "master_address": "127.0.0.1",
            "rpc_port": 1,
            "redundant_experts": 0,
            "max_size": 4,
        }
        assert launcher.start(body)[0] == 202
        until(lambda: "the engine says" in launcher.log.read_text(), 10)


@pytest.mark.parametrize("host", ["::", "[::]"])
def test_its_probes_can_be_on_ipv6(tmp_path: Path, host: str) -> None:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with Launcher(tmp_path, options=("--engine", "x:y", "--probe-host", host)) as launcher:
        until(lambda: launcher.state())
        port = launcher.state()["probe_port"]
        for address in ("[::1]", "127.0.0.1"):
            answer = httpx.get(f"http://{address}:{port}/livez", trust_env=False)
            assert answer.text == "alive\n"
