"""Load on a service."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from elasticmoe_cli.commands.common import plainly


def load(
    url: Annotated[list[str], typer.Option(help="Where requests go, such as http://qwen:8000.")],
    model: Annotated[str, typer.Option(help="The name that requests use.")],
    clients: Annotated[int, typer.Option(help="Users at once.", min=1, max=1024)] = 4,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 24,
    seconds: Annotated[float | None, typer.Option(help="How long; until told.", min=0)] = None,
    log_probabilities: Annotated[
        bool, typer.Option("--log-probabilities", help="No load: what each URL says of a prompt.")
    ] = False,
) -> None:
    """Streaming users on a service; prints totals as JSON lines until SIGTERM or Ctrl-C.

    Nothing is sent twice: what fails counts as failed, and then the status is 1.
    """
    from elasticmoe_cli import traffic

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    with plainly():
        if log_probabilities:
            say(traffic.ask(url, model))
            return
        last = traffic.run(url, model, say, clients=clients, max_tokens=max_tokens, seconds=seconds)
        if last["failed"]:
            raise typer.Exit(1)
