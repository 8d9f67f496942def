"""HTTP over one pool of connections, each call with a time limit. aiohttp: kopf brings it."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver

FAILURES: Final = (aiohttp.ClientError, OSError, ValueError)
"""No answer: a time limit's end is an OSError, a header that can't be sent a ValueError."""

_CONNECTIONS: Final = 100


class Http:
    """Connections are made in the loop of the first call and ended by `close`.

    limit_s: for all of a call. keep_s: that long an idle connection is kept.
    tls: who is trusted. resolver: where hosts are, if not where DNS says.
    """

    def __init__(
        self,
        limit_s: float,
        *,
        keep_s: float,
        tls: ssl.SSLContext | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._limit = aiohttp.ClientTimeout(total=limit_s)
        self._keep_s, self._tls, self._resolver = keep_s, tls, resolver
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
    ) -> tuple[int, bytes]:
        """Status and content; redirects are not followed. Raises one of FAILURES."""
        self._session = session = self._session or self._made()
        async with session.request(
            method, url, data=content, headers=headers, params=params, allow_redirects=False
        ) as answer:
            return answer.status, await answer.read()

    def _made(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=_CONNECTIONS,
            keepalive_timeout=self._keep_s,
            ssl=self._tls or True,
            resolver=self._resolver,
            use_dns_cache=False,  # a Service that was made anew is found at once
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._limit,
            trust_env=False,
        )


def well(status: int) -> bool:
    """The server did what was asked."""
    return 200 <= status < 300
