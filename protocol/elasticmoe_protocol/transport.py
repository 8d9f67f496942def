"""Frames over ZeroMQ with CURVE: ROUTER at the coordinator, DEALER at each sidecar.

What can't be read is counted by reason, logged once a minute and dropped. Nothing that arrives can
take a process down, and no send ever waits: goals and reports are said again anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from elasticmoe_protocol import keys
from elasticmoe_protocol.codec import (
    FrameError,
    WrongVersion,
    decode_for_coordinator,
    decode_for_sidecar,
    encode,
)
from elasticmoe_protocol.messages import Refused, ToCoordinator, ToSidecar

logger = logging.getLogger(__name__)

QUEUE = 64
"""Messages that wait for one peer; what is more is dropped and said again."""
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2000
LOG_EVERY_S = 60.0
KEYS_EVERY_S = 1.0
_DOMAIN = "elasticmoe"


class Dropped:
    """Counts frames that could not be used, and says so once a minute for each reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._told: dict[str, float] = {}

    def note(self, reason: str, text: str) -> None:
        """One more."""
        self.counts[reason] += 1
        now = time.monotonic()
        if now - self._told.get(reason, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._told[reason] = now
            logger.warning("dropped a message (%s): %s", reason, text)


class _ClientKeys:
    """Which clients may come in (ZAP); read again when the key file changes."""

    def __init__(self, folder: Path, dropped: Dropped) -> None:
        self._file = folder / keys.COORDINATOR_FILE
        self._folder, self._dropped = folder, dropped
        self._stamp, self._looked = 0, -KEYS_EVERY_S
        self._known: frozenset[bytes] = frozenset()

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by pyzmq for each new connection, with the key in Z85."""
        self._refresh()
        known = key in self._known
        if not known:
            self._dropped.note("wrong_key", "a client with an unknown key wanted to connect")
        return known

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < KEYS_EVERY_S:
            return
        self._looked = now
        with contextlib.suppress(OSError):
            stamp = self._file.stat().st_mtime_ns
            if stamp != self._stamp:
                loaded = keys.load_coordinator(self._folder)
                self._known = frozenset(key.encode() for key in loaded.clients)
                self._stamp = stamp


class CoordinatorSocket:
    """All sidecars' connections. Used as an async context manager.

    Raises OSError from the start when the address is taken, KeysError for bad keys.
    """

    def __init__(self, bind: str, keys_dir: Path) -> None:
        self._bind, self._keys_dir = bind, keys_dir
        self._context = zmq.asyncio.Context()
        self._peers: dict[str, bytes] = {}
        self.dropped = Dropped()
        self.endpoint = bind

    async def __aenter__(self) -> CoordinatorSocket:
        pair = keys.load_coordinator(self._keys_dir).pair
        self._auth = AsyncioAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback(
            _DOMAIN, credentials_provider=_ClientKeys(self._keys_dir, self.dropped)
        )
        socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, QUEUE)
        socket.set(zmq.MAXMSGSIZE, 2 << 20)
        socket.set(zmq.ROUTER_HANDOVER, 1)
        socket.set(zmq.HEARTBEAT_IVL, 2000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 10000)
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN.encode())
        socket.curve_server = True
        socket.curve_secretkey = pair.secret.encode()
        socket.curve_publickey = pair.public.encode()
        try:
            socket.bind(self._bind)
        except zmq.ZMQError as error:
            socket.close()
            self._close()
            raise OSError(f"{self._bind} can't be used ({error}): choose another --bind") from None
        endpoint = socket.get(zmq.LAST_ENDPOINT)
        self.endpoint = endpoint.decode() if isinstance(endpoint, bytes) else self._bind
        self._socket = socket
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()
        self._close()

    def _close(self) -> None:
        self._auth.stop()
        self._context.term()

    async def receive(self) -> tuple[bytes, ToCoordinator]:
        """The next message that can be read, and the connection that it came by."""
        while True:
            frames = await self._socket.recv_multipart()
            message = await self._read(frames)
            if message is not None:
                return frames[0], message

    async def has_more(self) -> bool:
        """Whether something has arrived already."""
        return bool(await self._socket.poll(0))

    async def _read(self, frames: list[bytes]) -> ToCoordinator | None:
        try:
            return decode_for_coordinator(frames[1:])
        except WrongVersion as error:
            self.dropped.note(error.kind, str(error))
            await self.answer(frames[0], Refused(deployment="", reason=str(error)))
        except FrameError as error:
            self.dropped.note(error.kind, str(error))
        return None

    def adopt(self, instance: str, route: bytes) -> None:
        """From now on `instance` is who speaks over this connection."""
        self._peers[instance] = route

    def instance_of(self, route: bytes) -> str:
        """Who speaks over this connection, "" when nobody was adopted."""
        return next((name for name, known in self._peers.items() if known == route), "")

    async def send(self, instance: str, message: ToSidecar) -> None:
        """Send to an adopted instance, or drop it when that can't be done at once."""
        route = self._peers.get(instance)
        if route is not None:
            await self.answer(route, message)

    async def answer(self, route: bytes, message: ToSidecar) -> None:
        """Send over a connection, or drop it when that can't be done at once."""
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send_multipart([route, *encode(message)], zmq.NOBLOCK)


class SidecarSocket:
    """The connection to the coordinator; it comes back by itself. An async context manager."""

    def __init__(self, address: str, keys_dir: Path) -> None:
        self._address, self._keys_dir = address, keys_dir
        self._name = b"s" + uuid.uuid4().bytes  # one that begins with 0 is ZeroMQ's own
        self._context = zmq.asyncio.Context()
        self.dropped = Dropped()

    async def __aenter__(self) -> SidecarSocket:
        self._stamp = self._key_stamp()
        self._socket = self._connect()
        self._renewal = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._renewal.cancel()
        self._socket.close()
        self._context.term()

    def _connect(self) -> zmq.asyncio.Socket:
        own = keys.load_sidecar(self._keys_dir)
        socket = self._context.socket(zmq.DEALER)
        # The same name after a reconnection: the coordinator's answers find the way.
        socket.set(zmq.ROUTING_ID, self._name)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, QUEUE)
        socket.set(zmq.MAXMSGSIZE, 2 << 20)
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.set(zmq.HEARTBEAT_IVL, 2000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 10000)
        # Without a connection nothing queues up: what is old when it arrives helps nobody.
        socket.set(zmq.IMMEDIATE, 1)
        socket.curve_serverkey = own.server.encode()
        socket.curve_secretkey = own.pair.secret.encode()
        socket.curve_publickey = own.pair.public.encode()
        try:
            socket.connect(self._address)
        except zmq.ZMQError as error:
            socket.close()
            raise OSError(
                f"{self._address} is no address of a coordinator ({error}): give tcp://HOST:PORT"
            ) from None
        return socket

    async def send(self, message: ToCoordinator) -> None:
        """Send, or drop it when that can't be done at once."""
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send_multipart(encode(message), zmq.NOBLOCK)

    async def receive(self) -> ToSidecar:
        """The next message that can be read."""
        while True:
            socket = self._socket
            if not await socket.poll(1000) or socket is not self._socket:
                continue
            frames = await socket.recv_multipart()
            try:
                return decode_for_sidecar(frames)
            except FrameError as error:
                self.dropped.note(error.kind, str(error))

    def _key_stamp(self) -> int:
        try:
            return (self._keys_dir / keys.SIDECAR_FILE).stat().st_mtime_ns
        except OSError:
            return 0

    async def _renew(self) -> None:
        """Connect anew when the keys were rotated."""
        while True:
            await asyncio.sleep(KEYS_EVERY_S)
            stamp = self._key_stamp()
            if stamp in (0, self._stamp):
                continue
            self._stamp = stamp
            with contextlib.suppress(OSError):
                fresh = self._connect()
                old, self._socket = self._socket, fresh
                old.close()
