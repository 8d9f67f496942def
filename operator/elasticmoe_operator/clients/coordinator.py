"""The coordinator's HTTP API (docs/http-api.md), as far as the operator needs it."""

from __future__ import annotations

import json
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
        self._http = http.Http(LIMIT_S, keep_s=_KEEP_S, resolver=resolver)

    async def close(self) -> None:
        """End all connections."""
        await self._http.close()

    async def status(self, namespace: str, deployment: str) -> Group:
        """The group. Raises CoordinatorError."""
        try:
            return observed.group(await self._call("GET", namespace, deployment, "/v1/status"))
        except (KeyError, TypeError) as error:
            raise CoordinatorError(f"its status lacks {error}: is it of another version?") from None

    async def set_target(
        self, namespace: str, deployment: str, token: str, operation_id: str, size: int
    ) -> None:
        """Have the group become a size; said again it is the same. Raises CoordinatorError."""
        body = {"operationId": operation_id, "size": size}
        headers = {"Authorization": f"Bearer {token}"}
        await self._call("PUT", namespace, deployment, "/v1/target", body, headers)

    async def restart(self, namespace: str, deployment: str, token: str, operation_id: str) -> None:
        """Have all engines restarted; said again it is the same. Raises CoordinatorError."""
        body = {"operationId": operation_id}
        headers = {"Authorization": f"Bearer {token}"}
        await self._call("POST", namespace, deployment, "/v1/restart", body, headers)

    async def _call(
        self,
        method: str,
        namespace: str,
        deployment: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        host = f"{names.coordinator(deployment)}.{namespace}.svc"
        url = f"http://{host}:{names.COORDINATOR_HTTP_PORT}{path}"
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | (headers or {}) if content else headers
        try:
            status, answer = await self._http.call(method, url, content=content, headers=headers)
        except http.FAILURES as error:
            raise CoordinatorError(f"{host} does not answer ({type(error).__name__})") from None
        try:
            found: dict[str, Any] = json.loads(answer)
            if not http.well(status):
                raise CoordinatorError(found["error"]["message"])
            if not isinstance(found, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise CoordinatorError(f"{url} answered {status}") from None
        return found
