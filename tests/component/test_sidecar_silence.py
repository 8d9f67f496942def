"""What a sidecar says about its coordinator; the link is scripted, the rest is real."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from elasticmoe_protocol.messages import Goal, Record, Refused, ToCoordinator, ToSidecar
from elasticmoe_sidecar import agent as agent_module
from elasticmoe_sidecar.agent import Agent
from elasticmoe_sidecar.journal import Journal
from elasticmoe_sidecar.settings import Settings
from support.fake_instance import FakeInstance
from support.sidecar import until


class ScriptedLink:
    def __init__(self) -> None:
        self.sent: list[ToCoordinator] = []
        self.coming: asyncio.Queue[ToSidecar] = asyncio.Queue()

    async def send(self, message: ToCoordinator) -> None:
        self.sent.append(message)

    async def receive(self) -> ToSidecar:
        return await self.coming.get()


@contextlib.asynccontextmanager
async def agent(run_dir: Path) -> AsyncIterator[tuple[ScriptedLink, Journal]]:
    settings = Settings(
        deployment="d",
        instance="i0",
        coordinator="tcp://127.0.0.1:7",
        run_dir=run_dir,
        keys_dir=run_dir / "keys",
        address="127.0.0.1",
        rpc_port=5000,
    )
    link = ScriptedLink()
    journal = Journal(settings.journal_file, "d", "i0")
    running = asyncio.create_task(Agent(settings, journal, link).run())
    try:
        yield link, journal
    finally:
        running.cancel()
        await asyncio.wait({running})


def goal(seq: int) -> Goal:
    return Goal(
        deployment="d", instance="i0", term=1, seq=seq, generation=1, record=Record(generation=1)
    )


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]


async def test_a_silent_coordinator_is_named_with_what_to_check(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(agent_module, "NO_ANSWER_S", 0.05)
    async with FakeInstance(tmp_path), agent(tmp_path):
        await until(lambda: bool(errors(caplog)), "a line in the log")
    (line,) = errors(caplog)
    assert "tcp://127.0.0.1:7" in line
    assert str(tmp_path / "keys") in line


async def test_a_refusal_is_logged_once_a_minute(tmp_path, caplog):
    refused = Refused(deployment="d", reason="protocol 3 here, 1 there")
    async with FakeInstance(tmp_path), agent(tmp_path) as (link, _):
        link.coming.put_nowait(refused)
        link.coming.put_nowait(refused)
        link.coming.put_nowait(goal(1))
        await until(lambda: any(getattr(m, "goal", -1) == 1 for m in link.sent), "goal accepted")
    (line,) = errors(caplog)
    assert "protocol 3 here, 1 there" in line
    assert "tcp://127.0.0.1:7" in line


async def test_a_goal_that_cannot_be_journaled_is_neither_accepted_nor_obeyed(tmp_path, caplog):
    async with FakeInstance(tmp_path), agent(tmp_path) as (link, journal):
        (tmp_path / "journal.new").mkdir()  # where the new file has to go
        link.coming.put_nowait(goal(1))
        await until(lambda: any(getattr(m, "error", "") for m in link.sent), "the report says so")
        assert journal.goal is None
        (tmp_path / "journal.new").rmdir()
        link.coming.put_nowait(goal(1))
        await until(lambda: any(getattr(m, "goal", -1) == 1 for m in link.sent), "goal accepted")
    assert "cannot write" in errors(caplog)[0]
