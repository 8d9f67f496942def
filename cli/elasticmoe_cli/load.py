"""Users for a demo or a benchmark: closed-loop streaming clients on this host.

Requests go straight to the ranks, and new ones only to those whose launcher says ready, as a
Kubernetes Service does it, or to such a Service. Nothing is sent twice: what fails counts as
failed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

REFRESH_S = 0.1
REQUEST_LIMIT_S = 600.0
BACK_OFF_S = 0.2
"""Until a user whose request failed sends the next one."""


@dataclass(frozen=True)
class Endpoint:
    """A rank. probe: base URL of its launcher's probe port, "" for what balances itself (a
    Kubernetes Service). ready: path that answers 200 or not."""

    name: str
    url: str
    probe: str = ""
    ready: str = "/readyz"


@dataclass
class Result:
    """What the users saw. longest_gap_s: from a request or a chunk to the next chunk."""

    requests: int = 0
    failed: int = 0
    chunks: int = 0
    longest_gap_s: float = 0.0
    longest_gap_at: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    by_rank: Counter[str] = field(default_factory=Counter)

    def gap(self, since: float, now: float) -> None:
        """A wait that ended now."""
        if now - since > self.longest_gap_s:
            self.longest_gap_s, self.longest_gap_at = now - since, now


class Balancer:
    """Whom new requests may go to. endpoints: who there is, asked again and again."""

    def __init__(self, endpoints: Callable[[], Sequence[Endpoint]]) -> None:
        self._endpoints = endpoints
        self._turn = itertools.count()
        self.ready: list[Endpoint] = []
        self._some = asyncio.Event()

    async def run(self) -> None:
        """Ask the readiness probes until cancelled."""
        async with httpx.AsyncClient(timeout=2.0) as client:
            while True:
                known = list(await asyncio.to_thread(self._endpoints))
                answers = await asyncio.gather(*(self._is_ready(client, one) for one in known))
                self.ready = [one for one, yes in zip(known, answers, strict=True) if yes]
                (self._some.set if self.ready else self._some.clear)()
                await asyncio.sleep(REFRESH_S)

    async def next(self) -> Endpoint:
        """The next one in turn; waits until there is one."""
        while not self.ready:
            self._some.clear()
            await self._some.wait()
        return self.ready[next(self._turn) % len(self.ready)]

    @staticmethod
    async def _is_ready(client: httpx.AsyncClient, endpoint: Endpoint) -> bool:
        if not endpoint.probe:
            return True
        try:
            return (await client.get(endpoint.probe + endpoint.ready)).is_success
        except httpx.HTTPError:
            return False


class Load:
    """`clients` users, each with one streaming request after the other. A context manager.

    keep_alive_s: how long an idle connection is kept. Less than the server's (5 s in vLLM), or a
    request may meet a connection that is being closed.
    """

    def __init__(
        self,
        endpoints: Callable[[], Sequence[Endpoint]],
        model: str,
        *,
        clients: int = 4,
        max_tokens: int = 24,
        pause_s: float = 0.0,
        keep_alive_s: float = 2.0,
    ) -> None:
        self.result = Result()
        self._model, self._clients, self._max_tokens = model, clients, max_tokens
        self._pause_s, self._keep_alive_s = pause_s, keep_alive_s
        self.balancer = Balancer(endpoints)
        self._stopping = asyncio.Event()
        self._answered = asyncio.Event()
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self.on_chunk: Callable[[], None] = lambda: None

    async def __aenter__(self) -> Load:
        limits = httpx.Limits(
            max_connections=None,
            max_keepalive_connections=100,
            keepalive_expiry=self._keep_alive_s,
        )
        self._http = httpx.AsyncClient(timeout=REQUEST_LIMIT_S, limits=limits)
        self._balancing = asyncio.create_task(self.balancer.run())
        self._tasks = [asyncio.create_task(self._user(n)) for n in range(self._clients)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Requests that run are ended by the engine, by us only when something went wrong."""
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await self.stop()
        await self._http.aclose()

    async def stop(self) -> Result:
        """No new requests; wait for those that run."""
        self._stopping.set()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        self._balancing.cancel()
        await asyncio.wait({self._balancing})
        return self.result

    async def progress(self, requests: int) -> None:
        """Wait until so many more requests have been answered."""
        goal = self.result.requests + requests
        while self.result.requests < goal:
            self._answered.clear()
            await self._answered.wait()

    async def _user(self, number: int) -> None:
        await asyncio.sleep(0.05 * number)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                turn = asyncio.create_task(self.balancer.next())
                await asyncio.wait({turn, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not turn.done():
                    turn.cancel()
                    return
                await self._request(turn.result())
                await asyncio.sleep(self._pause_s)
        finally:
            stopping.cancel()

    async def _request(self, endpoint: Endpoint) -> None:
        body = {
            "model": self._model,
            "prompt": f"request {next(self._numbers)} of many",
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        error = ""
        try:
            error = await self._stream(endpoint, body)
        except (httpx.HTTPError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        self.result.requests += 1
        self._answered.set()
        self.result.by_rank[endpoint.name] += 1
        if error:
            self.result.failed += 1
            self.result.errors[f"{endpoint.name}: {error}"[:200]] += 1
            await asyncio.sleep(BACK_OFF_S)

    async def _stream(self, endpoint: Endpoint, body: dict[str, Any]) -> str:
        """Why this request failed, "" when it did not."""
        last = time.monotonic()
        reason, done = None, False
        url = f"{endpoint.url}/v1/completions"
        async with self._http.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                return f"status {answer.status_code} {text[:100]}"
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                now = time.monotonic()
                self.result.gap(last, now)
                last = now
                self.result.chunks += 1
                self.on_chunk()
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    done = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    return f"error event {str(event['error'])[:100]}"
                reason = event["choices"][0].get("finish_reason") or reason
        if not done:
            return "the stream ended early"
        return "" if reason == "length" else f"finish reason {reason}"


async def log_probabilities(
    endpoint: Endpoint, model: str, *, tokens: int = 8, of_prompt: bool = False
) -> list[float]:
    """What a rank says of one fixed prompt. Raises httpx.HTTPError.

    of_prompt: of the prompt's own tokens; what is generated may differ between ranks in bfloat16.
    """
    body = {
        "model": model,
        "prompt": "The experts of a mixture",
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
    }
    if of_prompt:
        body |= {"echo": True, "max_tokens": 1}
    async with httpx.AsyncClient(timeout=REQUEST_LIMIT_S) as client:
        answer = await client.post(f"{endpoint.url}/v1/completions", json=body)
        answer.raise_for_status()
        values = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        end = -1 if of_prompt else None  # the first has nothing before it, the last is generated
        return [value for value in values[:end] if value is not None]


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two lists of log-probabilities; infinite when they can't agree."""
    if len(one) != len(other):
        return math.inf
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return math.inf if any(math.isnan(gap) for gap in gaps) else max(gaps, default=0.0)


def endpoints_of(status: dict[str, Any]) -> list[Endpoint]:
    """The instances of a coordinator's status as endpoints."""
    return [
        Endpoint(
            one["instance"],
            f"http://{one['address']}:{one['servingPort']}",
            f"http://{one['address']}:{one['probePort']}",
        )
        for one in status["instances"]
    ]
