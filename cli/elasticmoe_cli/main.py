"""The commands and their options; what they do is imported when it is needed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from elasticmoe_coordinator.core.config import GroupConfig

from elasticmoe_cli.errors import CommandFailed


class _App(typer.Typer):
    """One line, too, for a command line that can't be understood."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        command = typer.main.get_command(self)
        try:
            status = command(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            line = error.format_message()
            if line:  # none when the help was shown instead
                path = getattr(getattr(error, "ctx", None), "command_path", "elasticmoe")
                line = " ".join(line.split()).rstrip(".")
                line = line[:1].lower() + line[1:]
                typer.echo(f"elasticmoe: {line} (see `{path} --help`)", err=True)
            sys.exit(error.exit_code)
        sys.exit(status if isinstance(status, int) else 0)


app = _App(
    name="elasticmoe",
    help="Change the number of ranks of a Mixture-of-Experts model served by vLLM while it serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
local_app = typer.Typer(help="A whole group on this host, as processes.", no_args_is_help=True)
keys_app = typer.Typer(help="Keys and token of a group.", no_args_is_help=True)
app.add_typer(local_app, name="local")
app.add_typer(keys_app, name="keys")

HTTP_DEFAULT = "http://127.0.0.1:7411"


class Policy(StrEnum):
    """declared: somebody asks for a size. follow: the size is the number of instances."""

    declared = "declared"
    follow = "follow"


class Drain(StrEnum):
    """What happens to requests past the drain limit."""

    postpone = "postpone"
    abort = "abort"


class Loss(StrEnum):
    """What happens after an unplanned loss."""

    restart = "restart"
    none = "none"


class Engine(StrEnum):
    """Engines that the demo and `local` know."""

    vllm_cpu = "vllm-cpu"
    sim = "sim"


KeysDir = Annotated[
    Path, typer.Option("--keys", help="Folder of keys and token.", envvar="ELASTICMOE_KEYS")
]
Url = Annotated[
    str,
    typer.Option("--coordinator", help="The coordinator's HTTP address.", envvar="ELASTICMOE_URL"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Dir = Annotated[Path | None, typer.Option("--dir", help="The group's folder.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the operation ended.")]
DrainTimeout = Annotated[
    int | None, typer.Option(help="Seconds that requests may take to end.", min=0)
]
DEFAULT_KEYS = Path.home() / ".config" / "elasticmoe" / "keys"


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """One line and an exit status for what a user can mend; SIGTERM ends like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except CommandFailed as failure:
        typer.echo(f"elasticmoe: {failure}", err=True)
        raise typer.Exit(failure.status) from None
    except OSError as error:
        where = f"{error.filename} can't be used ({error.strerror}): choose another path"
        typer.echo(f"elasticmoe: {where if error.filename else error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("httpx", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)


@app.command()
def coordinator(
    deployment: Annotated[str, typer.Option(help="Name of the group.")] = "moe",
    keys: KeysDir = DEFAULT_KEYS,
    bind: Annotated[str, typer.Option(help="Where sidecars connect.")] = "tcp://127.0.0.1:7410",
    http_host: Annotated[str, typer.Option(help="Address of the HTTP API.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port of the HTTP API.", min=0, max=65535)] = 7411,
    policy: Annotated[Policy, typer.Option(help="Who says how many.")] = Policy.declared,
    size: Annotated[int | None, typer.Option(help="First size of a declared group.")] = None,
    min_size: Annotated[
        int, typer.Option(help="Smallest DP size; it fixes the slots.")
    ] = GroupConfig.min_size,
    max_size: Annotated[int, typer.Option(help="Largest DP size.")] = GroupConfig.max_size,
    drain_policy: Annotated[Drain, typer.Option(help="Past the drain limit.")] = Drain.postpone,
    drain_timeout: Annotated[
        int, typer.Option(help="Seconds that requests may take to end.", min=0)
    ] = GroupConfig.drain_timeout,
    lame_duck: Annotated[
        float, typer.Option(help="Least seconds from not ready to closed: endpoints propagate.")
    ] = GroupConfig.lame_duck,
    preflight_limit: Annotated[
        float, typer.Option(help="Seconds for joiners to be checked and started.")
    ] = GroupConfig.preflight_limit,
    start_limit: Annotated[
        float, typer.Option(help="Seconds for all engines to be up.")
    ] = GroupConfig.start_limit,
    prepare_limit: Annotated[
        float, typer.Option(help="Seconds for a resize's prepare; vLLM's own limit is 300.")
    ] = GroupConfig.prepare_limit,
    commit_limit: Annotated[
        float, typer.Option(help="Seconds for a resize's commit.")
    ] = GroupConfig.commit_limit,
    loss_policy: Annotated[Loss, typer.Option(help="After an unplanned loss.")] = Loss.restart,
    stall: Annotated[
        float, typer.Option(help="Seconds without progress that are a loss.")
    ] = GroupConfig.stall,
    replacement: Annotated[
        float, typer.Option(help="Seconds to wait for missing instances, then start with fewer.")
    ] = GroupConfig.replacement,
    restart_limit: Annotated[
        int, typer.Option(help="So many recoveries in the window, then it gives up.", min=1)
    ] = GroupConfig.restart_limit,
    restart_window: Annotated[
        float, typer.Option(help="Seconds in which recoveries count.")
    ] = GroupConfig.restart_window,
    settle: Annotated[
        float, typer.Option(help="Seconds without change before a group that follows acts.")
    ] = GroupConfig.settle,
    term: Annotated[int, typer.Option(help="Lowest term to use.", min=1)] = 1,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written once all ports are open.")
    ] = None,
    state_file: Annotated[
        Path | None, typer.Option(help="What the group is, kept for the next coordinator.")
    ] = None,
) -> None:
    """Run the coordinator of one group."""
    from elasticmoe_coordinator.core.config import GroupConfig
    from elasticmoe_coordinator.server import run
    from elasticmoe_coordinator.settings import CoordinatorSettings

    _log_to_stderr()
    with _plainly():
        try:
            group = GroupConfig(
                deployment=deployment,
                policy=policy.value,
                size=size,
                min_size=min_size,
                max_size=max_size,
                drain_policy=drain_policy.value,
                drain_timeout=drain_timeout,
                lame_duck=lame_duck,
                preflight_limit=preflight_limit,
                start_limit=start_limit,
                prepare_limit=prepare_limit,
                commit_limit=commit_limit,
                loss_policy=loss_policy.value,
                stall=stall,
                replacement=replacement,
                restart_limit=restart_limit,
                restart_window=restart_window,
                settle=settle,
            )
        except ValueError as error:
            raise CommandFailed(str(error), 2) from None
        settings = CoordinatorSettings(
            group=group,
            keys_dir=keys,
            bind=bind,
            http_host=http_host,
            http_port=http_port,
            term=term,
            ready_file=ready_file,
            state_file=state_file,
        )
        raise typer.Exit(run(settings))


@app.command()
def sidecar(
    instance: Annotated[str, typer.Option(help="Name of this instance.")],
    run_dir: Annotated[Path, typer.Option(help="Folder shared with the launcher.")],
    address: Annotated[str, typer.Option(help="Where the other ranks reach this one.")],
    rpc_port: Annotated[int, typer.Option(help="Where rank 0 listens.", min=1, max=65535)],
    coordinator: Annotated[str, typer.Option(help="tcp://HOST:PORT of the coordinator.")],
    deployment: Annotated[str, typer.Option(help="Name of the group.")] = "moe",
    keys: KeysDir = DEFAULT_KEYS,
    host_ip: Annotated[str, typer.Option(help="VLLM_HOST_IP; the address if empty.")] = "",
    ordinal: Annotated[int | None, typer.Option(help="Place that the platform gave it.")] = None,
    incarnation: Annotated[str, typer.Option(help="The pod's UID.")] = "",
    policy: Annotated[Policy, typer.Option(help="As the coordinator's.")] = Policy.declared,
    http_port: Annotated[int, typer.Option(help="Port of /livez and /metrics.", min=0)] = 0,
) -> None:
    """Run the sidecar of one instance."""
    from elasticmoe_sidecar.agent import run
    from elasticmoe_sidecar.settings import Settings

    _log_to_stderr()
    with _plainly():
        settings = Settings(
            deployment=deployment,
            instance=instance,
            coordinator=coordinator,
            run_dir=run_dir.absolute(),
            keys_dir=keys,
            address=address,
            rpc_port=rpc_port,
            host_ip=host_ip,
            ordinal=ordinal,
            incarnation=incarnation,
            policy=policy.value,
            http_port=http_port,
        )
        raise typer.Exit(run(settings))


@app.command(context_settings={"allow_extra_args": False})
def join(
    command: Annotated[list[str], typer.Argument(help="vllm serve MODEL and its flags.")],
    coordinator: Annotated[str, typer.Option(help="tcp://HOST:PORT of the coordinator.")],
    name: Annotated[str, typer.Option(help="Name of this instance; made if empty.")] = "",
    deployment: Annotated[str, typer.Option(help="Name of the group.")] = "moe",
    keys: KeysDir = DEFAULT_KEYS,
    run_dir: Annotated[Path | None, typer.Option(help="Folder for sockets and journal.")] = None,
    python: Annotated[str, typer.Option(help="Python that has vLLM.")] = sys.executable,
    address: Annotated[str, typer.Option(help="Where other ranks reach this one.")] = "127.0.0.1",
    rpc_port: Annotated[int, typer.Option(help="Where rank 0 listens; 0: any.", min=0)] = 0,
    probe_port: Annotated[int, typer.Option(help="Port of the probes; 0: any.", min=0)] = 0,
    policy: Annotated[Policy, typer.Option(help="As the coordinator's.")] = Policy.follow,
    ordinal: Annotated[
        int | None, typer.Option(help="Place in the group.", envvar="SLURM_PROCID")
    ] = None,
    launcher: Annotated[list[str] | None, typer.Option(help="Option for the launcher.")] = None,
) -> None:
    """Run one instance on this host: launcher and sidecar. Put `--` before `vllm serve`."""
    import socket
    import tempfile

    from elasticmoe_cli.join import Instance, run
    from elasticmoe_cli.local import free_port

    with _plainly():
        host = socket.gethostname().partition(".")[0]
        name = name or f"{host}-{os.getpid() if ordinal is None else ordinal}"
        folder = run_dir or Path(tempfile.gettempdir()) / f"elasticmoe-{name}"
        instance = Instance(
            name=name,
            deployment=deployment,
            coordinator=coordinator,
            keys_dir=keys,
            run_dir=folder.absolute(),
            command=command,
            python=python,
            address=address,
            rpc_port=rpc_port or free_port(),
            probe_port=probe_port,
            policy=policy.value,
            ordinal=ordinal,
            launcher_options=launcher or [],
        )
        raise typer.Exit(run(instance))


# --- a running group -----------------------------------------------------------------------------


@app.command()
def status(
    coordinator: Url = HTTP_DEFAULT,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it live.")] = False,
    as_json: Json = False,
) -> None:
    """Show a group: its ranks and what it does."""
    from elasticmoe_cli.api import Coordinator

    with _plainly():
        _show_status(Coordinator(coordinator).status, watch, as_json)


@app.command()
def scale(
    size: Annotated[int, typer.Argument(help="The DP size to have.")],
    coordinator: Url = HTTP_DEFAULT,
    keys: KeysDir = DEFAULT_KEYS,
    drain_timeout: DrainTimeout = None,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Have the group become a size."""
    from elasticmoe_cli.api import Coordinator

    with _plainly():
        group = Coordinator(coordinator, keys)
        _follow(group, group.scale(size, drain_timeout), wait, as_json)


@app.command()
def restart(
    coordinator: Url = HTTP_DEFAULT,
    size: Annotated[int, typer.Option(help="New DP size; 0 keeps it.")] = 0,
    keys: KeysDir = DEFAULT_KEYS,
    drain_timeout: DrainTimeout = None,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Restart all engines warm, drained first: no request fails."""
    from elasticmoe_cli.api import Coordinator

    with _plainly():
        group = Coordinator(coordinator, keys)
        _follow(group, group.restart(size, drain_timeout), wait, as_json)


def _show_status(status: Callable[[], dict[str, Any]], watch: bool, as_json: bool) -> None:
    from rich.console import Console

    from elasticmoe_cli import live

    console = Console()
    if not as_json and watch and console.is_terminal:
        with live.view(console) as show:
            while True:
                show(live.status(status()))
                time.sleep(0.25)
    while True:
        if as_json:
            typer.echo(json.dumps(status()))
        else:
            console.print(live.status(status()))
        if not watch:
            return
        time.sleep(1.0)


def _follow(group: Any, operation: dict[str, Any] | None, wait: bool, as_json: bool) -> None:
    """Show an operation until it has ended; a failed one ends the command with status 1."""
    from rich.console import Console

    from elasticmoe_cli import live

    if operation is not None and wait:
        with live.view(Console(stderr=True), transient=True) as show:
            for now in group.until_ended(operation["id"]):
                operation = now
                show(live.operation(now))
    if as_json:
        typer.echo(json.dumps({"operation": operation}))
    elif operation is None:
        typer.echo("nothing to do: the group has that size")
    else:
        typer.echo(live.outcome(operation))
    if operation is not None and operation["state"] in ("failed", "withdrawn"):
        raise CommandFailed(operation["error"])


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    import importlib.metadata

    from elasticmoe_protocol.codec import VERSION

    known = importlib.metadata.version("elasticmoe")
    about = {"version": known, "protocol": VERSION}
    typer.echo(json.dumps(about) if as_json else f"elasticmoe {known}, wire protocol {VERSION}")


# --- keys ----------------------------------------------------------------------------------------


@keys_app.command("make")
def keys_make(keys: KeysDir = DEFAULT_KEYS) -> None:
    """Make the keys and the token if they are not there."""
    from elasticmoe_protocol.keys import ensure_keys

    with _plainly():
        ensure_keys(keys)
        typer.echo(f"{keys}: coordinator.json, sidecar.json and token are there")


@keys_app.command("rotate")
def keys_rotate(
    keys: KeysDir = DEFAULT_KEYS,
    finish: Annotated[bool, typer.Option("--finish", help="Take the old ones no more.")] = False,
) -> None:
    """Make new keys and a new token; the old ones are taken too until `--finish`."""
    from elasticmoe_protocol import keys as store

    with _plainly():
        if finish:
            store.finish(keys)
            typer.echo(f"{keys}: only the newest keys and token are taken now")
        else:
            store.rotate(keys)
            typer.echo(f"{keys}: new keys; hand out sidecar.json and token, then run with --finish")


# --- local ---------------------------------------------------------------------------------------


def _local(folder: Path | None) -> Any:
    from elasticmoe_cli.local import LocalGroup
    from elasticmoe_cli.profiles import cache

    return LocalGroup(folder or cache() / "local")


@contextlib.contextmanager
def _watching(as_json: bool) -> Iterator[Any]:
    """Shows the group while something is waited for."""
    from rich.console import Console

    from elasticmoe_cli import live

    if as_json:
        yield lambda _: None
        return
    with live.view(Console(stderr=True), transient=True) as show:
        yield lambda status: show(live.status(status))


@local_app.command("up")
def local_up(
    command: Annotated[
        list[str] | None, typer.Argument(help="An own `vllm serve MODEL …`, after `--`.")
    ] = None,
    size: Annotated[int, typer.Option(help="Ranks to start.")] = 2,
    max_size: Annotated[int, typer.Option(help="Largest DP size.")] = 4,
    engine: Annotated[Engine, typer.Option(help="Engine, without a command.")] = Engine.vllm_cpu,
    python: Annotated[str, typer.Option(help="Python that has vLLM.")] = sys.executable,
    policy: Annotated[Policy, typer.Option(help="Who says how many.")] = Policy.declared,
    folder: Dir = None,
    as_json: Json = False,
) -> None:
    """Start a group and wait until it serves."""
    from elasticmoe_cli import profiles
    from elasticmoe_cli.local import Options

    with _plainly():
        if not 2 <= size <= max_size:
            raise CommandFailed(f"size {size} is not between 2 and {max_size}: choose one", 2)
        group = _local(folder)
        found = profiles.own(command, python) if command else profiles.find(engine.value)
        group.create(found, Options(policy=policy.value, max_size=max_size))
        try:
            with _watching(as_json) as tick:
                operation = group.scale(size, tick)
        except BaseException as failure:
            group.down(keep_logs=isinstance(failure, CommandFailed))
            raise
        _print_local(group, operation, as_json)


@local_app.command("scale")
def local_scale(
    size: Annotated[int, typer.Argument(help="The DP size to have.")],
    folder: Dir = None,
    as_json: Json = False,
) -> None:
    """Start or stop instances and bring the group to a size."""
    with _plainly():
        group = _local(folder)
        with _watching(as_json) as tick:
            operation = group.scale(size, tick)
        _print_local(group, operation, as_json)


@local_app.command("status")
def local_status(
    folder: Dir = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it live.")] = False,
    as_json: Json = False,
) -> None:
    """Show the group of this host."""
    with _plainly():
        _show_status(_local(folder).status, watch, as_json)


@local_app.command("down")
def local_down(folder: Dir = None) -> None:
    """End the group of this host."""
    with _plainly():
        group = _local(folder)
        if not group.exists:
            raise CommandFailed(f"no group runs in {group.folder}: name its folder with --dir")
        group.down()
        typer.echo(f"{group.folder}: the group has ended")


def _print_local(group: Any, operation: dict[str, Any] | None, as_json: bool) -> None:
    status = group.status()
    if as_json:
        typer.echo(json.dumps(status))
        return
    from rich.console import Console

    from elasticmoe_cli import live

    if operation is not None:
        typer.echo(live.outcome(operation))
    Console().print(live.status(status))
    for one in status["instances"]:
        if one["ready"]:
            typer.echo(f"  rank {one['rank']}: http://{one['address']}:{one['servingPort']}/v1")


# --- demo ----------------------------------------------------------------------------------------


@app.command()
def demo(
    engine: Annotated[Engine, typer.Option(help="Engine to use.")] = Engine.vllm_cpu,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    kill: Annotated[bool, typer.Option("--kill", help="End with the loss of an engine.")] = False,
    clients: Annotated[int, typer.Option(help="Users at once.", min=1, max=64)] = 4,
) -> None:
    """A group on this host resizes 2 → 3 → 2 → 3 → 2 under load."""
    from rich.console import Console

    from elasticmoe_cli import demo as show
    from elasticmoe_cli import profiles

    with _plainly():
        profile = profiles.find(engine.value)
        if out is not None:
            show.write(out)  # not only after minutes
        report = show.run(profile, show.Plan(kill=kill, clients=clients), Console())
        if out is not None:
            show.write(out, report)
        if report.failed or report.output_mismatches:
            raise CommandFailed("the demo did not go as it should: see above")


if __name__ == "__main__":
    app()
