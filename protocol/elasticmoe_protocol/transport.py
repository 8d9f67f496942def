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
LINE = 300
"""Characters of a log line that quotes what arrived."""
KEYS_EVERY_S = 1.0
AGAIN_S = 5.0
"""A sidecar without a connection for so long connects anew: after a refusal ZeroMQ itself gives up
for good (measured, libzmq 4.3.5)."""
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
            line = " ".join(text.split())[:LINE]
            logger.warning("dropped a message (%s): %s", reason, line)


class _ClientKeys:
    """Which clients may come in (ZAP). The key file is read for each: a rotation holds at once."""

    def __init__(self, folder: Path, dropped: Dropped) -> None:
        self._folder, self._dropped = folder, dropped
        self._known: frozenset[bytes] = frozenset()

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by pyzmq for each new connection, with the key in Z85."""
        # A file that can't be read just now takes nobody's key away.
        with contextlib.suppress(OSError):
            loaded = keys.load_coordinator(self._folder)
            self._known = frozenset(one.encode() for one in loaded.clients)
        known = key in self._known
        if not known:
            self._dropped.note("wrong_key", "a client with an unknown key wanted to connect")
        return known


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
            await self._close()
            raise OSError(f"{self._bind} can't be used ({error}): choose another --bind") from None
        endpoint = socket.get(zmq.LAST_ENDPOINT)
        self.endpoint = endpoint.decode() if isinstance(endpoint, bytes) else self._bind
        self._socket = socket
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()
        await self._close()

    async def _close(self) -> None:
        self._auth.stop()
        # Its task lets go of the file descriptor in the loop's next turns; a socket that gets the
        # same number before that would stay deaf.
        for _ in range(3):
            await asyncio.sleep(0)
        self._context.term()

    async def receive(self) -> tuple[bytes, ToCoordinator] | None:
        """The next message and the connection that it came by; None: it could not be read."""
        frames = await self._socket.recv_multipart()
        message = await self._read(frames)
        return None if message is None else (frames[0], message)

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
        try:
            with contextlib.suppress(zmq.ZMQError):
                await self._socket.send_multipart([route, *encode(message)], zmq.NOBLOCK)
        except FrameError as error:
            self.dropped.note(error.kind, str(error))


class SidecarSocket:
    """The connection to the coordinator; it comes back by itself. An async context manager."""

    def __init__(self, address: str, keys_dir: Path) -> None:
        self._address, self._keys_dir = address, keys_dir
        self._name = b"s" + uuid.uuid4().bytes  # one that begins with 0 is ZeroMQ's own
        self._context = zmq.asyncio.Context()
        self.dropped = Dropped()

    async def __aenter__(self) -> SidecarSocket:
        self._socket = self._make()
        try:
            self._connect()
        except OSError:
            self._close()
            raise
        self._renewal = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._renewal.cancel()
        self._close()

    def _close(self) -> None:
        self._socket.close()
        self._context.term()

    def _make(self) -> zmq.asyncio.Socket:
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
        return socket

    def _connect(self) -> None:
        """Connect with the keys as they are now. Raises OSError."""
        stamp = self._key_stamp()
        own = keys.load_sidecar(self._keys_dir)
        with contextlib.suppress(zmq.ZMQError):
            self._socket.disconnect(self._address)
        # The keys hold for connections made from now on.
        self._socket.curve_serverkey = own.server.encode()
        self._socket.curve_secretkey = own.pair.secret.encode()
        self._socket.curve_publickey = own.pair.public.encode()
        try:
            self._socket.connect(self._address)
        except zmq.ZMQError as error:
            raise OSError(
                f"{self._address} is no address of a coordinator ({error}): give tcp://HOST:PORT"
            ) from None
        self._stamp = stamp

    @property
    def connected(self) -> bool:
        """Whether a message sent now goes out."""
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLOUT)

    async def send(self, message: ToCoordinator) -> None:
        """Send, or drop it when that can't be done at once."""
        try:
            with contextlib.suppress(zmq.ZMQError):
                await self._socket.send_multipart(encode(message), zmq.NOBLOCK)
        except FrameError as error:
            self.dropped.note(error.kind, str(error))

    async def receive(self) -> ToSidecar:
        """The next message that can be read."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                return decode_for_sidecar(frames)
            except FrameError as error:
                self.dropped.note(error.kind, str(error))

    def _key_stamp(self) -> tuple[int, int]:
        """Changes with the file: a second one within the same clock tick is another inode."""
        try:
            stat = (self._keys_dir / keys.SIDECAR_FILE).stat()
        except OSError:
            return 0, 0
        return stat.st_mtime_ns, stat.st_ino

    async def _renew(self) -> None:
        """Connect anew when the keys were rotated, or there was no connection for too long."""
        alone = 0.0
        while True:
            await asyncio.sleep(KEYS_EVERY_S)
            alone = 0.0 if self.connected else alone + KEYS_EVERY_S
            rotated = self._key_stamp() not in ((0, 0), self._stamp)
            if rotated or alone >= AGAIN_S:
                alone = 0.0
                with contextlib.suppress(OSError):
                    self._connect()
