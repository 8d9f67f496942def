"""A group that runs: look at it, resize it, restart it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from elasticmoe_cli.commands.common import (
    DEFAULT_KEYS,
    HTTP_DEFAULT,
    DrainTimeout,
    Json,
    KeysDir,
    Url,
    Wait,
    plainly,
)
from elasticmoe_cli.errors import CommandFailed


def status(
    coordinator: Url = HTTP_DEFAULT,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it live.")] = False,
    as_json: Json = False,
) -> None:
    """Show a group: its ranks and what it does."""
    from elasticmoe_cli.api import Coordinator

    with plainly():
        show_status(Coordinator(coordinator).status, watch, as_json)


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

    with plainly():
        group = Coordinator(coordinator, keys)
        _follow(group, group.scale(size, drain_timeout), wait, as_json)


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

    with plainly():
        group = Coordinator(coordinator, keys)
        _follow(group, group.restart(size, drain_timeout), wait, as_json)


def show_status(status: Callable[[], dict[str, Any]], watch: bool, as_json: bool) -> None:
    """Print a status, again and again when it is watched."""
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
