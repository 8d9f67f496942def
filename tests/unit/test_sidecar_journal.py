"""The newest goal on disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import pytest
from elasticmoe_protocol.messages import Goal, Record
from elasticmoe_sidecar.journal import Journal, Started


def goal(term: int = 1, seq: int = 1, instance: str = "i", deployment: str = "d") -> Goal:
    return Goal(
        deployment=deployment,
        instance=instance,
        term=term,
        seq=seq,
        generation=1,
        record=Record(generation=1),
    )


def journal(folder: Path) -> Journal:
    return Journal(folder / "journal.msgpack", "d", "i")


def test_it_begins_empty(tmp_path):
    fresh = journal(tmp_path)
    assert (fresh.goal, fresh.term, fresh.started) == (None, -1, None)


def test_a_goal_and_a_start_outlive_the_process(tmp_path):
    first = journal(tmp_path)
    first.accept(goal(3, 7))
    first.start("L1", "B1")
    second = journal(tmp_path)
    assert second.goal == goal(3, 7)
    assert second.term == 3
    assert second.started == Started(launch="L1", boot="B1")


@pytest.mark.parametrize(
    ("offered", "why"),
    [
        (goal(1, 99), "term 1 is over, term 2 has begun"),
        (goal(2, 4), "older than goal 5"),
        (goal(3, 1, instance="other"), "the goal is for d/other, this is d/i"),
        (goal(3, 1, deployment="other"), "the goal is for other/i, this is d/i"),
    ],
)
def test_stale_and_foreign_goals_are_refused(tmp_path, offered, why):
    kept = journal(tmp_path)
    kept.accept(goal(2, 5))
    assert why in kept.objection(offered)


@pytest.mark.parametrize("offered", [goal(2, 5), goal(2, 6), goal(3, 0)])
def test_the_same_and_newer_goals_are_not_refused(tmp_path, offered):
    kept = journal(tmp_path)
    kept.accept(goal(2, 5))
    assert kept.objection(offered) == ""


@pytest.mark.parametrize("content", [b"", b"\x00garbage", msgspec.msgpack.encode({"term": "x"})])
def test_a_corrupt_file_is_set_aside_with_a_clear_line(tmp_path, caplog, content):
    path = tmp_path / "journal.msgpack"
    path.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        fresh = journal(tmp_path)
    assert fresh.goal is None
    assert "cannot be read" in caplog.text
    assert len(caplog.records) == 1
    (aside,) = tmp_path.glob("journal.msgpack.bad-*")
    assert aside.read_bytes() == content
    fresh.accept(goal())
    assert journal(tmp_path).goal == goal()


def test_the_journal_of_another_instance_is_set_aside(tmp_path, caplog):
    Journal(tmp_path / "journal.msgpack", "d", "other").accept(goal(instance="other"))
    assert journal(tmp_path).goal is None
    assert "belongs to d/other" in caplog.text


def test_a_goal_that_cannot_be_written_is_not_accepted(tmp_path, monkeypatch):
    kept = journal(tmp_path)
    kept.accept(goal(1, 1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        kept.accept(goal(1, 2))
    assert kept.goal == goal(1, 1)
    assert journal(tmp_path).goal == goal(1, 1)


def test_it_is_written_for_this_user_only(tmp_path):
    journal(tmp_path).accept(goal())
    assert (tmp_path / "journal.msgpack").stat().st_mode & 0o777 == 0o600
