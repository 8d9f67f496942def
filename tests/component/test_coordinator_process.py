"""`elasticmoe coordinator` as a process: how it starts, what it says when it can't, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from elasticmoe_coordinator import server
from elasticmoe_protocol import keys
from elasticmoe_protocol.messages import (
    Goal,
    Introduce,
    Member,
    OperationRecord,
    Record,
    Refused,
)
from elasticmoe_protocol.transport import SidecarSocket
from support.sidecar import until
from support.words import goal, hello, report

LIMIT_S = 30.0
PROGRAM = Path(sys.executable).with_name("elasticmoe")


class Coordinator:
    """One process. ready: what its ready file says."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home, self.keys, self.log = home, home / "keys", home / "coordinator.log"
        self.ready_file = home / "ready.json"
        self._options = [
            *("--keys", str(self.keys), "--bind", "tcp://127.0.0.1:*", "--http-port", "0"),
            *("--ready-file", str(self.ready_file), *options),
        ]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                PROGRAM, "coordinator", *self._options, stdout=log, stderr=log
            )

    async def is_ready(self) -> dict[str, Any]:
        await until(lambda: self.ready_file.exists() or self.over, "it is ready", LIMIT_S)
        assert not self.over, self.lines
        found: dict[str, Any] = json.loads(self.ready_file.read_text())
        return found

    @property
    def over(self) -> bool:
        return self._process is not None and self._process.returncode is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        assert self._process is not None
        async with asyncio.timeout(LIMIT_S):
            return await self._process.wait()

    async def __aenter__(self) -> Coordinator:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.over:
            self.signal(signal.SIGKILL)
            await self.ended()


def message(line: str) -> str:
    """Without time and level."""
    return re.sub(r"^[-0-9]+ [0-9:,]+ [A-Z]+ ", "", line)


async def refuses(home: Path, *options: str) -> str:
    """It ends with status 2 and one line, which is returned."""
    async with Coordinator(home, *options) as process:
        assert await process.ended() == 2, process.lines
        assert len(process.lines) == 1, process.lines
        assert not process.ready_file.exists()
        line = message(process.lines[0])
    assert "Errno" not in line
    assert "Traceback" not in line
    return line


@contextlib.contextmanager
def taken() -> Any:
    """A port that somebody else has."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@contextlib.asynccontextmanager
async def api(ready: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=ready["http"], trust_env=False) as client:
        yield client


# --- it starts -----------------------------------------------------------------------------------


async def test_it_makes_its_keys_says_where_it_is_and_ends_with_0_on_sigterm(tmp_path: Path):
    async with Coordinator(tmp_path) as process:
        ready = await process.is_ready()
        assert ready["pid"] == process.pid
        assert re.fullmatch(r"tcp://127\.0\.0\.1:\d+", ready["zmq"])
        # All ports are open when the file is there.
        async with api(ready) as http:
            assert (await http.get("/healthz")).text == "ok"
        keys.load_coordinator(process.keys)
        keys.load_sidecar(process.keys)
        assert keys.load_token(process.keys)
        first = message(process.lines[0])
        assert first == f"coordinator of moe: sidecars at {ready['zmq']}, HTTP at {ready['http']}"
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
        assert not [line for line in process.lines if "ERROR" in line or "Traceback" in line]


def test_the_port_takes_connections_from_the_moment_it_is_ours():
    """So nobody who reads the ready file comes too early, and no second one gets it too."""
    with server._listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address, timeout=LIMIT_S):
            pass
        with pytest.raises(OSError, match="choose another --http-port"):
            server._listen(*address)


@pytest.mark.parametrize("host", ["::", "[::]"])
async def test_its_http_api_can_be_on_ipv6(tmp_path: Path, host: str):
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    async with Coordinator(tmp_path, "--http-host", host) as process:
        told = (await process.is_ready())["http"]
        assert told.startswith("http://[::]:")
        for address in ("[::1]", "127.0.0.1"):
            url = told.replace("[::]", address)
            async with httpx.AsyncClient(trust_env=False) as http:
                assert (await http.get(f"{url}/healthz")).text == "ok"


async def test_it_ends_with_0_on_ctrl_c(tmp_path: Path):
    async with Coordinator(tmp_path) as process:
        await process.is_ready()
        process.signal(signal.SIGINT)
        assert await process.ended() == 0
        assert "Traceback" not in process.log.read_text()


async def test_a_request_that_never_ends_does_not_keep_it(tmp_path: Path):
    async with Coordinator(tmp_path) as process:
        ready = await process.is_ready()
        host, port = ready["http"].removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PUT /v1/target HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        async with api(ready) as http:
            await http.get("/healthz")  # so the other one's head was read before
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
        writer.close()


async def test_its_port_is_free_again_for_the_next_one(tmp_path: Path):
    """Also while connections of the one before are not quite gone."""
    async with Coordinator(tmp_path) as process:
        ready = await process.is_ready()
        async with api(ready) as http:
            await http.get("/healthz")
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
    process.ready_file.unlink()
    port = ready["http"].rpartition(":")[2]
    async with Coordinator(tmp_path, "--http-port", port, "--bind", ready["zmq"]) as again:
        found = await again.is_ready()
        assert (found["http"], found["zmq"]) == (ready["http"], ready["zmq"])


# --- it can't start ------------------------------------------------------------------------------


async def test_a_http_port_in_use_is_told(tmp_path: Path):
    with taken() as port:
        line = await refuses(tmp_path, "--http-port", str(port))
    assert f"127.0.0.1:{port} can't be used" in line
    assert "choose another --http-port" in line


async def test_a_port_for_sidecars_in_use_is_told(tmp_path: Path):
    with taken() as port:
        line = await refuses(tmp_path, "--bind", f"tcp://127.0.0.1:{port}")
    assert f"tcp://127.0.0.1:{port} can't be used" in line
    assert "choose another --bind" in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(["--bind", "nowhere"], "choose another --bind", id="no address"),
        pytest.param(["--http-host", "no.such.host.invalid"], "--http-host", id="no host"),
        pytest.param(["--min-size", "1"], "the smallest size is 2, not 1", id="min"),
        pytest.param(["--max-size", "1"], "max size 1 is under min size 2: raise it", id="max"),
        pytest.param(
            ["--size", "9"], "size 9 is not between 2 and 8: choose one that is", id="size"
        ),
        pytest.param(["--ready-file", "/no/such/ready"], "choose another --ready-file", id="ready"),
        pytest.param(["--keys", "/dev/null"], "choose another folder", id="keys"),
    ],
)
async def test_an_option_that_can_not_be_is_told_in_one_line(
    tmp_path: Path, options: list[str], expected: str
):
    assert expected in await refuses(tmp_path, *options)


async def test_damaged_keys_are_told(tmp_path: Path):
    keys.ensure_keys(tmp_path / "keys")
    (tmp_path / "keys" / keys.COORDINATOR_FILE).write_text("{}")
    assert "is not a key file" in await refuses(tmp_path)


# --- it works ------------------------------------------------------------------------------------


async def test_a_sidecar_of_another_deployment_is_refused_with_a_line(tmp_path: Path):
    async with Coordinator(tmp_path, "--deployment", "ours") as process:
        ready = await process.is_ready()
        async with SidecarSocket(ready["zmq"], process.keys) as link, asyncio.timeout(LIMIT_S):
            await until(lambda: link.connected, "connected")
            await link.send(hello(deployment="theirs"))
            line = "this coordinator is for ours, not for theirs"
            assert await link.receive() == Refused(deployment="ours", reason=line)
        async with api(ready) as http:
            assert (await http.get("/v1/status")).json()["instances"] == []


async def test_a_registered_instance_is_in_the_status(tmp_path: Path):
    async with Coordinator(tmp_path, "--deployment", "d") as process:
        ready = await process.is_ready()
        async with (
            SidecarSocket(ready["zmq"], process.keys) as link,
            api(ready) as http,
            asyncio.timeout(LIMIT_S),
        ):
            await until(lambda: link.connected, "connected")
            await link.send(report())
            assert await link.receive() == Introduce(deployment="d")
            await link.send(hello())
            seq = 0
            while not isinstance(await say(link, seq), Goal):
                seq += 1
            status = (await http.get("/v1/status")).json()
            assert [one["instance"] for one in status["instances"]] == ["i0"]
            assert status["instances"][0]["registered"] is True
            metrics = (await http.get("/metrics")).text
            assert 'elasticmoe_instance_ready{instance="i0"} 0.0' in metrics


async def say(link: SidecarSocket, seq: int) -> object:
    """A report, and what is answered within a heartbeat."""
    await link.send(report(seq=seq))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            return await link.receive()
    return None


async def test_operations_of_a_coordinator_before_are_not_counted_again(tmp_path: Path):
    """They are in its history, and were counted by the one that ran them."""
    ended = OperationRecord(
        id="old",
        kind="start",
        from_size=0,
        to_size=2,
        phase="",
        state="succeeded",
        started=1000.0,
        ended=1010.0,
    )
    record = Record(
        generation=3,
        members=(Member(instance="i0", rank=0, launch="L"),),
        desired=2,
        slots=4,
        history=(ended,),
    )
    async with Coordinator(tmp_path, "--deployment", "d") as process:
        ready = await process.is_ready()
        async with (
            SidecarSocket(ready["zmq"], process.keys) as link,
            api(ready) as http,
            asyncio.timeout(LIMIT_S),
        ):
            await until(lambda: link.connected, "connected")
            await link.send(hello(accepted=goal(record=record)))
            seq = 0
            while not isinstance(await say(link, seq), Goal):
                seq += 1
            status = (await http.get("/v1/status")).json()
            assert "old" in [one["id"] for one in status["history"]]
            metrics = (await http.get("/metrics")).text
            assert 'elasticmoe_operations_total{kind="start"' not in metrics


async def test_a_target_is_put_with_the_token_of_the_keys_folder(tmp_path: Path):
    async with Coordinator(tmp_path) as process:
        ready = await process.is_ready()
        async with api(ready) as http, asyncio.timeout(LIMIT_S):
            while (await http.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            body = {"operationId": "first", "size": 3}
            assert (await http.put("/v1/target", json=body)).status_code == 401
            bearer = {"Authorization": f"Bearer {keys.load_token(process.keys)}"}
            response = await http.put("/v1/target", json=body, headers=bearer)
            assert response.status_code in (200, 202)
            assert (await http.get("/v1/status")).json()["desired"] == 3


@pytest.mark.parametrize("content", [b"", b"{", b'{"term":"\xff"}', b'{"deployment":"other"}'])
async def test_a_state_file_that_is_no_use_is_told_and_left(tmp_path: Path, content: bytes):
    state = tmp_path / "state.json"
    state.write_bytes(content)
    async with Coordinator(tmp_path, "--state-file", str(state)) as process:
        ready = await process.is_ready()
        async with api(ready) as http:
            assert (await http.get("/healthz")).status_code == 200
        told = [line for line in process.lines if "is not used" in line]
        assert len(told) == 1
        assert str(state) in told[0]
