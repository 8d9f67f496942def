"""The coordinator's process: messages and time into the rules, what they decide out again."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import signal
import socket
import time
import uuid

import httpx
import uvicorn
from elasticmoe_protocol import keys
from elasticmoe_protocol.messages import Hello, Introduce, Refused, Report, ToCoordinator
from elasticmoe_protocol.transport import CoordinatorSocket

from elasticmoe_coordinator import http, probe
from elasticmoe_coordinator.core.group import Group
from elasticmoe_coordinator.core.outbox import Outbox, Probe
from elasticmoe_coordinator.metrics import Metrics
from elasticmoe_coordinator.settings import CoordinatorSettings
from elasticmoe_coordinator.state import StateFile

logger = logging.getLogger(__name__)

TICK_S = 0.1
MESSAGES_A_TURN = 1000
SHUTDOWN_S = 3
"""Requests that are still answered at the end get so long."""
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Server:
    """One group over real sockets."""

    def __init__(self, settings: CoordinatorSettings, sockets: CoordinatorSocket) -> None:
        self._deployment = settings.group.deployment
        self._sockets = sockets
        self._state = StateFile(settings.state_file, settings.group.deployment)
        self.group = Group(
            settings.group,
            term=settings.term,
            now=time.time(),
            new_id=_new_id,
            memory=self._state.load(),
        )
        self.metrics = Metrics(
            lambda: self.group.status(time.time()), lambda: sockets.dropped.counts
        )
        self._asking: set[asyncio.Task[None]] = set()
        # Not through a proxy from the environment: launchers are asked directly or not at all.
        self._client = httpx.AsyncClient(trust_env=False)
        self._counted = time.time()
        self._grumbled: dict[tuple[str, str], float] = {}

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._read()
                # All that waits is read before anybody is judged: after a pause of this process
                # the newest words of others lie in the queue.
                for _ in range(MESSAGES_A_TURN):
                    if not await self._sockets.has_more():
                        break
                    await self._read()
                outbox = self.group.tick(time.time())
                self._keep()
                await self._give(outbox)
                await asyncio.sleep(0)  # whatever comes in, HTTP is answered too
        finally:
            for task in self._asking:
                task.cancel()
            await self._client.aclose()

    async def _read(self) -> None:
        """One message, if it can be read: one that can't must not keep the clock waiting."""
        arrived = await self._sockets.receive()
        if arrived is not None:
            await self._take(*arrived)

    async def _take(self, route: bytes, message: ToCoordinator) -> None:
        now = time.time()
        if message.deployment not in ("", self._deployment):
            line = f"this coordinator is for {self._deployment}, not for {message.deployment}"
            await self._sockets.answer(route, Refused(deployment=self._deployment, reason=line))
            return
        match message:
            case Hello():
                refusal = self.group.hello(message, now)
                if refusal:
                    self._grumble(message.instance, refusal)
                    refused = Refused(deployment=self._deployment, reason=refusal)
                    await self._sockets.answer(route, refused)
                else:
                    self._sockets.adopt(message.instance, route)
            case Report():
                if not self.group.report(message, now):
                    introduce = Introduce(deployment=self._deployment)
                    await self._sockets.answer(route, introduce)
            case Refused():
                instance = self._sockets.instance_of(route)
                self._grumble(instance, message.reason)
                self.group.refused(instance, message, now)

    def _keep(self) -> None:
        try:
            self._state.keep(self.group.memory)
        except OSError as error:
            self._grumble("state", f"the state file can't be written: {error}")

    async def _give(self, outbox: Outbox) -> None:
        for note in outbox.notes:
            logger.log(LEVELS[note.level], "%s", note.text)
        for goal in outbox.goals:
            await self._sockets.send(goal.instance, goal)
        for instance in outbox.introduce:
            await self._sockets.send(instance, Introduce(deployment=self._deployment))
        for question in outbox.probes:
            task = asyncio.create_task(self._ask(question))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        self._count_ended()

    async def _ask(self, question: Probe) -> None:
        self.group.probed(await probe.ask(self._client, question), time.time())

    def _count_ended(self) -> None:
        """Operations that ended in this process's life; those learnt of were counted before."""
        until = self._counted
        for operation in self.group.status(time.time()).history:
            if operation.ended is not None and operation.ended > until:
                self.metrics.ended(operation)
                self._counted = max(self._counted, operation.ended)

    def _grumble(self, instance: str, line: str) -> None:
        """Log a refusal, once a minute the same one."""
        now = time.monotonic()
        if now - self._grumbled.get((instance, line), -60.0) >= 60.0:
            self._grumbled[instance, line] = now
            logger.warning("%s: %s", instance, line)


def run(settings: CoordinatorSettings) -> int:
    """Run a coordinator until SIGTERM or SIGINT; returns the exit status.

    2: it could not begin, and a line in the log says what to do.
    """
    try:
        keys.ensure_keys(settings.keys_dir)
        listener = _listen(settings.http_host, settings.http_port)
        return asyncio.run(_serve(settings, listener))
    except OSError as error:
        logger.error("%s", error)
        return 2


def _listen(host: str, port: int) -> socket.socket:
    """Raises OSError with a line that says what to do."""
    host = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(
            f"the HTTP address {host}:{port} can't be used ({error.strerror}): choose another "
            "--http-port or --http-host"
        ) from None
    return listener


async def _serve(settings: CoordinatorSettings, listener: socket.socket) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with CoordinatorSocket(settings.bind, settings.keys_dir) as sockets:
        server = Server(settings, sockets)
        version = importlib.metadata.version("elasticmoe")
        api = http.app(server.group, settings.keys_dir, server.metrics, version, stop)
        config = uvicorn.Config(
            api,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        web = _Web(config)
        working = asyncio.create_task(server.run())
        answering = asyncio.create_task(web.serve(sockets=[listener]))
        host, port = listener.getsockname()[:2]
        stopping = asyncio.create_task(stop.wait())
        try:
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            _tell_ready(settings, sockets.endpoint, address)
            logger.info(
                "coordinator of %s: sidecars at %s, HTTP at %s",
                settings.group.deployment,
                sockets.endpoint,
                address,
            )
            await asyncio.wait({working, answering, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.set()
            web.should_exit = True
            working.cancel()
            stopping.cancel()
            await asyncio.wait({working, answering})
        for task in (working, answering):
            if not task.cancelled():
                task.result()
    return 0


class _Web(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Signals are this process's business."""
        yield


def _tell_ready(settings: CoordinatorSettings, endpoint: str, address: str) -> None:
    if settings.ready_file is None:
        return
    fresh = settings.ready_file.with_suffix(".new")
    try:
        fresh.write_text(json.dumps({"zmq": endpoint, "http": address, "pid": os.getpid()}))
        os.replace(fresh, settings.ready_file)
    except OSError as error:
        raise OSError(
            f"{settings.ready_file} can't be written ({error.strerror}): choose another "
            "--ready-file"
        ) from None


def _new_id() -> str:
    return uuid.uuid4().hex[:12]
