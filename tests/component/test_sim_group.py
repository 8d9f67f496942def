"""The simulated engine where it has to fail as vLLM 0.33 does; what works is in the contract suite.

Limits that are 300 s in vLLM are a second here. What vLLM does was measured by hand: see
`engines/README.md`.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import contract, sim_middleware
from support.contract import MODEL, EngineUnderTest, free_port

QUICK = {
    "SIM_BOOT_S": "0",
    "SIM_PREPARE_S": "0.05",
    "SIM_COMMIT_S": "0.05",
    "SIM_LIMIT_S": "20",
    "SIM_WATCHDOG_S": "0.2",
    "SIM_JOINER_TERM_S": "0",
}
SHORT = {"SIM_LIMIT_S": "1"}
FAILED = {"message": "Scale failed", "type": "Internal Server Error", "param": None, "code": 500}
DRAIN = "Scale failed due to request drain timeout after 7 seconds"

Start = Callable[..., EngineUnderTest]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Makes a group of two; settings are SIM_* variables."""
    groups = []

    def make(size: int = 2, **environ: str) -> EngineUnderTest:
        faults = {"SIM_FAULTS_FILE": str(tmp_path / "faults")}
        group = contract.sim(tmp_path, **{**QUICK, **faults, **environ})
        groups.append(group)
        for rank in range(size):
            group.launch(rank, size)
        return group

    yield make
    for group in groups:
        group.close()


async def pair(start: Start, **environ: str) -> EngineUnderTest:
    group = start(**environ)
    await group.wait_healthy(range(2))
    return group


def inject(tmp_path: Path, words: str) -> None:
    new = tmp_path / "faults.new"
    new.write_text(words)
    new.rename(tmp_path / "faults")


async def resize(group: EngineUnderTest, ranks: range, target: int) -> list[httpx.Response]:
    posts = [group.scale(rank, target, drain_timeout=7) for rank in ranks]
    return list(await asyncio.gather(*posts))


async def assert_inelastic_but_serving(group: EngineUnderTest) -> None:
    """After a failed prepare all go on serving, and every later resize is refused at once."""
    for rank in range(2):
        assert (await group.status(rank))["phase"] == "failed"
        assert (await group.complete(rank)).status_code == 200
    again = await resize(group, range(2), 3)
    assert [answer.json()["error"] for answer in again] == [FAILED, FAILED]
    status = await group.status(0)
    assert status["error"] == "Elastic EP reconfiguration is already active"
    assert "Elastic EP reconfiguration is already active" in group.log(0).read_text()


async def test_prepare_without_a_joiner_fails_at_the_limit(start: Start) -> None:
    group = await pair(start, **SHORT)
    zero, one = await resize(group, range(2), 3)
    assert (zero.status_code, zero.json()["error"]["message"]) == (408, DRAIN)
    assert (one.status_code, one.json()["error"]) == (500, FAILED)
    assert "Timed out waiting" in (await group.status(1))["error"]
    await assert_inelastic_but_serving(group)


async def test_prepare_without_an_old_rank_fails_at_the_limit(start: Start) -> None:
    group = await pair(start, **SHORT)
    group.launch(2, 3, joiner=True)
    answer = await group.scale(0, 3, drain_timeout=7)
    assert (answer.status_code, answer.json()["error"]["message"]) == (408, DRAIN)
    await assert_inelastic_but_serving(group)


async def test_an_operation_that_rank_0_was_not_told_of_can_be_repeated(start: Start) -> None:
    group = await pair(start, SIM_LIMIT_S="5")
    group.launch(2, 3, joiner=True)
    answer = await group.scale(1, 3, drain_timeout=7)
    assert (answer.status_code, answer.json()["error"]["message"]) == (408, DRAIN)
    answers = await resize(group, range(2), 3)
    assert [answer.status_code for answer in answers] == [200, 200]


async def test_a_joiner_may_come_before_the_operation(start: Start) -> None:
    group = await pair(start)
    group.launch(2, 3, joiner=True)
    await until(lambda: logged(group, 2, "waits for its handshake"))
    assert not await group.healthy(2)
    assert [answer.status_code for answer in await resize(group, range(2), 3)] == [200, 200]
    await group.wait_healthy([2])
    assert (await group.complete(2)).status_code == 200


async def test_an_unexpected_joiner_fails_the_operation(start: Start) -> None:
    group = await pair(start)
    group.launch(3, 4, joiner=True)
    answers = await resize(group, range(2), 3)
    assert [answer.json()["error"] for answer in answers] == [FAILED, FAILED]
    assert "unexpected dp rank 3" in (await group.status(0))["error"]
    await assert_inelastic_but_serving(group)


async def test_a_joiner_launched_again_inside_the_operation_stays_stuck(
    start: Start, tmp_path: Path
) -> None:
    group = await pair(start, SIM_LIMIT_S="4")
    joining = asyncio.create_task(resize(group, range(2), 3))
    await until(lambda: phase_is(group, "preparing"))
    group.launch(2, 3, joiner=True, SIM_BOOT_S="20")
    await until(lambda: logged(group, 2, "shakes hands"))
    group.kill(2)
    group.launch(2, 3, joiner=True)
    answers = await joining
    assert [answer.status_code for answer in answers] == [408, 500]
    await assert_inelastic_but_serving(group)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110  other processes make it true
            await asyncio.sleep(0.01)


async def phase_is(group: EngineUnderTest, phase: str) -> bool:
    return bool((await group.status(0))["phase"] == phase)


async def logged(group: EngineUnderTest, rank: int, words: str) -> bool:
    return words in group.log(rank).read_text()


async def test_a_joiner_that_hangs_half_way_kills_the_old_engines(start: Start) -> None:
    group = await pair(start, SIM_LIMIT_S="3")
    group.launch(2, 3, joiner=True, SIM_FAULTS="hang_joiner")
    await asyncio.gather(*(group.scale(rank, 3) for rank in range(2)), return_exceptions=True)
    for rank in range(2):
        assert await group.ended(rank) == 0


async def test_failed_prepare_on_one_rank(start: Start, tmp_path: Path) -> None:
    group = await pair(start)
    inject(tmp_path, "1:fail_prepare")
    answers = await resize(group, range(2), 3)
    assert [answer.json()["error"] for answer in answers] == [FAILED, FAILED]
    inject(tmp_path, "")
    await assert_inelastic_but_serving(group)


async def test_failed_commit_leaves_the_gate_set(start: Start, tmp_path: Path) -> None:
    group = await pair(start)
    inject(tmp_path, "1:fail_commit")
    group.launch(2, 3, joiner=True)
    answers = await resize(group, range(2), 3)
    assert [answer.json()["error"] for answer in answers] == [FAILED, FAILED]
    for rank in range(2):
        refusal = await group.get(rank, "/v1/models")
        assert refusal.status_code == 503
        assert refusal.json()["error"].startswith("The model is currently scaling")
        assert (await group.status(rank))["phase"] == "failed"


async def test_a_scale_down_that_the_leaving_rank_was_not_told_of_stops_service(
    start: Start,
) -> None:
    """The staying ranks are ready without it and wait for it in the commit, refusing requests."""
    group = start(size=3, SIM_COMMIT_LIMIT_S="2")
    await group.wait_healthy(range(3))
    posts = asyncio.create_task(resize(group, range(2), 2))
    await until(lambda: refused(group, 0))
    assert (await group.status(0))["phase"] == "preparing"
    assert (await group.get(2, "/v1/models")).status_code == 200
    assert {answer.status_code for answer in await posts} <= {408, 500}
    assert await refused(group, 0)


async def refused(group: EngineUnderTest, rank: int) -> bool:
    return (await group.get(rank, "/v1/models")).status_code == 503


async def test_a_refused_resize_as_after_a_failed_prepare(start: Start) -> None:
    group = await pair(start, SIM_FAULTS="refuse")
    answers = await resize(group, range(2), 3)
    assert [answer.json()["error"] for answer in answers] == [FAILED, FAILED]


# --- losses -------------------------------------------------------------------------------------


async def test_a_hanging_rank_stalls_its_peers(start: Start, tmp_path: Path) -> None:
    group = await pair(start)
    chunks: list[str] = []
    streaming = asyncio.create_task(collect(stream(group, 0), chunks))
    await until(lambda: generating(group, 0))
    inject(tmp_path, "1:hang")
    with pytest.raises(httpx.ReadTimeout):
        await streaming
    assert chunks
    assert chunks[-1] != "data: [DONE]"
    for rank in range(2):
        assert await group.healthy(rank)


async def collect(lines: AsyncIterator[str], chunks: list[str]) -> None:
    async for line in lines:
        chunks.append(line)


async def stream(group: EngineUnderTest, rank: int) -> AsyncIterator[str]:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "stream": True}
    async with (
        contract.http_client(1) as client,
        client.stream("POST", group.url(rank, "/v1/completions"), json=body) as answer,
    ):
        async for line in answer.aiter_lines():
            yield line


async def test_a_blocked_event_loop_answers_nothing_until_it_goes_on(
    start: Start, tmp_path: Path
) -> None:
    group = await pair(start)
    inject(tmp_path, "0:hang_api")
    await until(lambda: silent(group, 0))
    assert await group.healthy(1)
    inject(tmp_path, "")
    await group.wait_healthy([0])


async def silent(group: EngineUnderTest, rank: int) -> bool:
    try:
        await group.get(rank, "/health", timeout=0.5)
    except httpx.ReadTimeout:
        return True
    return False


async def test_a_dead_core_ends_its_api_server(start: Start, tmp_path: Path) -> None:
    group = await pair(start)
    running = asyncio.create_task(group.complete(1, max_tokens=400))
    await until(lambda: generating(group, 1))
    inject(tmp_path, "1:crash_core")
    answer = await running
    assert answer.status_code == 500
    assert answer.json()["error"]["message"].startswith("The server had an error")
    assert await group.ended(1) == 0


async def generating(group: EngineUnderTest, rank: int) -> bool:
    text = (await group.get(rank, "/metrics")).text
    return f'vllm:num_requests_running{{engine="{rank}",model_name="{MODEL}"}} 1.0' in text


async def test_an_idle_api_server_notices_its_dead_core_later(start: Start, tmp_path: Path) -> None:
    group = await pair(start, SIM_WATCHDOG_S="1")
    inject(tmp_path, "0:crash_core")
    await until(lambda: unhealthy(group, 0))
    assert await group.ended(0) == 0


async def unhealthy(group: EngineUnderTest, rank: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await group.get(rank, "/health")).status_code == 503
    return False


async def test_a_killed_api_server_takes_its_core_along(start: Start, tmp_path: Path) -> None:
    group = await pair(start)
    core = group.core(1)
    inject(tmp_path, "1:crash_api")
    assert await group.ended(1) == -signal.SIGKILL
    await until(lambda: gone(core))


async def gone(pid: int) -> bool:
    return contract.is_gone(pid)


async def test_without_rank_0_the_status_is_unavailable(start: Start) -> None:
    group = await pair(start)
    group.kill(0)
    answer = await group.post(1, "/is_scaling_elastic_ep")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"].endswith("status is temporarily unavailable")


# --- start and stop -----------------------------------------------------------------------------


async def test_sigterm_ends_a_rank_and_its_requests(start: Start) -> None:
    group = await pair(start)
    running = asyncio.create_task(group.complete(1, max_tokens=500))
    await until(lambda: generating(group, 1))
    assert await group.stop(1) < 2
    assert (await running).status_code == 500


async def test_a_waiting_joiner_takes_no_sigterm(start: Start) -> None:
    group = await pair(start)
    group.launch(2, 3, joiner=True, SIM_JOINER_TERM_S="60", SIM_LIMIT_S="60")
    await until(lambda: logged(group, 2, "waits for its handshake"))
    os.kill(group.pid(2), signal.SIGTERM)
    await until(lambda: logged(group, 2, "takes no SIGTERM"))
    assert group.running(2)


async def test_a_joiner_without_an_operation_gives_up(start: Start) -> None:
    group = await pair(start)
    group.launch(2, 3, joiner=True, SIM_LIMIT_S="0.3")
    assert await group.ended(2) == 1
    assert "Timed out waiting to join" in group.log(2).read_text()


async def test_a_taken_port_is_one_line(start: Start) -> None:
    group = await pair(start)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        group.launch(2, 3, joiner=True, port=taken.getsockname()[1])
        assert await group.ended(2) == 1
    assert "in use" in group.log(2).read_text().splitlines()[-1]
    assert await group.healthy(0)


# --- as the launcher runs it --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_runs_on_a_given_socket_with_a_middleware_outermost(method: str) -> None:
    context = multiprocessing.get_context("spawn")
    sockets, processes, rpc_port = [], [], free_port()
    try:
        for rank in range(2):
            sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
            spec = {
                "launch": f"l{rank}",
                "rank": rank,
                "size": 2,
                "joiner": False,
                "master_address": "127.0.0.1",
                "rpc_port": rpc_port,
                "redundant_experts": 8,
                "max_size": 4,
            }
            process = context.Process(target=sim_middleware.serve, args=(sock, spec, method))
            process.start()
            sockets.append(sock)
            processes.append(process)
        async with contract.http_client(20) as client:
            # The connection waits in the backlog until the engine is there.
            answer = await client.get(f"http://127.0.0.1:{sockets[1].getsockname()[1]}/peek")
        assert answer.json() == {"rank": 1, "size": 2, "should_exit": False, "pause_mode": "keep"}
        assert answer.headers["x-state"] == "elasticmoe_sim.flags"
    finally:
        for process in processes:
            process.kill()
            process.join()
        for sock in sockets:
            sock.close()
