"""Runs a sidecar as its own process: `python sidecar_process.py SETTINGS.json`."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio
from elasticmoe_protocol.messages import ToCoordinator, ToSidecar
from elasticmoe_sidecar import agent
from elasticmoe_sidecar.settings import Settings


class PlainLink:
    def __init__(self, settings: Settings) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, settings.instance.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(settings.coordinator)

    async def send(self, message: ToCoordinator) -> None:
        with contextlib.suppress(zmq.Again):
            await self._socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    async def receive(self) -> ToSidecar:
        return msgspec.msgpack.decode(await self._socket.recv(), type=ToSidecar)

    def close(self) -> None:
        self._socket.close()


@contextlib.asynccontextmanager
async def connect(settings: Settings) -> AsyncIterator[PlainLink]:
    link = PlainLink(settings)
    try:
        yield link
    finally:
        link.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    fields = json.loads(Path(sys.argv[1]).read_text())
    fields["run_dir"], fields["keys_dir"] = Path(fields["run_dir"]), Path(fields["keys_dir"])
    sys.exit(agent.run(Settings(**fields), connect))
