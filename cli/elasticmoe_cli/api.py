"""The coordinator's HTTP API as commands use it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from elasticmoe_protocol import keys

from elasticmoe_cli.errors import CommandFailed

LIMIT_S = 10.0
AWAY_S = 30.0
"""Longest absence of a coordinator in which an operation is waited for."""


class Coordinator:
    """One coordinator. keys_dir: where its token is; None where nothing is changed."""

    def __init__(self, url: str, keys_dir: Path | None = None) -> None:
        self._url = url.rstrip("/")
        self._keys_dir = keys_dir
        self._http = httpx.Client(base_url=self._url, timeout=LIMIT_S)

    def status(self) -> dict[str, Any]:
        """The whole group. Raises CommandFailed."""
        return self._call("GET", "/v1/status")

    def operation(self, operation_id: str) -> dict[str, Any]:
        """One operation. Raises CommandFailed."""
        return self._call("GET", f"/v1/operations/{operation_id}")

    def scale(self, size: int, drain_timeout_s: int | None = None) -> dict[str, Any] | None:
        """Ask for a size; the operation, None when nothing is to do. Raises CommandFailed."""
        return self._order("PUT", "/v1/target", size, drain_timeout_s)

    def restart(self, size: int = 0, drain_timeout_s: int | None = None) -> dict[str, Any] | None:
        """Ask for a planned warm restart; the operation. Raises CommandFailed."""
        return self._order("POST", "/v1/restart", size, drain_timeout_s)

    def until_ended(self, operation_id: str, poll_s: float = 0.1) -> Iterator[dict[str, Any]]:
        """An operation again and again, until it has ended. Raises CommandFailed.

        A coordinator that is started anew meanwhile goes on with it: that is waited for.
        """
        known = time.monotonic()
        while True:
            try:
                operation = self.operation(operation_id)
            except CommandFailed:
                if time.monotonic() - known > AWAY_S:
                    raise
            else:
                known = time.monotonic()
                yield operation
                if operation["state"] != "running":
                    return
            time.sleep(poll_s)

    def _order(
        self, method: str, path: str, size: int, drain_timeout_s: int | None
    ) -> dict[str, Any] | None:
        body: dict[str, Any] = {"operationId": uuid.uuid4().hex[:12], "size": size}
        if drain_timeout_s is not None:
            body["drainTimeoutSeconds"] = drain_timeout_s
        found: dict[str, Any] | None = self._call(method, path, body)["operation"]
        return found

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        headers = {}
        if body is not None and self._keys_dir is not None:
            try:
                headers["Authorization"] = f"Bearer {keys.load_token(self._keys_dir)}"
            except keys.KeysError as error:
                raise CommandFailed(f"{error}, or name its folder with --keys", 2) from None
        try:
            answer = self._http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            reason = type(error).__name__
            raise CommandFailed(
                f"no coordinator answers at {self._url} ({reason}): start one with `elasticmoe "
                "coordinator` or `elasticmoe local up`, or name its address with --coordinator"
            ) from None
        if answer.is_success:
            found: dict[str, Any] = answer.json()
            return found
        try:
            line = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            line = f"{self._url}{path} answered {answer.status_code}: is it a coordinator?"
        raise CommandFailed(line, 2 if answer.status_code in (401, 422) else 1)
