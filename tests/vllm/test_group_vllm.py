"""The whole product with real vLLM on CPU: resizes, a planned restart and a loss, under load.

One group of coordinator, sidecars, launchers and engines; the tests use it one after the other, in
this file's order, and each leaves two ranks that serve.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from elasticmoe_cli.load import difference, endpoints_of, log_probabilities
from elasticmoe_vllm_cpu.flags import SERVED_MODEL_NAME
from support import contract
from support.local import Local, Status, local_group

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LIMIT_S = 240.0
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """Two ranks, and a third instance that stands by."""
    contract.vllm_cpu()
    folder = tmp_path_factory.mktemp("vllm")
    limits = {"stall_s": 30.0, "lame_duck_s": 2.0, "replacement_s": 60.0}
    with local_group(folder, spare=1, engine="vllm-cpu", limit_s=LIMIT_S, **limits) as local:
        yield local


async def answers(status: Status) -> list[list[float]]:
    """What each ready rank says of one prompt."""
    ready = {one["instance"] for one in status["instances"] if one["ready"]}
    return [
        await log_probabilities(endpoint, SERVED_MODEL_NAME)
        for endpoint in endpoints_of(status)
        if endpoint.name in ready
    ]


@pytest.fixture(scope="module")
def reference(group: Local) -> list[float]:
    """The first rank's answer before anything was resized."""
    return asyncio.run(answers(group.status()))[0]


async def test_resizes_under_load_fail_no_request_and_change_no_answer(
    group: Local, reference: list[float]
) -> None:
    before = await group.serves(2)
    launches = group.launches()
    async with group.users():
        for size in (3, 2, 3, 2):
            operation = await group.ended(await group.target(size))
            kind = "scale_up" if size == 3 else "scale_down"
            assert (operation["kind"], operation["state"]) == (kind, "succeeded"), operation
            status = await group.serves(size)
            said = await answers(status)
            assert len(said) == size
            assert not any(difference(one, reference) > TOLERANCE for one in said)
    assert (await group.serves(2))["generation"] == before["generation"]
    assert group.launches() == launches, "who stays is not started again"


async def test_a_planned_restart_under_load_fails_no_request(
    group: Local, reference: list[float]
) -> None:
    before = await group.serves(2)
    async with group.users():
        operation = await group.ended(await asyncio.to_thread(group.api.restart, 3))
        assert (operation["kind"], operation["state"]) == ("restart", "succeeded"), operation
        after = await group.serves(3, before["generation"] + 1)
    assert not any(difference(one, reference) > TOLERANCE for one in await answers(after))
    await group.ended(await group.target(2))
    await group.serves(2)


async def test_a_killed_engine_core_costs_one_warm_restart_of_all(
    group: Local, reference: list[float]
) -> None:
    before = await group.serves(2)
    async with group.users(may_fail=True):
        os.kill(group.core("r1"), signal.SIGKILL)
        after = await group.serves(2, before["generation"] + 1)
    assert after["generation"] == before["generation"] + 1
    assert [one["kind"] for one in after["history"]][-1] == "recover"
    assert not any(difference(one, reference) > TOLERANCE for one in await answers(after))
    async with group.users():
        operation = await group.ended(await group.target(3))
        assert (operation["kind"], operation["state"]) == ("scale_up", "succeeded"), operation
