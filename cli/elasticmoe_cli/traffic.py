"""Users as a command: load on a service until told to end, totals as JSON lines."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from elasticmoe_cli.errors import CommandFailed
from elasticmoe_cli.load import Endpoint, Load, Result, log_probabilities

EVERY_S = 0.5
KEEP_ALIVE_S = 2.0

Say = Callable[[dict[str, Any]], None]


def run(
    urls: Sequence[str],
    model: str,
    say: Say,
    *,
    clients: int = 4,
    max_tokens: int = 24,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Send load until SIGTERM, SIGINT or for `seconds`; returns the last line that was said."""
    return asyncio.run(_run(urls, model, say, clients, max_tokens, seconds))


async def _run(
    urls: Sequence[str],
    model: str,
    say: Say,
    clients: int,
    max_tokens: int,
    seconds: float | None,
) -> dict[str, Any]:
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    endpoints = [Endpoint(url, url.rstrip("/")) for url in urls]
    # Half of the users keep their connections, half make a new one for each request: the ones meet
    # ranks that leave, the others what a balancer knows of them.
    kept, fresh = clients - clients // 2, clients // 2
    loads = [
        Load(lambda: endpoints, model, clients=n, max_tokens=max_tokens, keep_alive_s=keep)
        for n, keep in ((kept, KEEP_ALIVE_S), (fresh, 0.0))
        if n
    ]
    async with contextlib.AsyncExitStack() as stack:
        for load in loads:
            await stack.enter_async_context(load)
        end = None if seconds is None else asyncio.get_running_loop().time() + seconds
        while not over.is_set() and (end is None or asyncio.get_running_loop().time() < end):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), EVERY_S)
            say(totals([load.result for load in loads]))
        await asyncio.gather(*(load.stop() for load in loads))
    last = totals([load.result for load in loads], ended=True)
    say(last)
    return last


def totals(results: Sequence[Result], *, ended: bool = False) -> dict[str, Any]:
    """What users saw together, as one line."""
    errors: Counter[str] = Counter()
    for one in results:
        errors.update(one.errors)
    return {
        "requests": sum(one.requests for one in results),
        "failed": sum(one.failed for one in results),
        "chunks": sum(one.chunks for one in results),
        "longest_gap_s": round(max(one.longest_gap_s for one in results), 3),
        "errors": dict(errors),
        "ended": ended,
    }


def ask(urls: Sequence[str], model: str) -> dict[str, list[float]]:
    """What each of these says of one fixed prompt: log-probabilities. Raises CommandFailed."""

    async def each() -> dict[str, list[float]]:
        found = {}
        for url in urls:
            try:
                found[url] = await log_probabilities(Endpoint(url, url.rstrip("/")), model)
            except httpx.HTTPStatusError as error:
                raise CommandFailed(f"{url}: status {error.response.status_code}") from None
            except httpx.HTTPError as error:
                raise CommandFailed(f"{url}: {str(error) or type(error).__name__}") from None
        return found

    return asyncio.run(each())
