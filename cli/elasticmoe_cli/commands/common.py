"""Options that several commands have, and how a command ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from elasticmoe_cli.errors import CommandFailed

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
# Not Path.home(): a container's user may have no home, and names its keys.
DEFAULT_KEYS = Path(os.path.expanduser("~/.config/elasticmoe/keys"))


@contextlib.contextmanager
def plainly() -> Iterator[None]:
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
