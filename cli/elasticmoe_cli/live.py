"""Status and operations as tables and bars. Makes renderables, prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PHASES: Mapping[str, Sequence[str]] = {
    "start": ("wait", "start"),
    "scale_up": ("wait", "preflight", "launch", "prepare", "commit", "settle"),
    "scale_down": ("lame_duck", "close", "prepare", "commit", "retire"),
    "restart": ("preflight", "drain", "stop", "start"),
    "recover": ("kill", "replace", "start"),
}
_COLOURS = {"Serving": "green", "Failed": "red", "Waiting": "yellow", "Learning": "yellow"}
_STATES = {"active": "green", "standby": "cyan", "lost": "red", "exited": "red"}


def status(group: Mapping[str, Any], extra: RenderableType | None = None) -> RenderableType:
    """The whole group: a head line, the running operation, a row for each instance."""
    colour = _COLOURS.get(group["state"], "magenta")
    head = Text.assemble(
        (group["deployment"], "bold"),
        "  ",
        (group["state"], f"bold {colour}"),
        f"  {group['size']} of {group['desired']} ranks  generation {group['generation']}  "
        f"{group['slotsPerRank']} expert slots a rank, {group['redundantExperts']} redundant",
        "" if group["elastic"] else "  not elastic",
    )
    parts: list[RenderableType] = [head]
    if group["operation"] is not None:
        parts.append(operation(group["operation"]))
    elif group["message"]:
        parts.append(Text(f"{group['reason']}: {group['message']}", style="yellow"))
    parts.append(_instances(group["instances"]))
    if extra is not None:
        parts.append(extra)
    return Group(*parts)


def operation(running: Mapping[str, Any]) -> RenderableType:
    """A running operation with its bar."""
    known = PHASES.get(running["kind"], ())
    phase = running["phase"]
    done = known.index(phase) if phase in known else len(known)
    seconds = sum(one["seconds"] for one in running["phases"])
    row = Table.grid(padding=(0, 1))
    words = f"{running['kind'].replace('_', ' ')} {running['fromSize']} → {running['toSize']}"
    attempt = f" (attempt {running['attempt']})" if running["attempt"] > 1 else ""
    bar = ProgressBar(total=max(1, len(known)), completed=done, width=24)
    row.add_row(Text(words, style="bold magenta"), bar, f"{phase}{attempt}  {seconds:.1f} s")
    if running["reason"]:
        return Group(row, Text(running["reason"], style="dim"))
    return row


def _instances(instances: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("instance", "rank", "state", "ready", "fence"):
        table.add_column(name)
    for name in ("in flight", "held", "running", "waiting", "KV"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in instances:
        state = f"{one['state']} (suspect)" if one["suspect"] else one["state"]
        table.add_row(
            one["instance"],
            "" if one["rank"] is None else str(one["rank"]),
            Text(state, style=_STATES.get(one["state"], "magenta")),
            "yes" if one["ready"] else "no",
            one["fence"],
            str(one["inFlight"]),
            str(one["held"]),
            f"{one['running']:.0f}",
            f"{one['waiting']:.0f}",
            f"{one['kvCache']:.0%}",
            Text(one["reason"], style="yellow"),
        )
    return table
