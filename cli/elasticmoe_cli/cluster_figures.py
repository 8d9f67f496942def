"""What the demo on a cluster reads, says and shows: pure."""

from __future__ import annotations

import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elasticmoe_cli import demo, live
from elasticmoe_cli.errors import CommandFailed

PHASES: Mapping[str, Sequence[str]] = {
    "Start": ("CreatePods", "Start"),
    "ScaleUp": ("CreatePods", "Resize", "Ready"),
    "ScaleDown": ("Resize", "RemovePods"),
}
_WORDS = {
    "Start": "start",
    "ScaleUp": "scale up",
    "ScaleDown": "scale down",
    "Restart": "restart",
    "CreatePods": "create pods",
    "Resize": "resize",
    "Ready": "ready",
    "RemovePods": "remove pods",
}

Status = Mapping[str, Any]


@dataclass
class Step(demo.Step):
    """One resize. total_s: from `kubectl scale` to Ready, as seen from outside.

    create_s: until new pods had imported their engine and were registered; remove_s: until the
    pods that left were gone.
    """

    create_s: float = 0.0
    remove_s: float = 0.0
    phases: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Report(demo.Report):
    """What the demo saw. start_s: from `kubectl apply` to Available."""

    start_s: float = 0.0
    resizes: list[Step] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For `--out`."""
        steps = [
            {
                "from": one.before,
                "to": one.after,
                "total_s": round(one.total_s, 3),
                "create_s": round(one.create_s, 3),
                "prepare_s": round(one.prepare_s, 3),
                "commit_s": round(one.commit_s, 3),
                "remove_s": round(one.remove_s, 3),
            }
            for one in self.resizes
        ]
        return super().as_json() | {
            "steps": steps,
            "start_s": round(self.start_s, 3),
            "comparisons": self.comparisons,
            "errors": self.errors,
        }


def render(text: str, values: Mapping[str, str]) -> str:
    """A file of deploy/ with its placeholders filled in."""
    return string.Template(text).substitute(values)


def image_values(image: str) -> list[str]:
    """Values of the chart for an image: registry/path:tag or registry/path@digest.

    Raises CommandFailed.
    """
    name, at, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, ""
    if not (tag or at) or not repository:
        raise CommandFailed(f"image {image}: name it with its tag, such as {name}:1.0", 2)
    values = [f"image.repository={repository}"]
    values += [f"image.tag={tag}"] if tag else []
    values += [f"image.digest={digest}"] if at else []
    return [word for value in values for word in ("--set-string", value)]


def is_available(status: Status) -> bool:
    """Condition Available."""
    return any(
        one["type"] == "Available" and one["status"] == "True"
        for one in status.get("conditions") or ()
    )


def ended(status: Status, size: int, known: set[str]) -> Mapping[str, Any] | None:
    """The operation that brought the group to a size, once nothing is left to do.

    known: ids of the operations before.
    """
    if status.get("operation"):
        return None
    wanted = ("desiredReplicas", "createdReplicas", "replicas", "readyReplicas")
    if any(status.get(key) != size for key in wanted):
        return None
    for one in reversed(status.get("history") or []):
        if one["id"] not in known and one["to"] == size and one["result"] == "Succeeded":
            found: Mapping[str, Any] = one
            return found
    return None


def ids(status: Status) -> set[str]:
    """Of all operations that the status knows."""
    return {one["id"] for one in status.get("history") or ()}


def step(operation: Status, group: Mapping[str, Any], total_s: float) -> Step:
    """A resize out of the operator's operation and the coordinator's status."""
    outer = {one["name"]: one["seconds"] for one in operation["phases"]}
    inner: list[tuple[str, float]] = []
    for one in group["history"]:
        if one["id"] == operation["id"]:
            inner = [(each["phase"], each["seconds"]) for each in one["phases"]]
    seconds = dict(inner)
    phases: list[tuple[str, float]] = []
    for name, spent in outer.items():
        phases += inner if name == "Resize" and inner else [(_plain(name), spent)]
    return Step(
        operation["from"],
        operation["to"],
        total_s,
        seconds.get("prepare", 0.0),
        seconds.get("commit", 0.0),
        outer.get("CreatePods", 0.0),
        outer.get("RemovePods", 0.0),
        phases,
    )


def sentence(step: Step) -> str:
    """A resize in a line."""
    phases = live.phases([{"phase": name, "seconds": spent} for name, spent in step.phases])
    return f"{step.before} → {step.after} in {step.total_s:.1f} s{phases}"


def ready_ranks(group: Mapping[str, Any]) -> list[str]:
    """URLs of the ranks that serve, out of the coordinator's status."""
    return [
        f"http://{host(one['address'])}:{one['servingPort']}"
        for one in group["instances"]
        if one["ready"]
    ]


def host(address: str) -> str:
    """An address for a URL."""
    return f"[{address}]" if ":" in address else address


# --- what is shown ------------------------------------------------------------------------------


def view(name: str, status: Status, totals: Mapping[str, Any] | None) -> RenderableType:
    """The group while it runs: its widths, its operation, its users."""
    available = is_available(status)
    head = Text.assemble(
        (name, "bold"),
        "  ",
        ("Available" if available else "not yet available", "green" if available else "yellow"),
        "  ",
        f"desired {status.get('desiredReplicas', '-')}, "
        f"created {status.get('createdReplicas', 0)}, "
        f"registered {status.get('registeredReplicas', 0)}, "
        f"active {status.get('replicas', 0)}, "
        f"ready {status.get('readyReplicas', 0)}",
    )
    parts: list[RenderableType] = [head]
    if status.get("operation"):
        parts.append(_operation(status["operation"]))
    elif status.get("message"):
        parts.append(Text(status["message"], style="yellow"))
    if totals is not None:
        parts.append(
            Text(
                f"{totals['requests']} requests, {totals['failed']} failed, "
                f"{totals['chunks']} chunks, longest gap {totals['longest_gap_s']:.2f} s",
                style="red" if totals["failed"] else "green",
            )
        )
    return Group(*parts)


def _operation(running: Mapping[str, Any]) -> RenderableType:
    known = PHASES.get(running["kind"], ())
    phase = running["phase"]
    done = known.index(phase) if phase in known else 0
    since = datetime.fromisoformat(running["startedAt"]).timestamp()
    seconds = max(0.0, time.time() - since)
    row = Table.grid(padding=(0, 1))
    inner = f": {_plain(running['groupPhase'])}" if running.get("groupPhase") else ""
    row.add_row(
        Text(f"{_plain(running['kind'])} {running['from']} → {running['to']}", "bold magenta"),
        ProgressBar(total=max(1, len(known)), completed=done, width=24),
        f"{_plain(phase)}{inner}  {seconds:.0f} s",
    )
    if running.get("message"):
        return Group(row, Text(running["message"], style="dim"))
    return row


def table(report: Report) -> Table:
    """All resizes."""
    found = Table(title=f"Resizes under load in a cluster ({report.engine})")
    for name in ("step", "total s", "new pod s", "prepare s", "commit s"):
        found.add_column(name, justify="left" if name == "step" else "right")
    for one in report.resizes:
        found.add_row(
            f"{one.before} → {one.after}",
            f"{one.total_s:.2f}",
            f"{one.create_s:.2f}" if one.create_s else "-",
            f"{one.prepare_s:.2f}",
            f"{one.commit_s:.2f}",
        )
    return found


def _plain(word: str) -> str:
    return _WORDS.get(word, word.replace("_", " "))
