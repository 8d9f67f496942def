"""Coordinator and sidecars over real ZeroMQ sockets with CURVE, and whoever else knocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from elasticmoe_coordinator.core.config import GroupConfig
from elasticmoe_coordinator.server import Server
from elasticmoe_coordinator.settings import CoordinatorSettings
from elasticmoe_protocol import codec, keys, transport
from elasticmoe_protocol.codec import encode
from elasticmoe_protocol.keys import KeysError, ensure_keys
from elasticmoe_protocol.messages import Goal, Hello, Refused, ToCoordinator, ToSidecar
from elasticmoe_protocol.transport import CoordinatorSocket, Dropped, SidecarSocket
from support.sidecar import until
from support.words import facts, goal, hello, report

ANY = "tcp://127.0.0.1:*"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    ensure_keys(made)
    return made


@pytest.fixture
def stranger(tmp_path: Path, folder: Path) -> Path:
    """Keys of somebody who knows the coordinator and is not known to it."""
    made = tmp_path / "stranger"
    ensure_keys(made)
    own, server = keys.load_sidecar(made), keys.load_coordinator(folder).pair.public
    keys._write(made, keys.SIDECAR_FILE, keys._text(msgspec.structs.replace(own, server=server)))
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key files are looked at, and connections made again, sooner than in production."""
    monkeypatch.setattr(transport, "KEYS_EVERY_S", 0.05)
    monkeypatch.setattr(transport, "AGAIN_S", 0.5)


class Heard:
    """Reads all that comes to one side."""

    def __init__(self, socket: Any) -> None:
        self.messages: list[Any] = []
        self.routes: list[bytes] = []
        self._task = asyncio.create_task(self._read(socket))

    async def _read(self, socket: Any) -> None:
        while True:
            found = await socket.receive()
            if isinstance(found, tuple):
                self.routes.append(found[0])
                found = found[1]
            if found is not None:
                self.messages.append(found)

    async def hears(self, message: ToCoordinator | ToSidecar) -> None:
        await until(lambda: message in self.messages, f"{message} arrived")

    async def stop(self) -> None:
        """What ended by itself is a failure."""
        ended = self._task.done()
        self._task.cancel()
        await asyncio.wait({self._task})
        assert not ended, self._task


@contextlib.asynccontextmanager
async def hearing(socket: Any) -> AsyncIterator[Heard]:
    made = Heard(socket)
    try:
        yield made
    finally:
        await made.stop()


class Raw:
    """A client that says what a sidecar would not. folder: whose keys it has; None: no CURVE."""

    def __init__(self, endpoint: str, folder: Path | None) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        if folder is not None:
            own = keys.load_sidecar(folder)
            self.socket.curve_serverkey = own.server.encode()
            self.socket.curve_secretkey = own.pair.secret.encode()
            self.socket.curve_publickey = own.pair.public.encode()
        self.socket.connect(endpoint)

    async def say(self, *frames: bytes) -> None:
        await self.socket.send_multipart(frames)

    async def hear(self) -> list[bytes]:
        async with asyncio.timeout(10):
            return list(await self.socket.recv_multipart())

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


async def insist(sidecar: SidecarSocket, message: ToCoordinator, heard: Heard) -> None:
    """As an agent does: say it until it arrived (before the connection stands it is dropped)."""
    before = len(heard.messages)
    async with asyncio.timeout(20):
        while message not in heard.messages[before:]:
            await sidecar.send(message)
            await asyncio.sleep(0.02)


# --- a good pair ---------------------------------------------------------------------------------


async def test_a_sidecar_and_its_coordinator_talk(folder: Path):
    async with (
        CoordinatorSocket(ANY, folder) as boss,
        SidecarSocket(boss.endpoint, folder) as sidecar,
        hearing(boss) as up,
        hearing(sidecar) as down,
    ):
        await insist(sidecar, hello(), up)
        route = up.routes[0]
        assert boss.instance_of(route) == ""
        boss.adopt("i0", route)
        assert boss.instance_of(route) == "i0"
        await boss.send("i0", goal())
        await down.hears(goal())
        await boss.answer(route, Refused(deployment="d", reason="no"))
        await down.hears(Refused(deployment="d", reason="no"))
        await sidecar.send(report())
        await up.hears(report())
        assert set(up.routes) == {route}
        assert not boss.dropped.counts
        assert not sidecar.dropped.counts


async def test_what_is_said_to_nobody_is_dropped(folder: Path):
    async with CoordinatorSocket(ANY, folder) as boss:
        await boss.send("nobody", goal())
        await boss.answer(b"never seen", goal())


async def test_a_sidecar_says_nothing_old_when_its_coordinator_comes(folder: Path):
    async with CoordinatorSocket(ANY, folder) as first:
        endpoint = first.endpoint
    async with SidecarSocket(endpoint, folder) as sidecar:
        for number in range(2 * transport.QUEUE):
            await sidecar.send(report(error="old", seq=number))
        async with CoordinatorSocket(endpoint, folder) as boss, hearing(boss) as up:
            await insist(sidecar, report(error="new"), up)
            assert {message.error for message in up.messages} == {"new"}


async def test_a_sidecar_comes_back_by_itself_under_the_same_name(folder: Path):
    async with CoordinatorSocket(ANY, folder) as boss:
        endpoint = boss.endpoint
    routes: set[bytes] = set()
    async with SidecarSocket(endpoint, folder) as sidecar:
        for seq in range(3):
            async with CoordinatorSocket(endpoint, folder) as boss, hearing(boss) as up:
                await insist(sidecar, report(seq=seq), up)
                routes.update(up.routes)
    assert len(routes) == 1


async def test_a_coordinator_does_not_wait_for_one_that_does_not_read(folder: Path):
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        with Raw(boss.endpoint, folder) as mute:
            mute.socket.set(zmq.RCVHWM, 1)
            await mute.say(*encode(hello()))
            await up.hears(hello())
            async with asyncio.timeout(20):
                for _ in range(200):
                    await boss.answer(up.routes[0], goal(operation="x" * 100_000))


# --- who may not come in -------------------------------------------------------------------------


async def test_a_client_with_a_wrong_key_is_refused_counted_and_harms_nobody(
    folder: Path, stranger: Path, caplog: pytest.LogCaptureFixture
):
    async with (
        CoordinatorSocket(ANY, folder) as boss,
        SidecarSocket(boss.endpoint, stranger) as other,
        hearing(boss) as up,
    ):
        await until(lambda: boss.dropped.counts["wrong_key"] > 0, "it was refused")
        await other.send(report("stranger"))
        async with SidecarSocket(boss.endpoint, folder) as sidecar:
            await insist(sidecar, report(), up)
        assert {message.instance for message in up.messages} == {"i0"}
        assert not other.connected
    lines = [record.getMessage() for record in caplog.records if "wrong_key" in record.message]
    assert len(lines) == 1


@pytest.mark.usefixtures("quick")
async def test_a_client_that_was_refused_comes_in_once_its_key_is_known(
    folder: Path, stranger: Path
):
    """New keys may reach a sidecar before they reach the coordinator."""
    async with (
        CoordinatorSocket(ANY, folder) as boss,
        SidecarSocket(boss.endpoint, stranger) as other,
        hearing(boss) as up,
    ):
        await until(lambda: boss.dropped.counts["wrong_key"] > 1, "it was refused repeatedly")
        known = keys.load_coordinator(folder)
        clients = (*known.clients, keys.load_sidecar(stranger).pair.public)
        text = keys._text(msgspec.structs.replace(known, clients=clients))
        keys._write(folder, keys.COORDINATOR_FILE, text)
        await insist(other, report(), up)


async def test_a_coordinator_that_is_not_the_own_one_hears_nothing(folder: Path, tmp_path: Path):
    """A client believes only the server whose key it has."""
    ensure_keys(tmp_path / "other")
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        async with SidecarSocket(boss.endpoint, tmp_path / "other") as lost:
            async with SidecarSocket(boss.endpoint, folder) as sidecar:
                for _ in range(5):
                    await lost.send(report("lost"))
                    await insist(sidecar, report(), up)
            assert not lost.connected
        assert {message.instance for message in up.messages} == {"i0"}


async def test_without_curve_nobody_is_heard(folder: Path):
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        with Raw(boss.endpoint, None) as plain:
            await plain.say(*encode(report("plain")))
            async with SidecarSocket(boss.endpoint, folder) as sidecar:
                await insist(sidecar, report(), up)
        assert {message.instance for message in up.messages} == {"i0"}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="HTTP"),
        pytest.param(b"\xff" * 4096, id="noise"),
        pytest.param(
            b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00CURVE", id="half a greeting"
        ),
    ],
)
async def test_what_is_no_zeromq_at_all_harms_nobody(folder: Path, words: bytes):
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        host, port = boss.endpoint.removeprefix("tcp://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(words)
        await writer.drain()
        async with SidecarSocket(boss.endpoint, folder) as sidecar:
            await insist(sidecar, report(), up)
        writer.close()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"pair":"\xff"}'], ids=["empty", "list", "bytes"]
)
async def test_a_key_file_that_is_damaged_meanwhile_takes_nobodys_key_away(
    folder: Path, tmp_path: Path, content: bytes
):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        async with SidecarSocket(boss.endpoint, copy) as sidecar:
            await insist(sidecar, report(), up)
        (folder / keys.COORDINATOR_FILE).write_bytes(content)
        async with SidecarSocket(boss.endpoint, copy) as again:
            await insist(again, report(seq=1), up)


# --- frames that can't be read -------------------------------------------------------------------

BAD = [
    pytest.param("malformed", [b"EMOE1", b"\xc1"], id="malformed"),
    pytest.param("malformed", [b"what?"], id="no protocol"),
    pytest.param("malformed", [b"EMOE1"], id="no body"),
    pytest.param("malformed", [b""], id="nothing"),
    pytest.param("malformed", [b"EMOE1", b"\x80", b"\x80"], id="three frames"),
    pytest.param("too_large", [b"EMOE1", b"\xc4" + bytes(codec.MAX_BYTES)], id="one byte too much"),
    pytest.param(
        "unknown_type",
        [b"EMOE1", msgspec.msgpack.encode({"type": "dance\n" * 1000})],
        id="unknown type",
    ),
    pytest.param("wrong_version", [b"EMOE7", b"later"], id="another version"),
]


@pytest.mark.parametrize(("reason", "frames"), BAD)
async def test_a_bad_frame_is_counted_logged_once_and_the_connection_goes_on(
    folder: Path, caplog: pytest.LogCaptureFixture, reason: str, frames: list[bytes]
):
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        with Raw(boss.endpoint, folder) as client:
            for _ in range(3):
                await client.say(*frames)
            await client.say(*encode(report()))
            await up.hears(report())
        assert boss.dropped.counts == {reason: 3}
        assert up.messages == [report()]
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert lines[0].startswith(f"dropped a message ({reason}): ")
    assert "\n" not in lines[0]
    assert len(lines[0]) < 400


async def test_a_sidecar_drops_bad_frames_too(folder: Path, caplog: pytest.LogCaptureFixture):
    own = keys.load_coordinator(folder).pair
    boss = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    boss.set(zmq.LINGER, 0)
    boss.curve_server = True
    boss.curve_secretkey, boss.curve_publickey = own.secret.encode(), own.public.encode()
    port = boss.bind_to_random_port("tcp://127.0.0.1")
    try:
        async with (
            SidecarSocket(f"tcp://127.0.0.1:{port}", folder) as sidecar,
            hearing(sidecar) as down,
        ):
            await until(lambda: sidecar.connected, "connected")
            await sidecar.send(hello())
            route, *_ = await boss.recv_multipart()
            for param in BAD:
                await boss.send_multipart([route, *param.values[1]])
            await boss.send_multipart([route, *encode(report())])
            await boss.send_multipart([route, *encode(goal())])
            await down.hears(goal())
            assert down.messages == [goal()]
            assert sidecar.dropped.counts == {
                "malformed": 5,
                "too_large": 1,
                "unknown_type": 2,
                "wrong_version": 1,
            }
    finally:
        boss.close()
    told = next(record.getMessage() for record in caplog.records if "wrong_v" in record.message)
    assert "version 7" in told
    assert f"this side {codec.VERSION}" in told


async def test_a_frame_past_all_bounds_ends_its_connection_only(folder: Path):
    """ZeroMQ does not even take it in; its sender may come back."""
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        with Raw(boss.endpoint, folder) as client:
            async with SidecarSocket(boss.endpoint, folder) as sidecar:
                await insist(sidecar, report(), up)
                await client.say(b"EMOE1", bytes(8 << 20))
                await insist(sidecar, report(seq=1), up)
                async with asyncio.timeout(20):
                    while report("client") not in up.messages:
                        await client.say(*encode(report("client")))
                        await asyncio.sleep(0.05)
        assert {message.instance for message in up.messages} == {"i0", "client"}
        assert not boss.dropped.counts


async def test_who_speaks_another_version_is_told_both(folder: Path):
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss):
        with Raw(boss.endpoint, folder) as later:
            await later.say(b"EMOE7", b"whatever a later version says")
            head, body = await later.hear()
    assert head == b"EMOE%d" % codec.VERSION
    said = msgspec.msgpack.decode(body)
    assert said["type"] == "refused"
    assert "version 7" in said["reason"]
    assert f"this side {codec.VERSION}" in said["reason"]


async def test_the_version_before_is_answered_as_any_other(folder: Path):
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        with Raw(boss.endpoint, folder) as earlier:
            await earlier.say(b"EMOE%d" % (codec.VERSION - 1), encode(report())[1])
            await up.hears(report())
        assert not boss.dropped.counts


async def test_what_is_too_long_to_send_is_counted_and_raises_nothing(folder: Path):
    long = "x" * codec.MAX_BYTES
    async with (
        CoordinatorSocket(ANY, folder) as boss,
        SidecarSocket(boss.endpoint, folder) as sidecar,
        hearing(boss) as up,
        hearing(sidecar) as down,
    ):
        await insist(sidecar, hello(), up)
        boss.adopt("i0", up.routes[0])
        await sidecar.send(report(error=long))
        await boss.send("i0", goal(operation=long))
        await boss.send("i0", goal(seq=1 << 64))
        await boss.send("i0", goal())
        await down.hears(goal())
        assert sidecar.dropped.counts == {"too_large": 1}
        assert boss.dropped.counts == {"too_large": 1, "malformed": 1}


def test_each_reason_is_logged_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    times = iter([5.0, 5.1, 64.9, 64.9, 65.0])
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: next(times)))
    dropped = Dropped()
    for _ in range(3):
        dropped.note("malformed", "first")
    dropped.note("too_large", "another")
    dropped.note("malformed", "second")
    assert [record.getMessage() for record in caplog.records] == [
        "dropped a message (malformed): first",
        "dropped a message (too_large): another",
        "dropped a message (malformed): second",
    ]
    assert dropped.counts == {"malformed": 4, "too_large": 1}


# --- a whole server ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[tuple[Server, CoordinatorSocket]]:
    config = GroupConfig(deployment="d", size=2, heartbeat=0.1, **changes)
    async with CoordinatorSocket(ANY, folder) as sockets:
        server = Server(CoordinatorSettings(group=config, keys_dir=folder), sockets)
        working = asyncio.create_task(server.run())
        try:
            yield server, sockets
        finally:
            ended = working.done()
            working.cancel()
            await asyncio.wait({working})
            assert not ended, working


class Reporter:
    """Says Hello and reports, as an agent does."""

    def __init__(self, socket: SidecarSocket, hello: Hello) -> None:
        self._socket, self._hello = socket, hello
        self._task = asyncio.create_task(self._talk())

    async def _talk(self) -> None:
        seq = 0
        while True:
            await self._socket.send(self._hello)
            word = report(self._hello.instance, seq, boot=self._hello.boot)
            await self._socket.send(word)
            seq += 1
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


async def test_a_name_belongs_to_one_connection_until_that_is_gone(folder: Path):
    """Then the newer one has it, and what is said to the name goes there."""
    first = hello(incarnation="first", boot="b1")
    second = hello(incarnation="second", boot="b2")
    async with (
        serving(folder) as (server, sockets),
        SidecarSocket(sockets.endpoint, folder) as old,
        SidecarSocket(sockets.endpoint, folder) as new,
        hearing(old) as told_old,
        hearing(new) as told_new,
    ):

        def goals(heard: Heard) -> list[Goal]:
            return [one for one in heard.messages if isinstance(one, Goal)]

        older = Reporter(old, first)
        await until(lambda: bool(goals(told_old)), "the first has the name")
        newer = Reporter(new, second)
        await until(lambda: any(isinstance(one, Refused) for one in told_new.messages), "refused")
        line = next(one.reason for one in told_new.messages if isinstance(one, Refused))
        assert "another instance is registered as i0" in line
        assert not goals(told_new)
        await older.stop()
        await until(lambda: bool(goals(told_new)), "the second has the name")
        before = len(goals(told_old))
        begin = len(goals(told_new))
        await until(lambda: len(goals(told_new)) > begin, "goals are said again")
        assert len(goals(told_old)) == before
        assert len(server.group.status(0.0).instances) == 1
        await newer.stop()


async def test_what_can_not_be_read_does_not_stop_the_clock(folder: Path):
    """One word that can be read, and then nobody says another."""
    async with serving(folder) as (server, sockets):
        with Raw(sockets.endpoint, folder) as noisy:
            assert server.group.status(0.0).state == "Learning"
            for _ in range(5):
                await noisy.say(*encode(report()))
                for _ in range(20):
                    await noisy.say(b"noise")
            async with asyncio.timeout(20):
                while server.group.status(0.0).state == "Learning":
                    for _ in range(20):
                        await noisy.say(b"noise")
                    await asyncio.sleep(0.02)
        assert sockets.dropped.counts["malformed"] > 0


async def test_another_deployments_sidecar_is_refused_in_words(folder: Path):
    async with (
        serving(folder) as (server, sockets),
        SidecarSocket(sockets.endpoint, folder) as sidecar,
        hearing(sidecar) as down,
    ):
        await until(lambda: sidecar.connected, "connected")
        await sidecar.send(hello(deployment="other"))
        await sidecar.send(msgspec.structs.replace(report(), deployment="other"))
        expected = Refused(deployment="d", reason="this coordinator is for d, not for other")
        await until(lambda: len(down.messages) == 2, "both were answered")
        assert down.messages == [expected, expected]
        assert not server.group.status(0.0).instances


@pytest.mark.parametrize(
    "word",
    [
        pytest.param(
            hello(facts=facts(address="x" * 300, serving_port=-1, probe_port=1 << 40)),
            id="odd facts",
        ),
        pytest.param(hello(accepted=goal(term=(1 << 63) - 1)), id="the last term"),
        pytest.param(report(seq=(1 << 63) - 1, term=(1 << 63) - 1), id="a report of the last term"),
        pytest.param(
            Refused(deployment="d", reason="x\ny" * 1000, term=(1 << 63) - 1), id="refusal"
        ),
    ],
)
async def test_no_word_ends_the_server(folder: Path, word: ToCoordinator):
    async with (
        serving(folder) as (server, sockets),
        SidecarSocket(sockets.endpoint, folder) as odd,
        SidecarSocket(sockets.endpoint, folder) as sidecar,
        hearing(sidecar) as down,
    ):
        await until(lambda: odd.connected and sidecar.connected, "connected")
        await until(lambda: server.group.status(0.0).state != "Learning", "it leads")
        await odd.send(word)
        talking = Reporter(sidecar, hello("i1"))
        begin = len(down.messages)
        await until(lambda: len(down.messages) > begin, "it still answers")
        await talking.stop()


# --- rotation ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
async def test_keys_are_rotated_while_both_sides_talk(folder: Path, tmp_path: Path):
    """One sidecar gets the new file, one has the old file until the end."""
    late = tmp_path / "late"
    shutil.copytree(folder, late)
    async with (
        CoordinatorSocket(ANY, folder) as boss,
        SidecarSocket(boss.endpoint, folder) as sidecar,
        hearing(boss) as up,
        hearing(sidecar) as down,
    ):
        seq = 0

        async def talk() -> None:
            nonlocal seq
            seq += 1
            await insist(sidecar, report(seq=seq), up)
            boss.adopt("i0", up.routes[-1])
            async with asyncio.timeout(20):
                while goal(seq=seq) not in down.messages:
                    await boss.send("i0", goal(seq=seq))
                    await asyncio.sleep(0.01)

        await talk()
        for _ in range(3):
            old = sidecar._stamp
            keys.rotate(folder)
            await until(lambda old=old: sidecar._stamp != old, "it has the new keys")
            for _ in range(5):
                await talk()
        assert len(set(up.routes)) == 1
        # Who has the old keys still comes in, also anew.
        async with SidecarSocket(boss.endpoint, late) as other:
            await insist(other, report("late"), up)
        assert not boss.dropped.counts
        keys.finish(folder)
        await talk()
        async with SidecarSocket(boss.endpoint, late) as other:
            await until(lambda: boss.dropped.counts["wrong_key"] > 0, "the old keys are over")
            shutil.copy(folder / keys.SIDECAR_FILE, late / keys.SIDECAR_FILE)
            await insist(other, report("late", seq=1), up)
        await talk()


@pytest.mark.usefixtures("quick")
async def test_a_rotation_holds_at_once(folder: Path, tmp_path: Path):
    """No connection is judged by keys that are over, or before they are known."""
    async with CoordinatorSocket(ANY, folder) as boss, hearing(boss) as up:
        for number in range(5):
            copy = tmp_path / str(number)
            shutil.copytree(folder, copy)
            keys.rotate(folder)
            keys.finish(folder)
            async with SidecarSocket(boss.endpoint, copy):
                await until(
                    lambda number=number: boss.dropped.counts["wrong_key"] > number, "refused"
                )
            async with SidecarSocket(boss.endpoint, folder) as sidecar:
                await insist(sidecar, report(seq=number), up)
        assert boss.dropped.counts == {"wrong_key": 5}


# --- what does not even start --------------------------------------------------------------------


async def test_an_address_in_use_is_told(folder: Path):
    async with CoordinatorSocket(ANY, folder) as boss:
        with pytest.raises(OSError, match=r"can't be used .*: choose another --bind"):
            async with CoordinatorSocket(boss.endpoint, folder):
                pass


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1", "7410", "http://127.0.0.1:1", ""])
async def test_a_bind_that_is_no_address_is_told(folder: Path, bind: str):
    with pytest.raises(OSError, match=r"can't be used .*: choose another --bind"):
        async with CoordinatorSocket(bind, folder):
            pass


@pytest.mark.parametrize("address", ["127.0.0.1:7410", "tcp://", "http://127.0.0.1:1", ""])
async def test_a_coordinator_that_is_no_address_is_told(folder: Path, address: str):
    with pytest.raises(OSError, match="give tcp://HOST:PORT"):
        async with SidecarSocket(address, folder):
            pass


async def test_neither_side_starts_without_keys(tmp_path: Path):
    with pytest.raises(KeysError, match="copy it"):
        async with CoordinatorSocket(ANY, tmp_path):
            pass
    with pytest.raises(KeysError, match="copy it"):
        async with SidecarSocket("tcp://127.0.0.1:1", tmp_path):
            pass
