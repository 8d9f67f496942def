"""A command in a file that changes: taken over without an engine, told while there is one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from elasticmoe_engine.command import CommandError, parse
from elasticmoe_engine.commands import Adopted, Commands
from elasticmoe_engine.facts import Facts, needs_new_launcher

SERVE = ("vllm", "serve", "m", "--port", "8000")


class Volume:
    """A mounted ConfigMap: the file is a link into `..data`, which is a link that is swapped."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self.file = folder / "command.json"
        folder.mkdir()
        self.file.symlink_to("..data/command.json")

    def put(self, content: Any) -> None:
        self._number += 1
        data = self._folder / f"..{self._number}"
        data.mkdir()
        text = content if isinstance(content, str) else json.dumps(content)
        (data / "command.json").write_text(text)
        new = self._folder / "..data_tmp"
        new.symlink_to(data.name)
        os.replace(new, self._folder / "..data")

    def command(self, revision: str, *flags: str, serve: tuple[str, ...] = SERVE) -> None:
        self.put({"revision": revision, "command": [*serve, *flags]})


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    volume = Volume(tmp_path / "volume")
    volume.command("a")
    return volume


@pytest.fixture
def commands(volume: Volume) -> Commands:
    return Commands.of_file(volume.file, needs_new_launcher)


def in_force(commands: Commands) -> tuple[str, tuple[str, ...]]:
    return commands.adopted.revision, commands.command.agreed


def told(commands: Commands) -> tuple[str, str, str]:
    return tuple(commands.as_json().values())  # type: ignore[return-value]


def test_the_file_is_in_force_from_the_beginning(commands: Commands) -> None:
    assert in_force(commands) == ("a", ())
    assert commands.look() == ""
    assert told(commands) == ("a", "", "")
    assert not commands.adopt()


def test_another_one_is_told_first_and_taken_over_when_there_is_no_engine(
    volume: Volume, commands: Commands
) -> None:
    volume.command("b", "--max-num-seqs", "8")
    assert "command b lies in" in commands.look()
    assert commands.look() == ""
    assert told(commands) == ("a", "b", "")
    assert in_force(commands) == ("a", ())
    assert commands.adopt()
    assert told(commands) == ("b", "", "")
    assert in_force(commands) == ("b", ("--max-num-seqs=8",))
    assert commands.look() == ""
    assert not commands.adopt()


def test_only_the_newest_one_is_taken_over(volume: Volume, commands: Commands) -> None:
    for revision in "bcd":
        volume.command(revision, "--seed", revision)
        commands.look()
    assert commands.adopt()
    assert in_force(commands) == ("d", ("--seed=d",))


def test_what_is_taken_back_is_not_taken_over(volume: Volume, commands: Commands) -> None:
    volume.command("b", "--seed", "1")
    commands.look()
    volume.command("a")
    assert commands.look() == ""
    assert told(commands) == ("a", "", "")
    assert not commands.adopt()


def test_a_file_that_is_written_in_place_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "command.json"
    file.write_text(json.dumps({"revision": "a", "command": SERVE}))
    commands = Commands.of_file(file, needs_new_launcher)
    commands.look()
    file.write_text(json.dumps({"revision": "b", "command": SERVE}))
    commands.look()
    assert told(commands) == ("a", "b", "")


def test_the_file_is_not_read_while_it_stays_the_same(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.look()
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it is read"))
    commands.look()


BAD = [
    pytest.param("{", "it is no JSON", id="no JSON"),
    pytest.param("[" * 200_000, "it is no JSON", id="too deep"),
    pytest.param([], '"revision": give a text', id="no object"),
    pytest.param({"command": SERVE}, '"revision": give a text', id="no revision"),
    pytest.param({"revision": "", "command": SERVE}, '"revision"', id="empty revision"),
    pytest.param({"revision": "x" * 129, "command": SERVE}, '"revision"', id="long revision"),
    pytest.param({"revision": "b"}, '"command": give a list of words', id="no command"),
    pytest.param({"revision": "b", "command": "vllm serve m"}, '"command"', id="one text"),
    pytest.param({"revision": "b", "command": ["vllm", 1]}, '"command"', id="number"),
    pytest.param({"revision": "b", "command": [*SERVE, "a\0"]}, '"command"', id="NUL"),
    pytest.param(
        '{"revision": "b", "command": ["vllm", "serve", "\\ud800"]}', '"command"', id="no text"
    ),
    pytest.param({"revision": "b", "command": []}, "give the engine's command", id="no words"),
    pytest.param({"revision": "b", "command": ["sh", "-c\nx"]}, "started warm", id="shell"),
    pytest.param({"revision": "b", "command": [*SERVE, "-dp", "2"]}, "leave out -dp", id="flag"),
    pytest.param(
        {"revision": "b", "command": [*SERVE, "--eplb-config", "[" * 200_000]},
        "",
        id="a flag that is too deep",
    ),
]


@pytest.mark.parametrize(("content", "said"), BAD)
def test_what_cannot_be_used_is_told_and_the_old_one_stays(
    volume: Volume, commands: Commands, content: Any, said: str
) -> None:
    volume.put(content)
    line = commands.look()
    assert line.startswith("WARNING: the command in ")
    assert commands.look() == ""
    assert said in commands.problem
    assert commands.problem
    assert "\n" not in commands.problem
    assert not commands.adopt()
    assert in_force(commands) == ("a", ())
    volume.command("c")
    commands.look()
    assert told(commands) == ("a", "c", "")
    assert commands.adopt()


def test_a_bad_one_drops_the_one_before_that_was_not_taken_over(
    volume: Volume, commands: Commands
) -> None:
    volume.command("b", "--seed", "1")
    commands.look()
    volume.command("c", "--headless")
    commands.look()
    assert told(commands) == ("a", "c", "a rank has its own API server: leave out --headless")
    assert not commands.adopt()


def test_a_file_that_is_away_is_told_and_the_old_one_stays(
    volume: Volume, commands: Commands
) -> None:
    volume.file.unlink()
    assert "can't be read (No such file or directory)" in commands.look()
    assert commands.look() == ""
    assert told(commands)[:2] == ("a", "")
    assert not commands.adopt()
    volume.file.symlink_to("..data/command.json")
    commands.look()
    assert told(commands) == ("a", "", "")


@pytest.mark.parametrize("content", [None, "{", {"revision": "a", "command": ["vllm"]}])
def test_a_launcher_does_not_begin_without_a_command(tmp_path: Path, content: Any) -> None:
    volume = Volume(tmp_path / "v")
    if content is not None:
        volume.put(content)
    with pytest.raises(CommandError) as error:
        Commands.of_file(volume.file, needs_new_launcher)
    assert str(error.value).startswith(f"--command-file {volume.file}: ")
    assert len(str(error.value).splitlines()) == 1


# --- what another command may change ------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [("vllm", "serve", "m", "--port", "8001"), (*SERVE, "--host", "::1")]
)
def test_another_address_needs_new_pods(
    volume: Volume, commands: Commands, other: tuple[str, ...]
) -> None:
    volume.command("b", serve=other)
    commands.look()
    assert told(commands)[:2] == ("a", "b")
    assert "another address needs new pods" in commands.problem
    assert not commands.adopt()


def models(tmp_path: Path, **experts: int) -> dict[str, str]:
    for name, count in experts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_experts": count}))
    return {name: str(tmp_path / name) for name in experts}


def test_another_model_is_taken_over_only_if_it_has_as_many_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ELASTICMOE_NUM_EXPERTS", raising=False)
    model = models(tmp_path, first=16, tuned=16, larger=32)
    volume = Volume(tmp_path / "v")
    volume.command("a", serve=("vllm", "serve", model["first"]))
    commands = Commands.of_file(volume.file, needs_new_launcher)
    facts = Facts(commands, "elasticmoe_sim.entry:main")
    assert facts.as_json()["num_experts"] == 16
    volume.command("b", serve=("vllm", "serve", model["larger"]))
    commands.look()
    assert "32 routed experts a layer, the group was made for 16" in commands.problem
    volume.command("c", serve=("vllm", "serve", str(tmp_path / "nowhere")))
    commands.look()
    assert "is not on this machine" in commands.problem
    assert not commands.adopt()
    volume.command("d", "--seed", "1", serve=("vllm", "serve", model["tuned"]))
    commands.look()
    assert commands.adopt()
    assert facts.folder == Path(model["tuned"])
    told = facts.as_json()
    assert (told["model"], told["num_experts"], told["flags"]) == (model["tuned"], 16, "--seed=1")
    assert (told["command"], told["next_command"], told["next_problem"]) == ("d", "", "")


def test_without_a_file_nothing_changes() -> None:
    commands = Commands(Adopted(parse(SERVE)))
    assert (commands.look(), commands.adopt()) == ("", False)
    assert told(commands) == ("", "", "")
