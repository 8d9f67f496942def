"""Keys and token of a group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elasticmoe_cli.commands.common import DEFAULT_KEYS, Json, KeysDir, plainly

app = typer.Typer(help="Keys and token of a group.", no_args_is_help=True)


@app.command("make")
def keys_make(keys: KeysDir = DEFAULT_KEYS, as_json: Json = False) -> None:
    """Make the keys and the token if they are not there."""
    from elasticmoe_protocol.keys import ensure_keys

    with plainly():
        ensure_keys(keys)
        _say(keys, "coordinator.json, sidecar.json and token are there", as_json)


@app.command("rotate")
def keys_rotate(
    keys: KeysDir = DEFAULT_KEYS,
    finish: Annotated[bool, typer.Option("--finish", help="Take the old ones no more.")] = False,
    as_json: Json = False,
) -> None:
    """Make new keys and a new token; the old ones are taken too until `--finish`."""
    from elasticmoe_protocol import keys as store

    with plainly():
        if finish:
            store.finish(keys)
            _say(keys, "only the newest keys and token are taken now", as_json)
        else:
            store.rotate(keys)
            line = "new keys; hand out sidecar.json and token, then run with --finish"
            _say(keys, line, as_json)


def _say(folder: Path, line: str, as_json: bool) -> None:
    typer.echo(json.dumps({"keys": str(folder)}) if as_json else f"{folder}: {line}")
