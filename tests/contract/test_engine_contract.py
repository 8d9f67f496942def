"""What every engine here has to do, checked on the simulated one and on real vLLM 0.33.

The cases share one group an engine and run in the order of this file: real vLLM takes a minute to
start. The last one destroys the group.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from support import contract
from support.contract import MAX_SIZE, MODEL, EngineUnderTest

pytestmark = pytest.mark.timeout(300)

SCALING = {"error": "The model is currently scaling. Please try again later."}
RETIRED = {"error": "This data-parallel rank has been retired and is awaiting shutdown."}
IDLE = {
    "is_scaling_elastic_ep": False,
    "phase": "idle",
    "epoch": None,
    "error": None,
    "requested_data_parallel_size": None,
}


@pytest.fixture(
    scope="session", params=["sim", pytest.param("vllm", marks=pytest.mark.vllm)], name="group"
)
def shared_group(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineUnderTest]:
    folder = tmp_path_factory.mktemp(request.param)
    try:
        engine: EngineUnderTest = getattr(contract, request.param)(folder)
    except contract.MissingEngineError as missing:
        pytest.fail(str(missing), pytrace=False)
    try:
        engine.start(2)
        yield engine
    finally:
        engine.close()


async def events(group: EngineUnderTest, rank: int, **body: Any) -> AsyncIterator[dict[str, Any]]:
    """Events of a stream; asserts that it ends with [DONE]."""
    body = {"model": MODEL, "prompt": "the quick", "temperature": 0, "stream": True, **body}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    async with (
        contract.http_client(120) as client,
        client.stream("POST", group.url(rank, path), json=body) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        last = ""
        async for line in answer.aiter_lines():
            if line:
                last = line.removeprefix("data: ")
                if last != "[DONE]":
                    yield json.loads(last)
        assert last == "[DONE]"


def error(text: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


# --- a group at rest ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_health_is_an_empty_200(group: EngineUnderTest, path: str) -> None:
    answer = await group.get(0, path)
    assert (answer.status_code, answer.content) == (200, b"")


async def test_version_is_that_of_the_contract(group: EngineUnderTest) -> None:
    assert (await group.get(0, "/version")).json() == {"version": "0.33.0"}


async def test_models(group: EngineUnderTest) -> None:
    answer = (await group.get(1, "/v1/models")).json()
    assert answer["object"] == "list"
    assert [(one["id"], one["max_model_len"]) for one in answer["data"]] == [(MODEL, 512)]


async def test_unknown_path_and_method(group: EngineUnderTest) -> None:
    unknown = await group.get(0, "/nothere")
    assert (unknown.status_code, unknown.json()) == (404, {"detail": "Not Found"})
    assert (await group.get(0, "/scale_elastic_ep")).status_code == 405


async def test_status_before_any_resize(group: EngineUnderTest) -> None:
    assert await group.status(0) == await group.status(1) == IDLE


async def test_metrics_are_named_as_documented(group: EngineUnderTest) -> None:
    assert (await group.complete(1, max_tokens=3)).status_code == 200
    lines = (await group.get(1, "/metrics")).text.splitlines()
    labels = f'{{engine="1",model_name="{MODEL}"}} '
    values = {
        line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if labels in line
    }
    assert values["vllm:num_requests_running"] == values["vllm:num_requests_waiting"] == 0
    assert 0 <= values["vllm:kv_cache_usage_perc"] <= 1
    assert values["vllm:prompt_tokens_total"] > 0
    assert values["vllm:generation_tokens_total"] == 3
    finished = (
        f'vllm:request_success_total{{engine="1",finished_reason="length",model_name="{MODEL}"}}'
    )
    assert f"{finished} 1.0" in lines
    assert not any('engine="0"' in line for line in lines)


async def test_completion(group: EngineUnderTest) -> None:
    answer = await group.complete(0, logprobs=1, return_token_ids=True)
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL
    assert body["id"].startswith("cmpl-")
    [choice] = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["stop_reason"] is None
    assert len(choice["token_ids"]) == 8
    prompt = len(choice["prompt_token_ids"])
    assert choice["logprobs"]["tokens"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert len(choice["logprobs"]["token_logprobs"]) == 8
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"])
    assert len(choice["logprobs"]["text_offset"]) == len(choice["logprobs"]["top_logprobs"]) == 8
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "total_tokens")}
    assert usage == {"prompt_tokens": prompt, "total_tokens": prompt + 8}
    plain = (await group.complete(0)).json()["choices"][0]
    assert plain["text"] == choice["text"]
    assert plain["logprobs"] is plain["token_ids"] is None


async def test_all_ranks_say_the_same(group: EngineUnderTest) -> None:
    await assert_ranks_agree(group, range(2))


async def assert_ranks_agree(group: EngineUnderTest, ranks: range) -> None:
    for prompt in ("the quick", "scale up and down"):
        answers = [
            (await group.complete(rank, prompt, logprobs=1, return_token_ids=True)).json()
            for rank in ranks
        ]
        first, *others = [answer["choices"][0] for answer in answers]
        for other in others:
            assert other["token_ids"] == first["token_ids"]
            pairs = zip(
                other["logprobs"]["token_logprobs"],
                first["logprobs"]["token_logprobs"],
                strict=True,
            )
            assert all(abs(a - b) < 1e-3 for a, b in pairs)


async def test_stream_of_a_completion(group: EngineUnderTest) -> None:
    whole = (await group.complete(0, return_token_ids=True)).json()["choices"][0]
    options = {"include_usage": True}
    body = {"max_tokens": 8, "return_token_ids": True, "stream_options": options}
    *chunks, usage = [event async for event in events(group, 0, **body)]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [t for choice in choices for t in choice["token_ids"]] == whole["token_ids"]
    assert choices[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [choice["finish_reason"] for choice in choices][-2:] == [None, "length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


async def test_chat(group: EngineUnderTest) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    body |= {"max_tokens": 5, "temperature": 0}
    answer = (await group.post(0, "/v1/chat/completions", body)).json()
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    stream = [event async for event in events(group, 0, **body)]
    first, *rest = [event["choices"][0] for event in stream]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in rest) == message["content"]
    assert rest[-1]["finish_reason"] == "length"
    assert {event["object"] for event in stream} == {"chat.completion.chunk"}


async def test_a_client_that_hangs_up_ends_its_request(group: EngineUnderTest) -> None:
    body = {"model": MODEL, "prompt": "the quick", "max_tokens": 400, "ignore_eos": True}
    async with contract.http_client() as client:
        path = group.url(0, "/v1/completions")
        asking = asyncio.create_task(client.post(path, json=body, timeout=60))
        await running_requests(group, 0, 1)
        asking.cancel()
    await running_requests(group, 0, 0)


async def running_requests(group: EngineUnderTest, rank: int, count: int) -> None:
    """Wait until a rank's engine says that it runs `count` requests."""
    series = f'vllm:num_requests_running{{engine="{rank}",model_name="{MODEL}"}} {count}.0'
    async with asyncio.timeout(10):
        while series not in (await group.get(rank, "/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (
            {"model": "nope"},
            404,
            error(
                f"The model `nope` does not exist. Valid aliases: {MODEL}.",
                "NotFoundError",
                404,
                "model",
            ),
        ),
        (
            {"max_tokens": -3},
            400,
            error(
                "max_tokens must be at least 1, got -3. (parameter=max_tokens, value=-3)",
                "BadRequestError",
                400,
                "max_tokens",
            ),
        ),
        (
            {"max_tokens": 999},
            400,
            error(
                "max_tokens=999 cannot be greater than max_model_len=512. Please request fewer "
                "output tokens. (parameter=max_tokens, value=999)",
                "BadRequestError",
                400,
                "max_tokens",
            ),
        ),
    ],
)
async def test_bad_completion(
    group: EngineUnderTest, body: dict[str, Any], status: int, expected: dict[str, Any]
) -> None:
    answer = await group.complete(0, **body)
    assert (answer.status_code, answer.json()) == (status, expected)


# --- resizes that are refused -------------------------------------------------------------------

_POSITIVE = "new_data_parallel_size must be a positive integer"
_RETAIN = "the target topology cannot retain all model experts."
_FROM_2 = "Cannot scale external Elastic EP from DP size 2 to"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "new_data_parallel_size is required"),
        ({"new_data_parallel_size": 0}, _POSITIVE),
        ({"new_data_parallel_size": -1}, _POSITIVE),
        ({"new_data_parallel_size": "3"}, _POSITIVE),
        ({"new_data_parallel_size": 2.0}, _POSITIVE),
        (
            {"new_data_parallel_size": 3, "drain_timeout": 0},
            "drain_timeout must be a positive integer",
        ),
        (
            {"new_data_parallel_size": MAX_SIZE + 1},
            f"Cannot scale to data_parallel_size {MAX_SIZE + 1}; "
            f"--elastic-ep-max-dp-size is {MAX_SIZE}.",
        ),
        ({"new_data_parallel_size": 1}, f"{_FROM_2} 1: {_RETAIN}"),
        ({"new_data_parallel_size": True}, f"{_FROM_2} True: {_RETAIN}"),
    ],
)
async def test_bad_size(group: EngineUnderTest, body: dict[str, Any], text: str) -> None:
    for rank in range(2):
        answer = await group.post(rank, "/scale_elastic_ep", body)
        assert (answer.status_code, answer.json()) == (400, error(text, "Bad Request", 400))


@pytest.mark.parametrize(
    ("content", "kind", "status", "expected"),
    [
        ("{bad", "application/json", 400, error("Invalid JSON format", "Bad Request", 400)),
        (
            "{}",
            "text/plain",
            400,
            error(
                "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
                "Bad Request",
                400,
            ),
        ),
        (
            "[]",
            "application/json",
            500,
            error("'list' object has no attribute 'get'", "InternalServerError", 500),
        ),
    ],
)
async def test_bad_body(
    group: EngineUnderTest, content: str, kind: str, status: int, expected: dict[str, Any]
) -> None:
    answer = await group.post(
        0, "/scale_elastic_ep", content=content, headers={"content-type": kind}
    )
    assert (answer.status_code, answer.json()) == (status, expected)


async def test_same_size_is_answered_at_once(group: EngineUnderTest) -> None:
    answer = await group.scale(0, 2)
    assert answer.status_code == 200
    assert answer.json() == {"message": "Scaled to 2 data parallel engines"}
    assert await group.status(0) == IDLE


# --- 2 -> 3 -> 2 --------------------------------------------------------------------------------


@dataclass
class Watch:
    """What users and an orchestrator see while a resize runs."""

    group: EngineUnderTest
    staying: range
    phases: list[str] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    streams: int = 0
    done: bool = False

    async def run(self, posts: list[asyncio.Task[httpx.Response]]) -> list[httpx.Response]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_phase())
            for rank in self.staying:
                tasks.create_task(self._watch_refusals(rank))
                tasks.create_task(self._stream(rank))
            answers = await asyncio.gather(*posts)
            self.phases.append((await self.group.status(0))["phase"])
            self.done = True
        return answers

    async def _watch_phase(self) -> None:
        while not self.done:
            status = await self.group.status(0)
            assert status["error"] is None
            assert status["is_scaling_elastic_ep"] == (
                status["phase"] in ("preparing", "committing")
            )
            if not self.phases or self.phases[-1] != status["phase"]:
                self.phases.append(status["phase"])
            await asyncio.sleep(0.02)

    async def _watch_refusals(self, rank: int) -> None:
        while not self.done:
            answer = await self.group.get(rank, "/v1/models")
            if answer.status_code != 200:
                assert answer.status_code == 503
                self.refusals.append(answer.json())
                assert (await self.group.get(rank, "/health")).status_code == 200
            await asyncio.sleep(0.02)

    async def _stream(self, rank: int) -> None:
        """A stream that began is never cut on a rank that stays, also not by the commit."""
        while not self.done:
            tokens = []
            with contextlib.suppress(RefusedError):
                async for event in accepted(self.group, rank, max_tokens=200):
                    tokens += event["choices"][0]["token_ids"]
                assert len(tokens) == 200
                self.streams += 1


class RefusedError(Exception):
    """The stream was not accepted."""


async def accepted(group: EngineUnderTest, rank: int, **body: Any) -> AsyncIterator[dict[str, Any]]:
    stream = events(group, rank, ignore_eos=True, return_token_ids=True, **body)
    try:
        first = await anext(stream)
    except AssertionError as refusal:
        if "currently scaling" not in str(refusal):
            raise
        raise RefusedError from None
    yield first
    async for event in stream:
        yield event


async def test_grows_from_2_to_3(group: EngineUnderTest) -> None:
    start = time.monotonic()
    group.launch(2, 3, joiner=True)
    posts = [asyncio.create_task(group.scale(rank, 3)) for rank in range(2)]
    watch = Watch(group, range(2))
    repeated = asyncio.create_task(repeat_when_preparing(group, 3))
    answers = await watch.run([*posts, repeated])
    print(f"{group.name}: 2 -> 3 in {time.monotonic() - start:.1f} s, {watch.streams} streams")
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"message": "Scaled to 3 data parallel engines"}
    assert [phase for phase in watch.phases if phase != "idle"][:1] == ["preparing"]
    assert watch.phases[-1] == "completed"
    assert "committing" in watch.phases
    assert watch.streams
    assert all(refusal == SCALING for refusal in watch.refusals)
    group.size = 3
    await group.wait_healthy([2])


async def repeat_when_preparing(group: EngineUnderTest, target: int) -> httpx.Response:
    """The same POST again while the first runs: waits for it and then has nothing to do."""
    async with asyncio.timeout(group.limit_s):
        while (await group.status(0))["phase"] != "preparing":  # noqa: ASYNC110  another process
            await asyncio.sleep(0.02)
    return await group.scale(0, target)


async def test_three_ranks_serve_and_agree(group: EngineUnderTest) -> None:
    epochs = set()
    for rank in range(3):
        status = await group.status(rank)
        assert status["phase"] == "completed"
        assert status["requested_data_parallel_size"] == 3
        epochs.add(status["epoch"])
    assert len(epochs) == 1
    await assert_ranks_agree(group, range(3))


async def test_metrics_name_all_engines_after_a_scale_up(group: EngineUnderTest) -> None:
    text = (await group.get(0, "/metrics")).text
    for engine in range(3):
        assert f'vllm:num_requests_running{{engine="{engine}",model_name="{MODEL}"}}' in text


async def test_repeated_size_after_the_resize(group: EngineUnderTest) -> None:
    for rank in range(3):
        assert (await group.scale(rank, 3)).status_code == 200
    assert (await group.status(0))["phase"] == "completed"


async def test_shrinks_from_3_to_2(group: EngineUnderTest) -> None:
    start = time.monotonic()
    cut: list[dict[str, Any]] = []
    running = asyncio.Event()

    async def stream_on_leaving_rank() -> None:
        async for event in events(group, 2, max_tokens=480, ignore_eos=True):
            cut.append(event["choices"][0])
            running.set()

    leaving = asyncio.create_task(stream_on_leaving_rank())
    await asyncio.wait_for(running.wait(), 60)
    posts = [asyncio.create_task(group.scale(rank, 2)) for rank in range(2)]
    posts.append(asyncio.create_task(tell_leaving_rank_late(group)))
    watch = Watch(group, range(2))
    answers = await watch.run(posts)
    print(f"{group.name}: 3 -> 2 in {time.monotonic() - start:.1f} s, {watch.streams} streams")
    assert [answer.status_code for answer in answers] == [200] * 3
    assert watch.phases[-1] == "completed"
    assert watch.refusals, "nobody was refused during the commit"
    assert all(refusal == SCALING for refusal in watch.refusals)
    await leaving
    assert cut[-1]["finish_reason"] == "abort"
    group.size = 2


async def tell_leaving_rank_late(group: EngineUnderTest) -> httpx.Response:
    """The staying ranks get ready without it, then refuse requests until it is told as well."""
    async with asyncio.timeout(group.limit_s):
        while (await group.get(0, "/v1/models")).status_code != 503:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (await group.status(0))["phase"] == "preparing"
    assert (await group.get(2, "/v1/models")).status_code == 200
    return await group.scale(2, 2)


async def test_retired_rank_answers_503_but_for_two_paths(group: EngineUnderTest) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/ping", "/nothere"):
        answer = await group.get(2, path)
        assert (answer.status_code, answer.json()) == (503, RETIRED), path
    for answer in (await group.complete(2), await group.scale(2, 3)):
        assert (answer.status_code, answer.json()) == (503, RETIRED)
    assert (await group.get(2, "/health")).status_code == 200
    status = await group.status(2)
    assert (status["phase"], status["requested_data_parallel_size"]) == ("completed", 2)


async def test_retired_rank_stops_at_once(group: EngineUnderTest) -> None:
    assert await group.stop(2) < 10


async def test_staying_ranks_serve_and_agree(group: EngineUnderTest) -> None:
    await assert_ranks_agree(group, range(2))
    assert (await group.status(0))["phase"] == "completed"


# --- the end of the group -----------------------------------------------------------------------


async def test_a_killed_peer_makes_requests_hang_silently(group: EngineUnderTest) -> None:
    group.kill(1)
    with pytest.raises(httpx.ReadTimeout):
        await group.post(
            0, "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 2}, timeout=8
        )
    assert (await group.get(0, "/health")).status_code == 200
    assert (await group.status(0))["phase"] == "completed"
    # The engine tells of a request with its first step, and there was none.
    metrics = (await group.get(0, "/metrics")).text
    assert f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 0.0' in metrics
