"""The command `elasticmoe`: all its commands, put together."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from elasticmoe_cli.commands import demo, group, keys, load, local, operator, parts
from elasticmoe_cli.commands.common import Json


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


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    import importlib.metadata

    from elasticmoe_protocol.codec import VERSION

    known = importlib.metadata.version("elasticmoe")
    about = {"version": known, "protocol": VERSION}
    typer.echo(json.dumps(about) if as_json else f"elasticmoe {known}, wire protocol {VERSION}")


for _command in (
    *(operator.operator, parts.coordinator, parts.sidecar, parts.join, parts.inject),
    *(group.status, group.scale, group.restart, demo.demo, load.load),
):
    app.command()(_command)
app.add_typer(local.app, name="local")
app.add_typer(keys.app, name="keys")


if __name__ == "__main__":
    app()
