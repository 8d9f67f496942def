"""The demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elasticmoe_cli.commands.common import Engine, Json, plainly
from elasticmoe_cli.errors import CommandFailed


def demo(
    engine: Annotated[Engine, typer.Option(help="Engine to use.")] = Engine.vllm_cpu,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    kill: Annotated[bool, typer.Option("--kill", help="End with the loss of an engine.")] = False,
    clients: Annotated[int, typer.Option(help="Users at once.", min=1, max=64)] = 4,
    as_json: Json = False,
) -> None:
    """A group on this host resizes 2 → 3 → 2 → 3 → 2 under load."""
    from rich.console import Console

    from elasticmoe_cli import demo as show
    from elasticmoe_cli import profiles

    with plainly():
        profile = profiles.find(engine.value)
        if out is not None:
            show.write(out)  # not only after minutes
        report = show.run(profile, show.Plan(kill=kill, clients=clients), Console(stderr=as_json))
        if out is not None:
            show.write(out, report)
        if as_json:
            typer.echo(json.dumps(report.as_json()))
        if report.failed or report.output_mismatches:
            raise CommandFailed("the demo did not go as it should: see above")
