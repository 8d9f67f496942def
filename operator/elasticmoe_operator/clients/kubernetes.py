"""The few calls of the Kubernetes API that the operator makes beside kopf's watches.

Server-side apply, merge patches and deletions that name the UID, over one connection pool, each
with a time limit. Objects are plain dicts, as the builders make them.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from aiohttp.abc import AbstractResolver

from elasticmoe_operator import names
from elasticmoe_operator.clients import http

LIMIT_S: Final = 10.0
_KEEP_S: Final = 15.0
_CONNECTIONS: Final = 100
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


class Kubernetes:
    """One API server, over connections that `close` ends.

    url: without a path. token: a file, read at each call: the kubelet renews it. tls: who is
    trusted. resolver: where the host is, if not where DNS says.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Path | None = None,
        tls: ssl.SSLContext | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._url, self._token = url, token
        self._http = http.Http(
            LIMIT_S, keep_s=_KEEP_S, connections=_CONNECTIONS, tls=tls, resolver=resolver
        )

    @classmethod
    def in_cluster(cls) -> Kubernetes:
        """With the account of the pod that this runs in. Raises ApiError elsewhere."""
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{one}") for one in ("HOST", "PORT"))
        if not host or not (_ACCOUNT / "token").exists():
            raise ApiError("not in a pod with a service account: name a file with --kubeconfig")
        host = f"[{host}]" if ":" in host else host
        context = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
        return cls(f"https://{host}:{port}", token=_ACCOUNT / "token", tls=context)

    async def close(self) -> None:
        """End all connections."""
        await self._http.close()

    async def get(self, kind: str, api_version: str, namespace: str, name: str) -> Object | None:
        """An object, None when there is none. Raises ApiError."""
        return await self._call("GET", _path(api_version, kind, namespace, name), missing=True)

    async def pods(self, namespace: str, selector: str) -> list[tuple[str, str]]:
        """Name and UID of the pods that have these labels. Raises ApiError."""
        path = _path("v1", "Pod", namespace)
        answer = await self._call("GET", path, params={"labelSelector": selector}) or {}
        every = [one["metadata"] for one in answer.get("items") or []]
        return [(one["name"], one["uid"]) for one in every]

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
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": kind} if content is not None else {}
        try:
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token.read_text().strip()}"
            answer = await self._http.call(
                method, self._url + path, content=content, headers=headers, params=params
            )
        except http.FAILURES as error:
            said = " ".join(f"{type(error).__name__} {error}".split())
            raise ApiError(f"{method} {path}: {said}") from None
        if missing and answer.status == 404:
            return None
        if not answer.well:
            raise ApiError(f"{method} {path}: {_message(answer)}", answer.status)
        try:
            found: Object = json.loads(answer.content)
        except ValueError:
            raise ApiError(f"{method} {path}: the answer is no JSON", answer.status) from None
        return found


def _path(api_version: str, kind: str, namespace: str, name: str = "") -> str:
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    return f"{root}/namespaces/{namespace}/{_PLURALS[kind]}" + (f"/{name}" if name else "")


def _message(answer: http.Answer) -> str:
    try:
        return str(json.loads(answer.content)["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status}"
