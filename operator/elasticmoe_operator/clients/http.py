"""HTTP over one pool of connections, each call with a time limit. aiohttp: kopf brings it."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver

FAILURES: Final = (aiohttp.ClientError, OSError, ValueError)
"""No answer: a time limit's end is an OSError, a header that can't be sent a ValueError."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server said. tag: its ETag, "" without one."""

    status: int
    content: bytes
    tag: str = ""

    @property
    def well(self) -> bool:
        """The server did what was asked."""
        return 200 <= self.status < 300


class Http:
    """Connections are made in the loop of the first call and ended by `close`.

    limit_s: for all of a call. keep_s: that long an idle connection is kept.
    connections: at most at a time, 0 for any number.
    tls: who is trusted. resolver: where hosts are, if not where DNS says.
    """

    def __init__(
        self,
        limit_s: float,
        *,
        keep_s: float,
        connections: int,
        tls: ssl.SSLContext | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._limit_s, self._keep_s, self._connections = limit_s, keep_s, connections
        self._tls, self._resolver = tls, resolver
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """End all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def call(
        self,
        method: str,
        url: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
    ) -> Answer:
        """Redirects are not followed. Raises one of FAILURES.

        wait_s: so long the server may take beyond the time limit, because it was asked to.
        """
        limit = aiohttp.ClientTimeout(total=self._limit_s + wait_s)
        self._session = session = self._session or self._made()
        async with session.request(
            *(method, url),
            data=content,
            headers=headers,
            params=params,
            timeout=limit,
            allow_redirects=False,
        ) as answer:
            tag = answer.headers.get("ETag", "")
            return Answer(status=answer.status, content=await answer.read(), tag=tag)

    def _made(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=self._connections,
            keepalive_timeout=self._keep_s,
            ssl=self._tls or True,
            resolver=self._resolver,
            use_dns_cache=False,  # a Service that was made anew is found at once
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
