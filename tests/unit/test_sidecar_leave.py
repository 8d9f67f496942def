"""When a sidecar's process may end."""

from __future__ import annotations

import asyncio

import pytest
from elasticmoe_sidecar.leave import Leave


def leave(policy: str = "follow", grace_s: float = 60.0) -> Leave:
    return Leave(policy, grace_s, lambda: None)  # type: ignore[arg-type]


async def ends(leaving: Leave) -> bool:
    """Whether it ends without anything more happening."""
    try:
        async with asyncio.timeout(0.02):
            await leaving.ended()
    except TimeoutError:
        return False
    return True


async def test_nobody_asked_it_stays():
    staying = leave()
    staying.note(True)
    assert not await ends(staying)
    assert not staying.asked


async def test_with_declared_membership_sigterm_ends_at_once():
    leaving = leave("declared")
    leaving.terminate()
    assert await ends(leaving)
    assert not leaving.asked


async def test_with_declared_membership_one_that_was_asked_waits_too():
    leaving = leave("declared")
    leaving.ask()
    leaving.terminate()
    assert not await ends(leaving)
    leaving.note(True)
    assert await ends(leaving)


@pytest.mark.parametrize("released_first", [True, False])
async def test_following_it_waits_for_its_release(released_first):
    leaving = leave()
    leaving.note(released_first)
    leaving.terminate()
    assert await ends(leaving) is released_first
    leaving.note(True)
    assert await ends(leaving)


async def test_a_release_taken_back_before_the_question_does_not_count():
    leaving = leave()
    leaving.note(True)
    leaving.note(False)
    leaving.terminate()
    assert not await ends(leaving)


async def test_a_second_sigterm_ends_at_once():
    leaving = leave()
    leaving.terminate()
    leaving.terminate()
    assert await ends(leaving)


async def test_it_ends_when_the_grace_is_over():
    leaving = leave(grace_s=0.0)
    leaving.terminate()
    assert await ends(leaving)


async def test_asking_again_does_not_lengthen_the_grace():
    leaving = leave(grace_s=0.01)
    leaving.ask()
    await asyncio.sleep(0.01)
    leaving.ask()
    assert await leaving.released() is False
