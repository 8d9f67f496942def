"""The coordinator's HTTP API (docs/http-api.md), as far as the operator needs it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from aiohttp.abc import AbstractResolver

from elasticmoe_operator import names
from elasticmoe_operator.clients import http
from elasticmoe_operator.core import observed
from elasticmoe_operator.core.observed import Group

LIMIT_S = 3.0
"""It answers from memory: what takes longer is away, and another group waits for its turn."""

_KEEP_S = 4.0
"""It closes a connection that is idle for 5 s: not while we send over it."""


class CoordinatorError(Exception):
    """It does not answer, or refuses; one line."""


class Coordinators:
    """All coordinators, over one connection pool, which `close` ends.

    resolver: where their Services are, if not where DNS says.
    """

    def __init__(self, resolver: AbstractResolver | None = None) -> None:
        self._http = http.Http(LIMIT_S, keep_s=_KEEP_S, connections=0, resolver=resolver)

    async def close(self) -> None:
        """End all connections."""
        await self._http.close()

    async def status(self, namespace: str, deployment: str) -> Group:
        """The group. Raises CoordinatorError."""
        answer = await self._call("GET", namespace, deployment, "/v1/status")
        try:
            return observed.group(json.loads(answer.content), answer.tag)
        except KeyError as error:
            raise CoordinatorError(f"its status lacks {error}: is it of another version?") from None
        except (ValueError, TypeError, AttributeError):
            line = f"{names.coordinator(deployment)} answered something that is no status"
            raise CoordinatorError(line) from None

    async def changed(self, namespace: str, deployment: str, tag: str, limit_s: float) -> None:
        """Return when the group is no longer the one with this tag, or after the limit.

        Raises CoordinatorError.
        """
        headers = {"If-None-Match": tag, "Prefer": f"wait={math.ceil(limit_s)}"}
        await self._call("GET", namespace, deployment, "/v1/status", headers, wait_s=limit_s)

    async def set_target(
        self, namespace: str, deployment: str, token: str, operation_id: str, size: int
    ) -> None:
        """Have the group become a size; said again it is the same. Raises CoordinatorError."""
        body = {"operationId": operation_id, "size": size}
        await self._change("PUT", namespace, deployment, "/v1/target", token, body)

    async def restart(self, namespace: str, deployment: str, token: str, operation_id: str) -> None:
        """Have all engines restarted; said again it is the same. Raises CoordinatorError."""
        body = {"operationId": operation_id}
        await self._change("POST", namespace, deployment, "/v1/restart", token, body)

    async def _change(
        self,
        method: str,
        namespace: str,
        deployment: str,
        path: str,
        token: str,
        body: Mapping[str, Any],
    ) -> None:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        content = json.dumps(body).encode()
        await self._call(method, namespace, deployment, path, headers, content)

    async def _call(
        self,
        method: str,
        namespace: str,
        deployment: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        wait_s: float = 0.0,
    ) -> http.Answer:
        host = f"{names.coordinator(deployment)}.{namespace}.svc"
        url = f"http://{host}:{names.COORDINATOR_HTTP_PORT}{path}"
        try:
            answer = await self._http.call(
                method, url, content=content, headers=headers, wait_s=wait_s
            )
        except http.FAILURES as error:
            raise CoordinatorError(f"{host} does not answer ({type(error).__name__})") from None
        if answer.well or answer.status == HTTPStatus.NOT_MODIFIED:
            return answer
        try:
            line = json.loads(answer.content)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            line = f"{url} answered {answer.status}"
        raise CoordinatorError(line)
