"""The sidecar's process: the coordinator on one side, the instance on the other."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec
from elasticmoe_protocol.keys import KeysError
from elasticmoe_protocol.messages import (
    Goal,
    Hello,
    Introduce,
    Refused,
    Report,
    ToCoordinator,
    ToSidecar,
)

from elasticmoe_sidecar import http, link
from elasticmoe_sidecar.confirmation import Confirmation
from elasticmoe_sidecar.instance import Instance
from elasticmoe_sidecar.journal import Journal
from elasticmoe_sidecar.leave import Leave
from elasticmoe_sidecar.metrics import Metrics
from elasticmoe_sidecar.settings import Settings, incarnation_of

logger = logging.getLogger(__name__)

NO_ANSWER_S = 10.0
REMIND_EVERY_S = 60.0
ALONE_S = 15.0
"""A coordinator that was not heard for so long releases nobody; it may be gone for good."""
_SOCKET_PATH_LIMIT = 107
"""Characters in sun_path, less the closing zero (unix(7))."""


class Link(Protocol):
    """The connection to the coordinator."""

    async def send(self, message: ToCoordinator) -> None:
        """Send or drop, never wait for long: what is lost is said again."""

    async def receive(self) -> ToSidecar:
        """The next message."""


class Agent:
    """Says what is, takes goals, has the instance obey them."""

    def __init__(self, settings: Settings, journal: Journal, link: Link) -> None:
        self._settings, self._journal, self._link = settings, journal, link
        self._incarnation = incarnation_of(settings)
        self._confirmation, self._confirmed = Confirmation(), False
        self._version = importlib.metadata.version("elasticmoe")
        self._tell = asyncio.Event()
        self._boot, self._seq, self._hello = uuid.uuid4().hex, 0, 0
        self._error = ""
        self._heard, self._heard_at = False, time.monotonic()
        self._greeted: Hello | None = None
        self._grumbled: dict[str, float] = {}
        self.metrics = Metrics()
        self.leave = Leave(settings.policy, settings.leave_grace_s, self._tell.set)
        if journal.goal is not None:
            self.leave.note(journal.goal.released)
        self._instance = Instance(
            settings, journal, self._confirmation, self.metrics, self._tell.set
        )

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._instance.run())
            group.create_task(self._report())
            group.create_task(self._receive())
            group.create_task(self._mind_silence())
            group.create_task(self._mind_leaving())

    # --- to the coordinator ---------------------------------------------------------------------

    async def _report(self) -> None:
        """A report each heartbeat, and at once when something changed that matters."""
        told: Report | None = None
        due = 0.0
        await self._instance.looked()
        while True:
            self._notice_pause()
            await self._say_hello()
            report = self._what_is()
            now = time.monotonic()
            if now >= due or told is None or _essence(report) != _essence(told):
                await self._link.send(report)
                self._seq += 1
                self.metrics.reported(report.term, report.launcher, report.gate is not None)
                told, due = report, now + self._settings.heartbeat_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due - now):
                    await self._tell.wait()
            self._tell.clear()

    def _notice_pause(self) -> None:
        """After a pause this process is to the coordinator as one that was started anew."""
        before, self._confirmed = self._confirmed, self._confirmation.holds()
        if before and not self._confirmed:
            logger.warning("this sidecar stood still for a while: it asks what holds now")
            self._boot, self._seq, self._hello = uuid.uuid4().hex, 0, 0
            self._greeted = None

    async def _say_hello(self) -> None:
        """Introduce this instance once its facts are known, and again when they change.

        When it returns nothing is left to say: a report right after it fits what was said.
        """
        while (facts := self._instance.facts(self._version)) is not None:
            if self._greeted is not None and self._greeted.facts == facts:
                return
            self._hello += 1
            self._greeted = Hello(
                deployment=self._settings.deployment,
                instance=self._settings.instance,
                incarnation=self._incarnation,
                boot=self._boot,
                facts=facts,
                accepted=self._journal.goal,
                number=self._hello,
            )
            await self._link.send(self._greeted)

    def _what_is(self) -> Report:
        goal = self._journal.goal
        report = Report(
            deployment=self._settings.deployment,
            instance=self._settings.instance,
            boot=self._boot,
            seq=self._seq,
            term=-1 if goal is None else goal.term,
            goal=goal.seq if goal is not None and self._confirmed else -1,
            leader="" if goal is None else goal.leader,
            hello=self._hello,
            leaving=self.leave.asked,
            error=self._error,
        )
        return self._instance.fill(report)

    # --- from the coordinator -------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive()
            self._heard, self._heard_at = True, time.monotonic()
            self.metrics.heard()
            match message:
                case Goal():
                    await self._take(message)
                case Introduce():
                    self._greeted = None
                    self._tell.set()
                case Refused(reason=reason):
                    self._grumble(
                        reason, f"the coordinator at {self._settings.coordinator} says: {reason}"
                    )

    async def _take(self, goal: Goal) -> None:
        """Journal a goal, then obey it."""
        objection = self._journal.objection(goal)
        if objection:
            self.metrics.goal("refused")
            self._grumble("goal refused", f"goal refused: {objection}")
            refused = Refused(
                deployment=self._settings.deployment, reason=objection, term=self._journal.term
            )
            await self._link.send(refused)
            return
        self._tell.set()
        present = self._journal.goal
        if present is not None and (goal.term, goal.seq) == (present.term, present.seq):
            self.metrics.goal("repeated")
            self._confirm()
            return
        try:
            self._journal.accept(goal)
        except OSError as error:
            self._error = f"cannot write {self._settings.journal_file}: {error.strerror}"
            self._grumble(self._error, self._error)
            return
        self._error = ""
        self.metrics.goal("accepted")
        self.leave.note(goal.released)
        self._confirm()

    def _confirm(self) -> None:
        self._confirmation.confirm()
        self._confirmed = True
        self._instance.obey()

    async def _mind_silence(self) -> None:
        await asyncio.sleep(NO_ANSWER_S)
        while not self._heard:
            logger.error(
                "no answer from the coordinator at %s for %g s: check the address, and that the "
                "keys in %s are those that the coordinator knows",
                self._settings.coordinator,
                NO_ANSWER_S,
                self._settings.keys_dir,
            )
            await asyncio.sleep(REMIND_EVERY_S)

    async def _mind_leaving(self) -> None:
        """Without a coordinator nobody is released. Who has no engine takes nothing along."""
        while True:
            await asyncio.sleep(ALONE_S / 10)
            alone = time.monotonic() - self._heard_at > ALONE_S
            goal = self._journal.goal
            empty = self._instance.has_no_engine and (goal is None or goal.launch is None)
            if self.leave.asked and alone and empty:
                logger.warning("no coordinator for %g s and no engine here: released", ALONE_S)
                self.leave.let_go()
                return

    def _grumble(self, about: str, line: str) -> None:
        """Log a line, once a minute about the same thing."""
        now = time.monotonic()
        if now - self._grumbled.get(about, -REMIND_EVERY_S) >= REMIND_EVERY_S:
            self._grumbled[about] = now
            logger.error("%s", line)


def _essence(report: Report) -> Report:
    """The report without what moves all the time."""
    gate = report.gate
    if gate is not None:
        gate = msgspec.structs.replace(
            gate,
            in_flight=min(gate.in_flight, 1),
            held=min(gate.held, 1),
            open_connections=min(gate.open_connections, 1),
            idle_s=0.0,
            lag_s=0.0,
            progress=0,
            completed=0,
        )
    return msgspec.structs.replace(report, seq=0, gate=gate, load=type(report.load)())


Connect = Callable[[Settings], AbstractAsyncContextManager[Link]]


def run(settings: Settings, connect: Connect = link.connect) -> int:
    """Run a sidecar until it may end; returns the exit status."""
    try:
        _check_folder(settings)
        with _alone(settings):
            return asyncio.run(_serve(settings, connect))
    except KeysError as error:
        logger.error("%s", error)
        return 2  # nothing gets better by another start
    except OSError as error:
        logger.error("%s", error)
        return 1


def _check_folder(settings: Settings) -> None:
    """Raises OSError for a run folder that cannot do."""
    if not settings.run_dir.is_dir():
        raise OSError(f"there is no run folder {settings.run_dir}: start its launcher, or make it")
    if not os.access(settings.run_dir, os.W_OK | os.X_OK):
        raise OSError(
            f"{settings.run_dir} can't be written by this user (UID {os.geteuid()}): give it to "
            "this user, or a pod an fsGroup"
        )
    longest = max(len(str(path)) for path in (settings.launcher_socket, settings.own_socket))
    if longest > _SOCKET_PATH_LIMIT:
        raise OSError(
            f"the path {settings.run_dir} is too long for unix sockets: choose a shorter --run-dir"
        )


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """One sidecar a run folder; the kernel lets go of the lock when the process dies."""
    path = settings.run_dir / "sidecar.lock"
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"another sidecar runs in {settings.run_dir}: stop it or choose another --run-dir"
            ) from error
        yield


async def _serve(settings: Settings, connect: Connect) -> int:
    journal = Journal(settings.journal_file, settings.deployment, settings.instance)
    async with contextlib.AsyncExitStack() as stack:
        link = await stack.enter_async_context(connect(settings))
        agent = Agent(settings, journal, link)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.leave.terminate)
        routes = http.common_routes(agent.metrics.text)
        port = await stack.enter_async_context(
            http.serve_tcp(settings.http_host, settings.http_port, routes)
        )
        leave = http.leave_route(agent.leave.ask, agent.leave.released)
        await stack.enter_async_context(http.serve_unix(settings.own_socket, routes | leave))
        logger.info("sidecar %s answers on port %d", settings.instance, port)
        working = asyncio.create_task(agent.run())
        ended = asyncio.create_task(agent.leave.ended())
        await asyncio.wait({working, ended}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        working.cancel()
        await asyncio.wait({working})
    return 0
