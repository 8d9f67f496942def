"""Calls to the launcher and the gate over their unix sockets. Failures are values."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
from elasticmoe_protocol.messages import LaunchSpec, PreflightOutcome, PreflightSpec

from elasticmoe_sidecar.converge import SetFence, StartScale, StopEngine
from elasticmoe_sidecar.states import GateState, LauncherState, PhaseState, PreflightState

T = TypeVar("T")

READ_LIMIT_S = 2.0
ORDER_LIMIT_S = 5.0
PREFLIGHT_LIMIT_S = 120.0
"""A preflight opens every weight file, over a network file system too."""
_FROZEN_S = 0.5
"""A limit overrun by so much was not the other side's: this process was stopped meanwhile."""


@dataclass(frozen=True)
class Failure:
    """Why a call got no answer that can be used; one line."""

    reason: str


class _Client:
    """HTTP over one unix socket."""

    def __init__(self, name: str, socket: Path) -> None:
        self._name, self._socket = name, socket
        # Each call has its own connection: none outlives the process behind the socket.
        limits = httpx.Limits(max_keepalive_connections=0)
        transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=limits)
        self._http = httpx.AsyncClient(transport=transport, base_url=f"http://{name}")

    async def close(self) -> None:
        """Close what is open."""
        await self._http.aclose()

    async def call(
        self, method: str, path: str, limit_s: float, body: Any = None
    ) -> httpx.Response | Failure:
        """The answer, whatever its status."""
        content = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if content else None
        while True:
            began = time.monotonic()
            try:
                return await self._http.request(
                    method, path, content=content, headers=headers, timeout=limit_s
                )
            except httpx.TimeoutException:
                if time.monotonic() - began < limit_s + _FROZEN_S:
                    return Failure(
                        f"the {self._name} did not answer {method} {path} in {limit_s:g} s"
                    )
            except httpx.HTTPError as error:
                if isinstance(_first_cause(error), PermissionError):
                    return Failure(
                        f"this user (UID {os.geteuid()}) may not open {self._socket}: run as the "
                        f"{self._name}'s user, or give the pod an fsGroup"
                    )
                return Failure(f"no {self._name} on {self._socket} ({type(error).__name__})")

    async def get(self, path: str, answer: type[T], limit_s: float = READ_LIMIT_S) -> T | Failure:
        """The answer to GET, typed."""
        response = await self.call("GET", path, limit_s)
        return response if isinstance(response, Failure) else self.decode(response, answer)

    async def order(self, method: str, path: str, body: Any = None) -> Failure | None:
        """Have something done; None when it was accepted."""
        response = await self.call(method, path, ORDER_LIMIT_S, body)
        if isinstance(response, Failure):
            return response
        return None if response.is_success else self.refusal(response)

    def decode(self, response: httpx.Response, answer: type[T]) -> T | Failure:
        """The body of a successful answer, typed."""
        if not response.is_success:
            return self.refusal(response)
        try:
            return msgspec.json.decode(response.content, type=answer)
        except msgspec.MsgspecError as error:
            return Failure(f"the {self._name}'s answer to {response.url.path} is wrong: {error}")

    def refusal(self, response: httpx.Response) -> Failure:
        """What the other side said against it."""
        text = " ".join(response.text.split())[:300]
        request = f"{response.request.method} {response.url.path}"
        return Failure(f"the {self._name} refused {request}: {response.status_code} {text}")


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class Launcher:
    """The launcher of this instance."""

    def __init__(self, socket: Path, host_ip: str) -> None:
        self._client, self._host_ip = _Client("launcher", socket), host_ip

    async def close(self) -> None:
        """Close what is open."""
        await self._client.close()

    async def state(self) -> LauncherState | Failure:
        """What the launcher says of itself and its engine."""
        return await self._client.get("/state", LauncherState)

    async def start(self, spec: LaunchSpec) -> Failure | None:
        """Start an engine; the same launch again does nothing."""
        body = msgspec.structs.asdict(spec) | {"host_ip": self._host_ip}
        return await self._client.order("PUT", "/engine", body)

    async def stop(self, stop: StopEngine) -> Failure | None:
        """Begin to stop an engine."""
        query = httpx.QueryParams(launch=stop.launch, grace=stop.grace)
        return await self._client.order("DELETE", f"/engine?{query}")

    async def ready(self, ready: bool) -> Failure | None:
        """Set what the readiness probe says."""
        return await self._client.order("PUT", "/ready", {"ready": ready})

    async def preflight(self, spec: PreflightSpec) -> PreflightOutcome | Failure:
        """Check the instance."""
        response = await self._client.call("POST", "/preflight", PREFLIGHT_LIMIT_S, spec)
        if isinstance(response, Failure):
            return response
        state = self._client.decode(response, PreflightState)
        if isinstance(state, Failure):
            return state
        return PreflightOutcome(check=state.check, ok=state.ok, reason=state.reason or "")


class Gate:
    """The gate inside this instance's API server."""

    def __init__(self, socket: Path) -> None:
        self._client = _Client("gate", socket)

    async def close(self) -> None:
        """Close what is open."""
        await self._client.close()

    async def state(self) -> GateState | Failure:
        """What the gate says."""
        return await self._client.get("/state", GateState)

    async def phase(self) -> PhaseState | Failure:
        """The engine's shared view of a resize; the gate asks the engine for it."""
        return await self._client.get("/phase", PhaseState, limit_s=READ_LIMIT_S + 1)

    async def metrics(self) -> str | Failure:
        """The engine's metrics as Prometheus' text."""
        response = await self._client.call("GET", "/metrics", READ_LIMIT_S)
        if isinstance(response, Failure):
            return response
        return response.text if response.is_success else self._client.refusal(response)

    async def fence(self, step: SetFence) -> Failure | None:
        """Set what the gate does with requests."""
        return await self._client.order("PUT", "/fence", {"mode": step.mode})

    async def scale(self, step: StartScale) -> Failure | None:
        """Begin a resize; an operation that the gate knows is not run again."""
        order = step.order
        body = {"target": order.target, "drain_timeout_s": order.drain_timeout_s}
        return await self._client.order("PUT", f"/operations/{order.operation}", body)
