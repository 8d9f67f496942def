"""What can't work is told in one line that says what to do, and a group that runs goes on."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from elasticmoe_protocol.keys import ensure_keys
from support.gate import until
from support.launcher import model_folder
from support.local import Local, Status, elasticmoe, local_group, probe


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("c")
        patch.setenv("ELASTICMOE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def group(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """Two ranks that serve, whatever a test does."""
    with local_group(tmp_path_factory.mktemp("g"), max_size=3) as local:
        yield local


@pytest.fixture(autouse=True)
def serving(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a group runs, it is the same after the test, and answers."""
    if "group" not in request.fixturenames:
        yield
        return
    local: Local = request.getfixturevalue("group")
    before, launches = local.status(), local.launches()
    yield
    after = local.status()
    assert (after["state"], after["size"]) == ("Serving", 2)
    assert after["generation"] == before["generation"]
    assert local.launches() == launches
    assert probe(local, after) == [200, 200]


def refused(*words: str, status: int = 2, **environ: str) -> str:
    """The one line with which a command ends."""
    done = elasticmoe(*words, **environ)
    assert done.returncode == status, done
    assert not done.stdout
    [line] = done.stderr.splitlines()
    return line


# --- before anything runs ------------------------------------------------------------------------


def test_an_unknown_option() -> None:
    line = refused("coordinator", "--colour", "red")
    assert line.startswith("elasticmoe: no such option: --colour")
    assert "coordinator --help`)" in line


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (("--min-size", "1"), "the smallest size is 2, not 1"),
        (("--min-size", "4", "--max-size", "3"), "max size 3 is under min size 4: raise it"),
        (("--size", "9"), "size 9 is not between 2 and 8: choose one that is"),
    ],
)
def test_sizes_that_no_group_can_have(tmp_path: Path, limits: tuple[str, ...], said: str) -> None:
    assert said in refused("coordinator", "--keys", str(tmp_path / "keys"), *limits)


def test_a_coordinators_http_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused("coordinator", "--keys", str(tmp_path / "keys"), "--http-port", port)
    assert f"127.0.0.1:{port} can't be used (Address already in use): choose another" in line
    assert "--http-port" in line


def test_a_coordinators_port_for_sidecars_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        line = refused(
            "coordinator", "--keys", str(tmp_path / "k"), "--http-port", "0", "--bind", bind
        )
    assert bind in line
    assert "--bind" in line


def test_keys_that_are_none(tmp_path: Path) -> None:
    ensure_keys(tmp_path)
    (tmp_path / "coordinator.json").write_text("{")
    line = refused("coordinator", "--keys", str(tmp_path), "--http-port", "0")
    assert f"{tmp_path}/coordinator.json is not a key file" in line
    assert "make new ones" in line


def test_no_keys_for_a_change(tmp_path: Path) -> None:
    line = refused("scale", "3", "--keys", str(tmp_path / "nowhere"))
    assert f"there is no {tmp_path}/nowhere/token" in line
    assert "--keys" in line


def test_keys_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused("keys", "make", "--keys", str(tmp_path / "file"), status=1)
    assert f"{tmp_path}/file can't be written (File exists): choose another folder" in line


def test_status_without_a_coordinator() -> None:
    line = refused("status", "--coordinator", "http://127.0.0.1:9", status=1)
    assert "no coordinator answers at http://127.0.0.1:9" in line
    assert "start one with `elasticmoe coordinator`" in line


def test_no_group_on_this_host(tmp_path: Path) -> None:
    advice = "start one with `elasticmoe local up`"
    for command, said in ("status", advice), ("scale 3", advice), ("down", "name its folder"):
        line = refused("local", *command.split(), "--dir", str(tmp_path / "none"), status=1)
        assert f"no group runs in {tmp_path}/none: {said}" in line


@pytest.mark.parametrize("size", ["1", "5"])
def test_a_first_size_out_of_the_limits(tmp_path: Path, size: str) -> None:
    line = refused("local", "up", "--engine", "sim", "--size", size, "--dir", str(tmp_path / "g"))
    assert f"size {size} is not between 2 and 4" in line
    assert not (tmp_path / "g").exists()


def test_a_file_for_the_demos_figures_that_cannot_be_written(tmp_path: Path) -> None:
    """Said before the demo, not after it."""
    out = tmp_path / "nowhere" / "out.json"
    line = refused("demo", "--engine", "sim", "--out", str(out))
    assert f"--out {out} can't be written (No such file or directory): name another file" in line


def test_data_parallel_flags_in_an_own_command(tmp_path: Path) -> None:
    """The launcher's line is the command's, and nothing runs afterwards."""
    own = ["vllm", "serve", "m", "--data-parallel-size", "2"]
    folder = tmp_path / "g"
    done = elasticmoe("local", "up", "--dir", str(folder), "--", *own)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "instance r" in line
    assert "the group sets data parallelism: leave out --data-parallel-size" in line
    assert not (folder / "group.json").exists()
    assert Path(line.rpartition("all of it: ")[2].rstrip(")")).exists(), "the log can be read"


def test_a_python_that_is_none(tmp_path: Path) -> None:
    ensure_keys(tmp_path / "keys")
    words = ["join", "--coordinator", "tcp://127.0.0.1:9", "--run-dir", str(tmp_path / "run")]
    words += ["--keys", str(tmp_path / "keys")]
    line = refused(*words, "--python", "/nowhere/python", "--", "vllm", "serve", "m")
    assert "/nowhere/python can't be started" in line
    assert "--python" in line


@pytest.mark.parametrize("which", ["serving", "probe"])
def test_a_ranks_port_in_use(tmp_path: Path, which: str) -> None:
    ensure_keys(tmp_path / "keys")
    words = ["join", "--coordinator", "tcp://127.0.0.1:9", "--keys", str(tmp_path / "keys")]
    words += ["--run-dir", str(tmp_path / "run"), "--launcher=--engine"]
    words += ["--launcher", "elasticmoe_sim.entry:main"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        own = ["--probe-port", port] if which == "probe" else []
        serve = ["--host", "127.0.0.1", "--port", port if which == "serving" else "28123"]
        done = elasticmoe(*words, *own, "--", "vllm", "serve", "sim", *serve)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if "launcher" in line]
    assert f"127.0.0.1:{port}" in line
    assert f"give another {'--port' if which == 'serving' else '--probe-port'}" in line


# --- while a group serves ------------------------------------------------------------------------


def test_a_second_group_in_one_folder(group: Local) -> None:
    line = refused("local", "up", "--engine", "sim", "--dir", str(group.group.folder))
    assert "a group runs in" in line
    assert "`elasticmoe local down` ends it" in line


@pytest.mark.parametrize("size", ["1", "0", "4"])
def test_a_size_out_of_the_limits(group: Local, size: str) -> None:
    url, keys = group.api._url, str(group.group.keys_dir)
    line = refused("scale", size, "--coordinator", url, "--keys", keys)
    assert f"size {size} is not between 2 and 3" in line or "size: " in line
    line = refused("local", "scale", size, "--dir", str(group.group.folder))
    assert f"size {size} is not between 2 and 3" in line


def test_a_wrong_token(group: Local, tmp_path: Path) -> None:
    ensure_keys(tmp_path)
    line = refused("scale", "3", "--coordinator", group.api._url, "--keys", str(tmp_path))
    assert "send the group's token" in line
    answer = httpx.put(f"{group.api._url}/v1/target", json={"operationId": "x", "size": 3})
    assert answer.status_code == 401


async def bad_joiner(group: Local, name: str, *flags: str, **more: object) -> str:
    """Why an instance that joins by hand can't serve."""
    command = more.pop("command", None)
    process = group.join(name, *flags, command=command, **more)  # type: ignore[arg-type]
    try:

        def reason(status: Status) -> str:
            found = [one for one in status["instances"] if one["instance"] == name]
            said = found[0]["reason"] if found else ""
            return "" if any(word in said for word in ("imported", "awaited")) else said

        status = await group.until(f"a reason against {name}", reason)
        return reason(status)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 40)


async def test_joiners_that_do_not_fit(group: Local, tmp_path: Path) -> None:
    """Each is told why, in the status, and nobody is disturbed."""
    dense = str(model_folder(tmp_path / "dense", hidden_size=8))
    other = str(model_folder(tmp_path / "other", num_experts=16))
    flag = ["--enforce-eager"]
    serve = list(group.profile.command)
    lines = await asyncio.gather(
        bad_joiner(group, "old", ELASTICMOE_ENGINE_VERSION="0.32.1"),
        bad_joiner(group, "dense", command=["vllm", "serve", dense]),
        bad_joiner(group, "none", ELASTICMOE_NUM_EXPERTS="0"),
        bad_joiner(group, "other", command=["vllm", "serve", other]),
        bad_joiner(group, "flags", command=[*serve, *flag]),
    )
    old, no_moe, none, model, flags = lines
    assert old == "vLLM 0.32.1 is too old for elastic EP: use an image with vLLM 0.33 or newer"
    assert "has no routed experts: elastic EP needs a Mixture-of-Experts model" in no_moe
    assert "has no routed experts" in none
    assert f"it serves {other} (16 experts), r0 serves {serve[2]} (16)" in model
    assert model.endswith("start it with the same model")
    assert "its flags differ from r0's (only here: --enforce-eager): start it with" in flags


async def test_a_joiner_with_keys_of_another_group(group: Local, tmp_path: Path) -> None:
    """Nobody lets it in; its own log says what to check."""
    ensure_keys(tmp_path)
    process = group.join("stranger", "--keys", str(tmp_path))
    try:
        line = "no answer from the coordinator at"
        while line not in group.join_log("stranger"):
            assert process.poll() is None
            await asyncio.sleep(0.1)
        [said] = [text for text in group.join_log("stranger").splitlines() if line in text]
        assert f"check the address, and that the keys in {tmp_path}" in said
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 40)
    known = await asyncio.to_thread(group.status)
    assert "stranger" not in [one["instance"] for one in known["instances"]]


def test_a_joiner_with_keys_that_cannot_be_read(group: Local, tmp_path: Path) -> None:
    ensure_keys(tmp_path)
    (tmp_path / "sidecar.json").unlink()
    process = group.join("keyless", "--keys", str(tmp_path))
    assert process.wait(40) == 2
    [line] = group.join_log("keyless").splitlines()
    assert f"there is no {tmp_path}/sidecar.json: copy it from where" in line


def test_a_name_that_is_taken(group: Local) -> None:
    """A second r1 is not let in as long as the first is there."""
    process = group.join("r1")
    try:
        line = "another instance is registered as r1: give this one another name"
        until(lambda: line in group.join_log("r1"), 40)
    finally:
        process.terminate()
        process.wait(40)


def test_keys_that_vanish_from_a_running_coordinator(group: Local) -> None:
    """It says so to whoever asks for a change, and serves on."""
    folder = group.group.keys_dir
    kept = folder.parent / "kept-token"
    shutil.move(folder / "token", kept)
    try:
        answer = httpx.put(
            f"{group.api._url}/v1/target",
            json={"operationId": "x", "size": 3},
            headers={"Authorization": "Bearer x"},
        )
        assert answer.status_code == 503
        assert f"there is no {folder}/token" in answer.json()["error"]["message"]
    finally:
        shutil.move(kept, folder / "token")


async def test_a_middle_rank_that_wants_to_leave(
    cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The reason for the restart that it costs is told, and so is what is missing afterwards."""
    with local_group(tmp_path_factory.mktemp("m"), 3, max_size=3) as group:
        async with group.users():
            transport = httpx.AsyncHTTPTransport(
                uds=str(group.group.run_dir("r1") / "sidecar.sock")
            )
            async with httpx.AsyncClient(transport=transport, timeout=40) as client:
                answer = await client.post("http://sidecar/leave")
            assert answer.json() == {"released": True}
            status = await group.serves(2)
    last = status["history"][-1]
    assert (last["kind"], last["state"]) == ("restart", "succeeded")
    assert last["reason"] == "r1 leaves from the middle: engines drop only their highest rank"
    assert status["reason"] == "TooFewInstances"
    assert "2 of 3 instances can serve" in status["message"]


def test_the_token_is_nobody_elses_to_read(group: Local) -> None:
    for file in ("token", "coordinator.json", "sidecar.json"):
        assert os.stat(group.group.keys_dir / file).st_mode & 0o077 == 0
    assert json.loads((group.group.keys_dir / "sidecar.json").read_text())["server"]
