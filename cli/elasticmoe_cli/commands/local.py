"""A whole group on this host."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from elasticmoe_cli.commands.common import Dir, Engine, Json, Policy, plainly
from elasticmoe_cli.commands.group import show_status
from elasticmoe_cli.errors import CommandFailed

app = typer.Typer(help="A whole group on this host, as processes.", no_args_is_help=True)


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


@app.command("up")
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

    with plainly():
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


@app.command("scale")
def local_scale(
    size: Annotated[int, typer.Argument(help="The DP size to have.")],
    folder: Dir = None,
    as_json: Json = False,
) -> None:
    """Start or stop instances and bring the group to a size."""
    with plainly():
        group = _local(folder)
        with _watching(as_json) as tick:
            operation = group.scale(size, tick)
        _print_local(group, operation, as_json)


@app.command("status")
def local_status(
    folder: Dir = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it live.")] = False,
    as_json: Json = False,
) -> None:
    """Show the group of this host."""
    with plainly():
        show_status(_local(folder).status, watch, as_json)


@app.command("down")
def local_down(folder: Dir = None, as_json: Json = False) -> None:
    """End the group of this host."""
    with plainly():
        group = _local(folder)
        if not group.exists:
            raise CommandFailed(f"no group runs in {group.folder}: name its folder with --dir")
        group.down()
        ended = {"ended": str(group.folder)}
        typer.echo(json.dumps(ended) if as_json else f"{group.folder}: the group has ended")


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
