"""Each operation id runs once."""

from __future__ import annotations

from typing import Any

import pytest
from elasticmoe_engine.gate.asgi import message_of
from elasticmoe_engine.gate.operations import Operations


def test_a_repeat_is_answered_by_the_first() -> None:
    operations = Operations()
    first, mine = operations.claim("a", 3)
    assert mine
    assert operations.claim("a", 3) == (first, False)


def test_another_one_waits_for_the_running_one() -> None:
    operations = Operations()
    first, _ = operations.claim("a", 3)
    assert operations.claim("b", 2) == (first, False)


async def test_the_outcome_is_kept_and_the_next_one_may_run() -> None:
    operations = Operations()
    first, _ = operations.claim("a", 3)
    asked: list[Any] = []

    async def post(path: str, body: Any) -> tuple[int, bytes]:
        asked.append((path, body))
        return 200, b"{}"

    await operations.run(first, 30, post)
    assert asked == [
        ("/scale_elastic_ep", {"new_data_parallel_size": 3, "drain_timeout": 30}),
    ]
    done, mine = operations.claim("a", 3)
    assert (done.state, done.status, mine) == ("succeeded", 200, False)
    assert operations.claim("b", 2)[1]
    assert operations.get("a") == done


async def test_a_refusal_keeps_status_and_text() -> None:
    operations = Operations()
    first, _ = operations.claim("a", 9)

    async def post(path: str, body: Any) -> tuple[int, bytes]:
        return 400, b'{"error": {"message": "over the\\nmaximum", "code": 400}}'

    await operations.run(first, 30, post)
    assert operations.latest is not None
    assert operations.latest.as_json() == {
        "operation": "a",
        "target": 9,
        "state": "failed",
        "status": 400,
        "error": "over the maximum",
    }


async def test_an_engine_that_raises_is_a_failure() -> None:
    operations = Operations()
    first, _ = operations.claim("a", 3)

    async def post(path: str, body: Any) -> tuple[int, bytes]:
        raise RuntimeError("no store")

    await operations.run(first, 30, post)
    assert operations.latest is not None
    assert (operations.latest.state, operations.latest.status) == ("failed", 500)
    assert operations.latest.error == "RuntimeError: no store"


def test_what_never_began_may_be_asked_again() -> None:
    operations = Operations()
    first, _ = operations.claim("a", 3)
    operations.release(first)
    assert operations.latest is None
    assert operations.claim("a", 3)[1]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"detail": "Scale failed"}', "Scale failed"),
        (b'{"error": "no"}', "no"),
        (b"plain  text", "plain text"),
        (b"\xff", "\ufffd"),
        (b"", ""),
        (b"[1]", "[1]"),
        (b"x" * 600, "x" * 500),
    ],
)
def test_errors_become_one_line(body: bytes, text: str) -> None:
    assert message_of(body) == text
