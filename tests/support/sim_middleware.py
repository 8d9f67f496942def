"""A middleware that reads of the engine what a gate reads."""

import json
import os
import socket
from typing import Any


class Peek:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/peek":
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        parallel = state.engine_client.vllm_config.parallel_config
        seen = {
            "rank": parallel.data_parallel_rank,
            "size": parallel.data_parallel_size,
            "should_exit": state.server.should_exit,
            "pause_mode": state.engine_client.engine_core._eep_commit_pause_mode(),
        }
        headers = [(b"x-state", os.environ["ELASTICMOE_ENGINE_STATE"].encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(seen).encode()})


def serve(sock: socket.socket, spec: dict[str, Any], method: str) -> None:
    """Body of a process that was given the listening socket and a LaunchSpec, as by a launcher."""
    from elasticmoe_sim.entry import main

    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
    os._exit(main(sock, ["sim", "--middleware", f"{__name__}.Peek"], spec))
