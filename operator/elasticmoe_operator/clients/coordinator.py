"""The coordinator's HTTP API (docs/http-api.md), as far as the operator needs it."""

from __future__ import annotations

from typing import Any

import httpx

from elasticmoe_operator import names
from elasticmoe_operator.core import observed
from elasticmoe_operator.core.observed import Group

LIMIT_S = 3.0
"""It answers from memory: what takes longer is away, and another group waits for its turn."""


class CoordinatorError(Exception):
    """It does not answer, or refuses; one line."""


class Coordinators:
    """All coordinators, over one connection pool. http: closed by `close`."""

    def __init__(self, http: httpx.AsyncClient | None = None) -> None:
        self._http = http or httpx.AsyncClient(timeout=LIMIT_S, trust_env=False)

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

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
        try:
            answer = await self._http.request(method, url, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise CoordinatorError(f"{host} does not answer ({type(error).__name__})") from None
        try:
            found: dict[str, Any] = answer.json()
            if not answer.is_success:
                raise CoordinatorError(found["error"]["message"])
            if not isinstance(found, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise CoordinatorError(f"{url} answered {answer.status_code}") from None
        return found
