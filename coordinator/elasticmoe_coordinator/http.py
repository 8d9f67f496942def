"""The coordinator's HTTP API: for the operator and for people."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import re
import time
from pathlib import Path
from typing import Annotated, Any, Protocol

from elasticmoe_protocol import keys
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elasticmoe_coordinator import models
from elasticmoe_coordinator.core.outbox import Rejected, TargetRequest
from elasticmoe_coordinator.core.status import GroupStatus, OperationStatus, mark
from elasticmoe_coordinator.metrics import Metrics

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
_STATUS = {"invalid": 422, "conflict": 409, "not_ready": 409}
_ADVICE = {
    "extra_forbidden": "there is no such field, leave it out",
    "missing": "it is missing",
    "model_attributes_type": "send a JSON object, with Content-Type: application/json",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
MAX_BODY = 1 << 16
"""Bytes of a request; a target has some hundred."""
LONGEST_WAIT_S = 60.0
"""Of a question for a status that is not the one known."""
_LOOK_S = 0.1
"""So often one looks for it: a tick of the rules."""
_CHANGES: dict[int | str, dict[str, Any]] = {
    200: {"model": models.Accepted, "description": "It runs already, or nothing is to do"},
    401: {"model": models.Failure, "description": "The token is missing or wrong"},
    409: {"model": models.Failure, "description": "Another operation runs, or it is too early"},
    413: {"model": models.Failure, "description": "The body is too long"},
    422: {"model": models.Failure, "description": "A size, an id or the body can't be"},
    503: {"model": models.Failure, "description": "The coordinator can't read its token"},
}


class Rules(Protocol):
    """What the API needs of a group."""

    def set_target(self, request: TargetRequest, now: float) -> tuple[OperationStatus | None, bool]:
        """See `Group`."""

    def restart(self, request: TargetRequest, now: float) -> tuple[OperationStatus, bool]:
        """See `Group`."""

    def operation(self, operation_id: str, now: float) -> OperationStatus | None:
        """See `Group`."""

    def status(self, now: float) -> GroupStatus:
        """See `Group`."""


class Unauthorized(Exception):
    """The bearer token is missing or wrong."""


def app(
    group: Rules, keys_dir: Path, metrics: Metrics, version: str, stopping: asyncio.Event
) -> FastAPI:
    """The API of one group. keys_dir: where the token is, read again for each request.

    stopping: when it is set, who waits for a change is answered at once.
    """
    api = FastAPI(
        title="Elastic MoE coordinator",
        version=version,
        docs_url=None,
        redoc_url=None,
    )
    api.add_middleware(_Bounded)

    def authorized(given: Credentials) -> None:
        if given is None or not keys.token_is_valid(keys_dir, given.credentials):
            raise Unauthorized

    @api.get(
        "/v1/status",
        summary="The whole group",
        description="With If-None-Match and Prefer: wait=N it is answered when something changed, "
        "or with 304 after N seconds.",
        response_model=models.Group,
        responses={304: {"description": "Nothing but loads and times changed"}},
    )
    async def status(request: Request, response: Response) -> object:
        loop = asyncio.get_running_loop()
        until = loop.time() + _wait(request.headers.get("Prefer", ""))
        known = request.headers.get("If-None-Match", "")
        while True:
            found = group.status(time.time())
            tag = f'W/"{mark(found)}"'
            if tag not in known:
                response.headers["ETag"] = tag
                return models.Group.model_validate(found)
            over = loop.time() >= until or stopping.is_set()
            if over or await request.is_disconnected():
                return Response(status_code=304, headers={"ETag": tag})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _LOOK_S)

    @api.put(
        "/v1/target",
        summary="Have the group become this size",
        description="202: this call began an operation. 200: it runs already, or nothing is to do.",
        dependencies=[Depends(authorized)],
        status_code=202,
        responses=_CHANGES,
    )
    async def target(body: models.Target, response: Response) -> models.Accepted:
        request = TargetRequest(body.operation_id, body.size, body.drain_timeout_seconds)
        operation, began = group.set_target(request, time.time())
        response.status_code = 202 if began else 200
        return models.Accepted.model_validate({"operation": operation})

    @api.post(
        "/v1/restart",
        summary="Restart all engines warm, drained first",
        dependencies=[Depends(authorized)],
        status_code=202,
        responses=_CHANGES,
    )
    async def restart(body: models.Restart, response: Response) -> models.Accepted:
        request = TargetRequest(body.operation_id, body.size, body.drain_timeout_seconds)
        operation, began = group.restart(request, time.time())
        response.status_code = 202 if began else 200
        return models.Accepted.model_validate({"operation": operation})

    @api.get(
        "/v1/operations/{operation_id}",
        summary="One operation: the running one or one of the last ten",
        responses={404: {"model": models.Failure}, 422: {"model": models.Failure}},
    )
    async def operation(operation_id: str) -> models.Operation:
        found = group.operation(operation_id, time.time())
        if found is None:
            raise HTTPException(404, "no such operation: the last ten are in /v1/status")
        return models.Operation.model_validate(found)

    @api.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.get("/healthz", response_class=PlainTextResponse, summary="The process works")
    async def healthz() -> str:
        return "ok"

    @api.get(
        "/readyz",
        response_class=PlainTextResponse,
        summary="It knows its group",
        responses={503: {"description": "It is learning who is there"}},
    )
    async def readyz() -> PlainTextResponse:
        learning = group.status(time.time()).state == "Learning"
        return PlainTextResponse("learning" if learning else "ok", 503 if learning else 200)

    @api.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return _docs(api)

    _errors(api, keys_dir)
    return api


def _wait(prefer: str) -> float:
    """Seconds of `Prefer: wait=N` (RFC 7240); what is not understood is ignored, as it says."""
    found = re.search(r"(?:^|[,;\s])wait=(\d{1,9})\b", prefer)
    return min(float(found[1]), LONGEST_WAIT_S) if found else 0.0


class _Bounded:
    """Reads no body past MAX_BODY, whoever sends it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY:
                raise HTTPException(413, f"the body is longer than {MAX_BODY} bytes: send less")
            return message

        await self._app(scope, bounded, send)


def _errors(api: FastAPI, keys_dir: Path) -> None:
    """Every error has the same form."""

    @api.exception_handler(Rejected)
    async def rejected(_: Request, error: Rejected) -> JSONResponse:
        return _failure(_STATUS[error.code], error.code, error.reason, error.operation)

    @api.exception_handler(Unauthorized)
    async def unauthorized(_: Request, __: Exception) -> JSONResponse:
        line = (
            "send the group's token as `Authorization: Bearer …`: it is in the file `token` of "
            "the coordinator's keys folder"
        )
        answer = _failure(401, "unauthorized", line)
        answer.headers["WWW-Authenticate"] = "Bearer"
        return answer

    @api.exception_handler(keys.KeysError)
    async def no_keys(_: Request, error: keys.KeysError) -> JSONResponse:
        return _failure(503, "keys", str(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            # Found before anybody asked for the token.
            _, given = get_authorization_scheme_param(request.headers.get("Authorization"))
            if not keys.token_is_valid(keys_dir, given):
                return await unauthorized(request, error)
            return _failure(422, "invalid", "the body: it is no JSON, send an object")
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return _failure(422, "invalid", f"{where}: {_ADVICE.get(first['type'], first['msg'])}")

    @api.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        line = str(error.detail)
        if line == "Not Found":
            line = "there is nothing at this path: /docs shows what there is"
        return _failure(error.status_code, _CODES.get(error.status_code, "error"), line)


def _failure(status: int, code: str, message: str, operation: str = "") -> JSONResponse:
    problem = models.Problem(code=code, message=message, operation=operation or None)
    body = models.Failure(error=problem).model_dump(by_alias=True, exclude_none=True)
    return JSONResponse(body, status)


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
code,pre{{background:#f2f2f2;border-radius:4px;padding:.1em .3em}}pre{{padding:1em;overflow:auto}}
h2{{margin-top:2rem;font-size:1.1rem}}b{{display:inline-block;min-width:4rem}}</style>
<h1>{title} {version}</h1><p>The machine-readable description is
<a href="openapi.json">openapi.json</a>. What changes something needs the header
<code>Authorization: Bearer TOKEN</code>.</p>{paths}
<h2>Schemas</h2><pre>{schemas}</pre></html>"""


def _docs(api: FastAPI) -> str:
    """A page without scripts and without anything from elsewhere."""
    described = api.openapi()
    parts = []
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            parts.append(
                f"<h2><b>{method.upper()}</b> <code>{html.escape(path)}</code></h2>"
                f"<p>{html.escape(about.get('summary', ''))}. "
                f"{html.escape(about.get('description', ''))}</p>"
            )
    schemas = json.dumps(described["components"]["schemas"], indent=2)
    return _PAGE.format(
        title=html.escape(api.title),
        version=html.escape(api.version),
        paths="".join(parts),
        schemas=html.escape(schemas),
    )
