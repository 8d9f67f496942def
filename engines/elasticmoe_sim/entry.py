"""Runs one simulated rank: `main` in a process that has the listening socket already."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import uvicorn

from elasticmoe_sim.api import build_app
from elasticmoe_sim.client import EngineClient, EngineDeadError
from elasticmoe_sim.config import Config, ConfigError, parse
from elasticmoe_sim.faults import Faults
from elasticmoe_sim.metrics import Metrics
from elasticmoe_sim.resize import Group, JoinError
from elasticmoe_sim.store import StoreClient, StoreServer

logger = logging.getLogger("elasticmoe_sim")

_FAULT_POLL_S = 0.05


class _Server(uvicorn.Server):
    """Leaves the signals to us, as vLLM's does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Install nothing."""
        yield


def main(
    sock: socket.socket | None,
    argv: Sequence[str],
    spec: Mapping[str, Any] | None = None,
) -> int:
    """Run a rank until it is stopped; returns its exit status.

    sock: bound and listening; None to make one from --host and --port. argv: what follows
    `vllm serve`. spec: a LaunchSpec as a dict, whose values win over the flags.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os.environ["ELASTICMOE_ENGINE_STATE"] = "elasticmoe_sim.flags"
    try:
        config = parse(argv, spec)
        sock = sock or _listen(config)
        return asyncio.run(_run(config, sock))
    except (ConfigError, JoinError, EngineDeadError, OSError, TimeoutError) as error:
        print(f"elasticmoe_sim: {error or type(error).__name__}", file=sys.stderr)
        return 1


def _listen(config: Config) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # vLLM's uvloop does this; asyncio does not on a socket that it is given.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.bind((config.host, config.port))
    return sock


async def _run(config: Config, sock: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    metrics = Metrics(config.served_model_names[0])
    metrics.register([config.rank])
    server, store = StoreServer(), StoreClient()
    client, faults = EngineClient(config, metrics), Faults(config.rank)
    group = Group(config, store, client, metrics, faults)
    started = asyncio.create_task(_start(config, server, store, group))

    began = time.monotonic()

    def interrupt() -> None:
        waiting = config.joiner and not started.done()
        if waiting and time.monotonic() - began < config.timing.joiner_term_s:
            logger.info("a joiner in its handshake takes no SIGTERM")
            return
        started.cancel()

    loop.add_signal_handler(signal.SIGTERM, interrupt)
    loop.add_signal_handler(signal.SIGINT, started.cancel)
    watch = asyncio.create_task(_watch_faults(faults))
    try:
        await started
        return await _serve(config, client, group, sock)
    except asyncio.CancelledError:
        return 0
    finally:
        watch.cancel()
        client.shutdown()
        server.close()


async def _start(config: Config, server: StoreServer, store: StoreClient, group: Group) -> None:
    if config.rank == 0:
        await server.start(config.master_address, config.rpc_port)
    await store.connect(config.master_address, config.rpc_port, config.timing.start_limit_s)
    await (group.join() if config.joiner else group.start())


async def _serve(config: Config, client: EngineClient, group: Group, sock: socket.socket) -> int:
    server: _Server

    def terminate() -> None:
        server.should_exit = True

    app = build_app(config, client, group, terminate)
    server = _Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=5))
    app.state.server = server

    def stop() -> None:
        client.shutdown()
        terminate()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, stop)
    watchdog = asyncio.create_task(_watchdog(config, client, terminate))
    logger.info("rank %d of %d serves", config.rank, config.size)
    try:
        await server.serve(sockets=[sock])
    finally:
        watchdog.cancel()
    return 0


async def _watchdog(config: Config, client: EngineClient, terminate: Any) -> None:
    """vLLM looks only now and then whether its engine core lives."""
    while True:
        await asyncio.sleep(config.timing.watchdog_s)
        if client.errored:
            terminate()


async def _watch_faults(faults: Faults) -> None:
    while faults.watched or faults.now():
        if "crash_api" in faults:
            os.kill(os.getpid(), signal.SIGKILL)
        while "hang_api" in faults:
            time.sleep(_FAULT_POLL_S)  # noqa: ASYNC251  the event loop has to stand still
        await asyncio.sleep(_FAULT_POLL_S)
