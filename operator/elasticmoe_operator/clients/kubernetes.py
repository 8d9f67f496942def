"""The few calls of the Kubernetes API that the operator makes beside kopf's watches.

Server-side apply, merge patches and deletions that name the UID, over one connection pool, each
with a time limit. Objects are plain dicts, as the builders make them.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from elasticmoe_operator import names

LIMIT_S: Final = 10.0
_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_PLURALS: Final = {
    "ConfigMap": "configmaps",
    "Deployment": "deployments",
    names.KIND: names.PLURAL,
    "NetworkPolicy": "networkpolicies",
    "Pod": "pods",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "Secret": "secrets",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
    "StatefulSet": "statefulsets",
}

Object = Mapping[str, Any]


class ApiError(Exception):
    """The API refused or did not answer. status: of HTTP, 0 when nothing answered."""

    def __init__(self, line: str, status: int = 0) -> None:
        super().__init__(line)
        self.status = status


class _Token(httpx.Auth):
    """A pod's own token, read at each call: the kubelet renews the file."""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        token = (_ACCOUNT / "token").read_text().strip()
        request.headers["Authorization"] = f"Bearer {token}"
        yield request


class Kubernetes:
    """One API server. http: a client with base URL and credentials; closed by `close`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    @classmethod
    def in_cluster(cls) -> Kubernetes:
        """With the account of the pod that this runs in. Raises ApiError elsewhere."""
        import os
        import ssl

        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{one}") for one in ("HOST", "PORT"))
        if not host or not (_ACCOUNT / "token").exists():
            raise ApiError("not in a pod with a service account: name a file with --kubeconfig")
        host = f"[{host}]" if ":" in host else host
        context = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
        return cls(_client(f"https://{host}:{port}", verify=context, auth=_Token()))

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

    async def get(self, kind: str, api_version: str, namespace: str, name: str) -> Object | None:
        """An object, None when there is none. Raises ApiError."""
        return await self._call("GET", _path(api_version, kind, namespace, name), missing=True)

    async def apply(self, manifest: Object) -> Object:
        """Make the object so (server-side apply); fields of others are left alone.

        Raises ApiError.
        """
        metadata = manifest["metadata"]
        path = _path(
            manifest["apiVersion"], manifest["kind"], metadata["namespace"], metadata["name"]
        )
        answer = await self._call(
            "PATCH",
            path,
            body=manifest,
            kind="application/apply-patch+yaml",
            params={"fieldManager": names.FIELD_MANAGER, "force": "true"},
        )
        return answer or {}

    async def merge(
        self,
        kind: str,
        api_version: str,
        namespace: str,
        name: str,
        patch: Object,
        subresource: str = "",
    ) -> Object | None:
        """Merge patch (RFC 7386); None when the object is gone. Raises ApiError."""
        path = _path(api_version, kind, namespace, name) + (f"/{subresource}" * bool(subresource))
        params = {"fieldManager": names.FIELD_MANAGER}
        return await self._call(
            "PATCH",
            path,
            body=patch,
            kind="application/merge-patch+json",
            params=params,
            missing=True,
        )

    async def delete(
        self,
        kind: str,
        api_version: str,
        namespace: str,
        name: str,
        *,
        uid: str = "",
        grace_s: int | None = None,
    ) -> None:
        """Delete it if it is there, and with a UID only that one. Raises ApiError."""
        body: dict[str, Any] = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            await self._call(
                "DELETE", _path(api_version, kind, namespace, name), body=body, missing=True
            )
        except ApiError as error:
            if error.status != 409:  # another one has the name by now
                raise

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Object | None = None,
        kind: str = "application/json",
        params: Mapping[str, str] | None = None,
        missing: bool = False,
    ) -> Object | None:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": kind} if content is not None else {}
        try:
            answer = await self._http.request(
                method, path, content=content, headers=headers, params=params
            )
        except httpx.HTTPError as error:
            raise ApiError(f"{method} {path}: {type(error).__name__} {error}".strip()) from None
        if missing and answer.status_code == 404:
            return None
        if not answer.is_success:
            raise ApiError(f"{method} {path}: {_message(answer)}", answer.status_code)
        try:
            found: Object = answer.json()
        except ValueError:
            line = f"{method} {path}: the answer is no JSON"
            raise ApiError(line, answer.status_code) from None
        return found


def _client(base_url: str, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=base_url, timeout=LIMIT_S, trust_env=False, **options)


def _path(api_version: str, kind: str, namespace: str, name: str) -> str:
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    return f"{root}/namespaces/{namespace}/{_PLURALS[kind]}/{name}"


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}"
