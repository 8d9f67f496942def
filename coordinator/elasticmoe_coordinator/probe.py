"""Asks a silent instance's launcher directly."""

from __future__ import annotations

import httpx
import msgspec
from elasticmoe_protocol.messages import EnginePhase, EngineReport, Exit

from elasticmoe_coordinator.core.outbox import Probe, ProbeAnswer

LIMIT_S = 2.0


class _Engine(msgspec.Struct, frozen=True):
    phase: EnginePhase = "absent"
    launch: str | None = None
    rank: int | None = None
    size: int | None = None
    exit: Exit | None = None


class _State(msgspec.Struct, frozen=True):
    engine: _Engine


async def ask(client: httpx.AsyncClient, probe: Probe) -> ProbeAnswer:
    """`GET /state` on the launcher's probe port; no answer that makes sense is None."""
    try:
        url = httpx.URL(scheme="http", host=probe.address, port=probe.port, path="/state")
        response = await client.get(url, timeout=LIMIT_S)
        engine = msgspec.json.decode(response.content, type=_State).engine
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.MsgspecError):
        return ProbeAnswer(probe.instance, None)
    report = EngineReport(
        phase=engine.phase,
        launch=engine.launch or "",
        rank=-1 if engine.rank is None else engine.rank,
        size=engine.size or 0,
        exit=engine.exit,
    )
    return ProbeAnswer(probe.instance, report)
