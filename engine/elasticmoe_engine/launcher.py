"""The engine container's command: waits, warm, for the sidecar's orders.

python -m elasticmoe_engine.launcher --run-dir DIR --probe-port P -- vllm serve MODEL [flags]

With `--command-file PATH` instead of the words the command can change: see `commands`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from elasticmoe_engine import local_http
from elasticmoe_engine.api import SOCKET, Api
from elasticmoe_engine.command import CommandError, parse
from elasticmoe_engine.commands import Adopted, Commands
from elasticmoe_engine.facts import VLLM, Facts, needs_new_launcher
from elasticmoe_engine.forkserver import Forkserver
from elasticmoe_engine.listener import ListenError
from elasticmoe_engine.processes import adopt_orphans
from elasticmoe_engine.supervisor import Supervisor
from elasticmoe_engine.warm import MODEL_FOLDER

VLLM_WARM = "elasticmoe_engine.vllm_warm"
_SOCKET_PATH_LIMIT = 107 - len(".launcher.sock.4194304")
"""Characters of a run folder's path (sun_path of unix(7), less the longest name within)."""


class UsageError(Exception):
    """The launcher can't start like this; the text says what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM, a second one doesn't wait for the engine.

    Returns the exit status, 2 for what the user has to change.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own, engine = words, None
    if "--" in words:
        own, engine = words[: words.index("--")], words[words.index("--") + 1 :]
    args = _parser().parse_args(own)
    try:
        return _run(args, engine)
    except (UsageError, CommandError, ListenError) as error:
        print(f"elasticmoe launcher: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, engine: list[str] | None) -> int:
    commands = _commands(args.command_file, engine)
    run_dir = _run_dir(args.run_dir)
    if ":" not in args.engine:
        raise UsageError(f"--engine {args.engine}: give MODULE:FUNCTION")
    facts = Facts(commands, args.engine)
    if facts.folder is not None:
        # Another model later is started all the same, its class is only imported then.
        os.environ[MODEL_FOLDER] = str(facts.folder)
    default = VLLM_WARM if args.engine == VLLM else args.engine.partition(":")[0]
    adopt_orphans()
    # What engines print is seen as it comes, also where stdout is a pipe.
    os.environ["PYTHONUNBUFFERED"] = "1"
    supervisor = Supervisor(
        commands,
        args.engine,
        run_dir,
        Forkserver(run_dir, args.preload or [default]),
        args.host_ip,
    )
    api = Api(supervisor, facts)
    try:
        probes = local_http.serve_tcp(args.probe_host.strip("[]"), args.probe_port, api.probe)
    except OSError as error:
        where = f"{args.probe_host}:{args.probe_port}"
        raise UsageError(
            f"the probe port {where} can't be had ({error.strerror}): give another --probe-port"
        ) from None
    api.probe_port = probes.port
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.end())
    local_http.serve_unix(run_dir / SOCKET, api.control)
    if facts.problem:
        print(f"elasticmoe launcher: WARNING: {facts.problem}", file=sys.stderr, flush=True)
    supervisor.run()
    for name in (SOCKET, "gate.sock"):
        (run_dir / name).unlink(missing_ok=True)
    sys.stdout.flush()
    # Nothing is left to wait for, and multiprocessing would look for children that are gone.
    os._exit(0)


def _commands(path: Path | None, words: list[str] | None) -> Commands:
    """Raises UsageError or CommandError."""
    if path is None and words is None:
        raise UsageError("give the command after `--`, or by --command-file")
    if path is None:
        return Commands(Adopted(parse(words or [])))
    if words is not None:
        raise UsageError("give the command after `--` or by --command-file, not both")
    return Commands.of_file(path.absolute(), needs_new_launcher)


def _run_dir(path: Path) -> Path:
    path = path.absolute()
    if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
        raise UsageError(
            f"--run-dir {path} is too long for a unix socket: "
            f"give a path of at most {_SOCKET_PATH_LIMIT} characters"
        )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir {path} can't be made ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"--run-dir {path} can't be written to: give another folder")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elasticmoe_engine.launcher",
        usage="%(prog)s --run-dir DIR --probe-port P [options] "
        "{-- vllm serve MODEL [flags] | --command-file PATH}",
        description="Starts and stops one engine, warm, as the sidecar orders.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run-dir", type=Path, required=True, help="folder of launcher.sock and gate.sock")
    add("--probe-port", type=int, required=True, help="port of /livez and /readyz, 0 for any")
    add("--probe-host", default="0.0.0.0", help="address of the probe port, :: for IPv6")
    add("--host-ip", default="", help="this instance's own address (VLLM_HOST_IP)")
    add("--command-file", type=Path, metavar="PATH", help="JSON with the command, may change")
    add("--engine", default=VLLM, metavar="MODULE:FUNCTION", help="what to start instead of vLLM")
    add("--preload", action="append", metavar="MODULE", help="import this before any order comes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
