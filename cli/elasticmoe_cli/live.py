"""Status and operations as tables and bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
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
WORTH_SAYING_S = 0.05
"""A phase that was shorter is left out of an operation's summary."""
_COLOURS = {"Serving": "green", "Failed": "red", "Waiting": "yellow", "Learning": "yellow"}
_STATES = {"active": "green", "standby": "cyan", "lost": "red", "exited": "red"}

Show = Callable[[RenderableType], None]


class Totals(Protocol):
    """What the users of a demo saw, of any report."""

    requests: int
    failed: int
    longest_gap_s: float
    output_mismatches: int
    comparisons: int
    largest_difference: float
    errors: dict[str, int]


def print_done(console: Console, line: str) -> None:
    """A step of a demo that is over."""
    console.print(f"[green]✓[/] {line}", highlight=False)


def print_totals(console: Console, report: Totals) -> None:
    """A demo's last line, and what failed."""
    colour = "red" if report.failed else "green"
    console.print(
        f"[{colour}]{report.requests} requests, {report.failed} failed[/]; longest gap in a "
        f"stream {report.longest_gap_s:.2f} s; {report.output_mismatches} of "
        f"{report.comparisons} log-probability comparisons differ (largest difference "
        f"{report.largest_difference:.4f})"
    )
    for error, count in report.errors.items():
        console.print(f"  {count} × {error}", style="red", markup=False)


@contextmanager
def view(console: Console, *, transient: bool = False) -> Iterator[Show]:
    """Shows what it is given, each time in place of the last. Without a terminal: nothing.

    What is printed meanwhile or afterwards (to stderr, too) has its own line.
    """
    if not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, transient=transient, auto_refresh=False) as live:
        yield lambda what: live.update(what, refresh=True)


def status(group: Mapping[str, Any], extra: RenderableType | None = None) -> RenderableType:
    """The whole group: a head line, the running operation, a row for each instance."""
    colour = _COLOURS.get(group["state"], "magenta")
    size, desired = group["size"], group["desired"]
    words = [f"{size} rank{'s' * (size != 1)}"]
    if size != desired and group["operation"] is None:
        words[0] += f" ({desired} desired)"
    if group["generation"]:
        words.append(f"generation {group['generation']}")
    if group["slotsPerRank"]:
        redundant = group["redundantExperts"]
        words.append(f"{group['slotsPerRank']} expert slots each ({redundant} redundant)")
    head = Text.assemble(
        (group["deployment"], "bold"),
        "  ",
        (group["state"], f"bold {colour}"),
        "  " + ", ".join(words),
    )
    parts: list[RenderableType] = [head]
    if group["operation"] is not None:
        parts.append(operation(group["operation"]))
    elif group["message"]:
        parts.append(Text(f"{group['reason']}: {group['message']}", style="yellow"))
    if group["instances"]:
        parts.append(_instances(group["instances"]))
    for one in group["instances"]:
        if one["reason"]:
            parts.append(Text(f"{one['instance']}: {one['reason']}", style="yellow"))
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
    attempt = f" (attempt {running['attempt']})" if running["attempt"] > 1 else ""
    bar = ProgressBar(total=max(1, len(known)), completed=done, width=24)
    row.add_row(
        Text(_title(running), style="bold magenta"),
        bar,
        f"{_plain(phase)}{attempt}  {seconds:.1f} s",
    )
    if running["reason"]:
        return Group(row, Text(running["reason"], style="dim"))
    return row


def outcome(ended: Mapping[str, Any]) -> str:
    """An operation that has ended (or was not waited for), in one line."""
    took = sum(one["seconds"] for one in ended["phases"])
    if ended["state"] == "running":
        return f"{_title(ended)} has begun: operation {ended['id']}"
    return f"{_title(ended)} {ended['state']} in {took:.1f} s{phases(ended['phases'])}"


def phases(times: Sequence[Mapping[str, Any]]) -> str:
    """Where the seconds went, in brackets; "" when that was nowhere."""
    parts = [
        f"{_plain(one['phase'])} {one['seconds']:.1f}"
        for one in times
        if one["seconds"] >= WORTH_SAYING_S
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _title(operation: Mapping[str, Any]) -> str:
    return f"{_plain(operation['kind'])} {operation['fromSize']} → {operation['toSize']}"


def _plain(word: str) -> str:
    return word.replace("_", " ")


def _instances(instances: Sequence[Mapping[str, Any]]) -> Table:
    """Fits in 80 columns as long as names are short."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("name", "rank", "state", "ready", "fence"):
        table.add_column(name, no_wrap=True)
    for name in ("requests", "held", "running", "waiting", "KV"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in instances:
        state = f"{one['state']}, silent" if one["suspect"] else one["state"]
        table.add_row(
            one["instance"],
            "-" if one["rank"] is None else str(one["rank"]),
            Text(state, style=_STATES.get(one["state"], "magenta")),
            "yes" if one["ready"] else "no",
            _plain(one["fence"]),
            str(one["inFlight"]),
            str(one["held"]),
            f"{one['running']:.0f}",
            f"{one['waiting']:.0f}",
            f"{one['kvCache']:.0%}",
        )
    return table
