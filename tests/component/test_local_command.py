"""The engine's arguments of a running group are changed in place: file, restart, no failed request.

The tests share one group, in the order in which they are written.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from elasticmoe_cli.local import free_port
from support.gate import until
from support.local import Local, Status, local_group

NAMES = ("a", "b")


class Files:
    """The command files of a group. As a ConfigMap, each one is replaced as a whole."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self._folder, self._words = folder, words
        self._ports = {name: free_port() for name in NAMES}

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def write(self, revision: str, *flags: str, names: tuple[str, ...] = NAMES) -> None:
        for name in names:
            serving = ["--host", "127.0.0.1", "--port", str(self._ports[name])]
            command = [*self._words, *serving, *flags]
            new = self._folder / f"{name}.new"
            new.write_text(json.dumps({"revision": revision, "command": command}))
            new.replace(self.path(name))


Group = tuple[Local, Files]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTICMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with local_group(tmp_path_factory.mktemp("g"), 0, preflight_limit_s=6.0) as local:
            files = Files(tmp_path_factory.mktemp("files"), list(local.profile.command))
            files.write("one")
            for number, name in enumerate(NAMES):
                local.join(name, "--ordinal", str(number), command_file=files.path(name))
            try:
                until(lambda: local.status()["state"] != "Learning", 20)
                local.api.scale(2)
                asyncio.run(local.serves(2))
                yield local, files
            except BaseException:
                print(*(local.join_log(name)[-3000:] for name in NAMES), sep="\n---\n")
                raise


def commands(status: Status) -> list[tuple[str, str]]:
    return [(one["command"], one["nextCommand"]) for one in status["instances"]]


def longest(status: Status) -> set[int]:
    """max_model_len of the engines that serve."""
    return {
        httpx.get(f"http://127.0.0.1:{one['servingPort']}/v1/models", timeout=10).json()["data"][0][
            "max_model_len"
        ]
        for one in status["instances"]
    }


def engine_of(instance: Status) -> int:
    """Its API server's process."""
    state = httpx.get(f"http://127.0.0.1:{instance['probePort']}/state", timeout=10).json()
    return int(state["engine"]["pid"])


async def restarted(local: Local) -> Status:
    """Restart; what becomes of it."""
    return await local.ended(await asyncio.to_thread(local.api.restart))


async def test_a_changed_command_is_shown_and_a_restart_makes_it_run(started: Group) -> None:
    local, files = started
    before = await local.serves(2)
    assert commands(before) == [("one", "")] * 2
    async with local.users() as load:
        files.write("two", "--max-num-seqs", "8", "--max-model-len", "300")
        status = await local.until(
            "both have the new one", lambda s: commands(s) == [("one", "two")] * 2
        )
        assert [one["nextCommandProblem"] for one in status["instances"]] == [""] * 2
        await load.progress(4)
        status = await local.serves(2)
        assert status["generation"] == before["generation"], "it waits for a restart"
        assert status["reason"] == "AsDesired"
        assert (await restarted(local))["state"] == "succeeded"
        after = await local.serves(2, before["generation"] + 1)
        assert commands(after) == [("two", "")] * 2
    assert longest(after) == {300}
    assert [one["warm"] for one in after["instances"]] == [True, True]
    assert after["instances"][0]["incarnation"] == before["instances"][0]["incarnation"]


async def test_one_that_cannot_be_used_changes_nothing(started: Group) -> None:
    local, files = started
    before = await local.serves(2)
    async with local.users():
        files.write("bad", "--headless")
        status = await local.until(
            "both say so",
            lambda s: all("--headless" in one["nextCommandProblem"] for one in s["instances"]),
        )
        assert commands(status) == [("two", "bad")] * 2
        assert [(one["ready"], one["reason"]) for one in status["instances"]] == [(True, "")] * 2
        assert (await restarted(local))["state"] == "succeeded"
        after = await local.serves(2, before["generation"] + 1)
    assert commands(after) == [("two", "bad")] * 2


async def test_a_restart_before_all_have_it_is_withdrawn_and_they_serve_on(started: Group) -> None:
    local, files = started
    before = await local.serves(2)
    launches = {one["instance"]: one["rank"] for one in before["instances"]}
    async with local.users():
        files.write("three", "--max-model-len", "301", names=("a",))
        await local.until("one has it", lambda s: commands(s) == [("two", "three"), ("two", "bad")])
        ended = await restarted(local)
        assert ended["state"] == "withdrawn"
        assert "(a: three, b: two)" in ended["error"]
        after = await local.serves(2)
    assert after["generation"] == before["generation"]
    assert {one["instance"]: one["rank"] for one in after["instances"]} == launches


async def test_a_recovery_starts_the_new_one_too(started: Group) -> None:
    local, files = started
    before = await local.serves(2)
    files.write("four", "--max-model-len", "302")
    status = await local.until("both have it", lambda s: commands(s) == [("two", "four")] * 2)
    os.kill(engine_of(status["instances"][1]), signal.SIGKILL)
    after = await local.serves(2, before["generation"] + 1)
    assert after["history"][-1]["kind"] == "recover"
    assert commands(after) == [("four", "")] * 2
    assert longest(after) == {302}
