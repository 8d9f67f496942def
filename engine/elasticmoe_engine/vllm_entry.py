"""vLLM's API server on a socket that listens already."""

from __future__ import annotations

import importlib
import signal
import socket
import sys
from typing import Any

from elasticmoe_engine.listener import BACKLOG


def main(sock: socket.socket, argv: list[str], spec: dict[str, Any]) -> None:
    """Do what vLLM's own `main` does, less the making of a socket. argv: what follows `serve`."""
    # By name: only an image with vLLM has these, and nothing else may need them.
    cli = importlib.import_module("vllm.entrypoints.common.cli_args")
    startup = importlib.import_module("vllm.entrypoints.common.startup")
    entry = importlib.import_module("vllm.entrypoints.launchers.api_server.entry")
    system = importlib.import_module("vllm.utils.system_utils")
    parsers = importlib.import_module("vllm.utils.argparse_utils")
    log = importlib.import_module("vllm.logger")
    uvloop = importlib.import_module("uvloop")

    sys.argv = ["vllm", "serve", *argv]
    startup.cli_env_setup()
    parser = cli.make_arg_parser(parsers.FlexibleArgumentParser(prog="vllm serve"))
    args = parser.parse_args(argv)
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    log.configure_logging_from_args(args)
    cli.validate_parsed_serve_args(args)
    system.set_process_title(f"APIServer_DP{spec['rank']}")
    system.decorate_logs("APIServer")
    cli.init_parser_plugin(args)
    cli.validate_api_server_args(args)
    system.set_ulimit()
    # Until uvicorn has its own handler.
    signal.signal(signal.SIGTERM, _interrupt)
    host, port = sock.getsockname()[:2]
    uvloop.run(entry.run_server_worker(f"http://{host}:{port}", sock, args, backlog=BACKLOG))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt("terminated")
