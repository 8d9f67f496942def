"""The pages: their links, commands and words are those of the product."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from elasticmoe_cli.live import PHASES
from elasticmoe_cli.main import app
from elasticmoe_coordinator import http
from elasticmoe_coordinator.core import describe
from elasticmoe_coordinator.core.config import GroupConfig
from elasticmoe_coordinator.core.status import GroupState, GroupStatus, Reason
from elasticmoe_coordinator.metrics import Metrics as CoordinatorMetrics
from elasticmoe_sidecar.metrics import Metrics as SidecarMetrics

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "engines", "benchmarks", "operator")
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *(one for name in FOLDERS for one in ROOT.glob(f"{name}/**/*.md")),
    )
    if path.stat().st_size
)
OPERATIONS = ROOT / "docs" / "operations.md"
OPERATORS = frozenset({"|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1"})
BEFORE = re.compile(r"\w+=.*|exec|srun")
"""Words that may stand before a command."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- what a page says ----------------------------------------------------------------------------


def without_blocks(text: str) -> str:
    """A page's prose: neither fenced nor indented blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"^ {4}.*$", "", text, flags=re.M)


def block_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented blocks, those that go on after a backslash as one."""
    fenced = False
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ ")


def commands(line: str, program: str) -> Iterator[list[str]]:
    """What follows `program` on a shell's line, up to the next operator."""
    if not re.search(rf"(^|[\s/]){program}\s", line):
        return
    words = shlex.split(re.sub(r"\$\(\(.*?\)\)", "7", line), comments=True)
    while words:
        end = next((at for at, one in enumerate(words) if one in OPERATORS), len(words))
        first, words = words[:end], words[end + 1 :]
        while first and BEFORE.fullmatch(first[0]):
            first.pop(0)
        if first and first[0].rpartition("/")[2] == program:
            yield first[1:]


def spans(text: str, program: str) -> Iterator[list[str]]:
    """Commands of a program in the prose."""
    for span in re.findall(r"`([^`\n]+)`", without_blocks(text)):
        if span.startswith(program + " "):
            yield shlex.split(span)[1:]


def section(page: Path, title: str) -> str:
    """A page's part under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
    assert found, f"{page.name} has no part {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """Cells of all tables' rows, without the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {at for at, row in enumerate(table) if set(row[0]) == {"-"}}
    return [row for at, row in enumerate(table) if at not in heads and at + 1 not in heads]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- links ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: there is no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


# --- commands ------------------------------------------------------------------------------------


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words name, and what is left of them."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, f"elasticmoe {shlex.join(words)}: there is no {name!r}"
        command = command.commands[name]
    return command, rest


def unknown_options(words: list[str]) -> list[str]:
    """Options that a command does not have."""
    command, rest = command_of(words)
    own = rest[: rest.index("--")] if "--" in rest else rest
    known = {"--help"}
    for one in command.params:
        known.update(one.opts, one.secondary_opts)
    return [word for word in own if word.startswith("-") and word.partition("=")[0] not in known]


@pages
def test_commands_in_blocks_parse(page: Path) -> None:
    for line in block_lines(page.read_text()):
        for words in commands(line, "elasticmoe"):
            assert not unknown_options(words), f"`{line}`: no such option"
            command, rest = command_of(words)
            if "--help" in rest or not rest:
                continue
            try:
                command.make_context("elasticmoe", rest)
            except typer.TyperException as error:
                pytest.fail(f"`{line}`: {error.format_message()}")


@pages
def test_commands_in_the_prose_exist(page: Path) -> None:
    for words in spans(page.read_text(), "elasticmoe"):
        assert not unknown_options(words), f"`elasticmoe {shlex.join(words)}`: no such option"


@pages
def test_make_targets_exist(page: Path) -> None:
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    found = [words for line in block_lines(text) for words in commands(line, "make")]
    for words in (*found, *spans(text, "make")):
        for word in words:
            assert "=" in word or word in targets, f"make {shlex.join(words)}: no target {word!r}"


def test_a_wrong_command_is_found() -> None:
    line = 'A=1 .venv/bin/elasticmoe scale 3 --sice 2 && make nothing  # "'.replace('"', "")
    assert [unknown_options(words) for words in commands(line, "elasticmoe")] == [["--sice"]]
    assert list(commands(line, "make")) == [["nothing"]]


# --- words of the status -------------------------------------------------------------------------


def test_every_reason_is_explained_and_no_other() -> None:
    told = [word for row in rows(section(OPERATIONS, "Reasons")) for word in code(row[0])]
    assert sorted(told) == sorted(get_args(Reason))


def test_every_reason_can_be_said() -> None:
    source = inspect.getsource(describe)
    assert [word for word in get_args(Reason) if f'"{word}"' not in source] == []


def test_every_state_is_explained_and_no_other() -> None:
    told = [word for row in rows(section(OPERATIONS, "States")) for word in code(row[0])]
    assert sorted(told) == sorted(get_args(GroupState))


def test_every_phase_is_explained() -> None:
    text = section(OPERATIONS, "Operations")
    told: dict[str, tuple[str, ...]] = {}
    for part in re.split(r"^(?=\*\*)", text, flags=re.M)[1:]:
        kind = re.match(r"\*\*(\w+)\*\*", part)
        assert kind
        body = part.split("How a resize fails")[0]
        told[kind[1]] = tuple(word for row in rows(body) for word in code(row[0]))
    assert told == {kind: tuple(phases) for kind, phases in PHASES.items()}


# --- limits, metrics, errors ---------------------------------------------------------------------


def test_limits_are_those_of_the_configuration() -> None:
    table = rows(section(OPERATIONS, "Limits of time"))
    defaults = {one.name: one.default for one in fields(GroupConfig)}
    told = {code(name)[0]: float(value) for name, value, *_ in table}
    assert told == {name: float(defaults[name]) for name in told}
    numbers = {name for name, value in defaults.items() if isinstance(value, int | float)}
    assert set(told) == numbers - {"min_size", "max_size"}


def test_limits_have_the_options_that_the_coordinator_has() -> None:
    table = rows(section(OPERATIONS, "Limits of time"))
    command, _ = command_of(["coordinator"])
    options = {name for one in command.params for name in one.opts}
    for name, _, option, *_ in table:
        expected = "--" + code(name)[0].replace("_", "-")
        assert code(option) == ([expected] if expected in options else []), name


def families(text: str) -> set[str]:
    """Names of the series in Prometheus' text."""
    found = re.findall(r"^# TYPE (\w+) \w+$", text, re.M)
    return {name for name in found if not name.endswith("_created")}


def status() -> GroupStatus:
    values: dict[str, Any] = {one.name: 0 for one in fields(GroupStatus)}
    return GroupStatus(**values | {"state": "Serving", "instances": (), "history": ()})


def test_every_metric_is_told() -> None:
    told = {word for row in rows(section(OPERATIONS, "Metrics")) for word in code(row[0])}
    coordinator = CoordinatorMetrics(status, dict)
    assert told == families(coordinator.text().decode()) | families(
        SidecarMetrics().text().decode()
    )


def test_every_error_of_the_http_api_is_told() -> None:
    table = rows(section(ROOT / "docs" / "http-api.md", "Errors"))
    told = {(int(row[0]), code(row[1])[0]) for row in table}
    own = {(401, "unauthorized"), (503, "keys")}
    rejected = {(status, name) for name, status in http._STATUS.items()}
    assert told == own | rejected | set(http._CODES.items())
