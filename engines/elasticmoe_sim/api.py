"""The HTTP application: vLLM's paths, its 503 gate inside, the given middleware outermost."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, cast

import prometheus_client
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from elasticmoe_sim import completions, flags
from elasticmoe_sim.client import EngineClient, EngineDeadError
from elasticmoe_sim.completions import VERSION, Answer, BadRequestError, error_body
from elasticmoe_sim.config import Config, ConfigError
from elasticmoe_sim.resize import Group

logger = logging.getLogger("elasticmoe_sim")

ALWAYS_ANSWERED = frozenset({"/health", "/is_scaling_elastic_ep"})
RETIRED = "This data-parallel rank has been retired and is awaiting shutdown."
SCALING = "The model is currently scaling. Please try again later."
# What vLLM has in its development mode and must not be open to users: a gate protects it.
ADMIN_PATHS = (
    "/pause",
    "/resume",
    "/sleep",
    "/wake_up",
    "/collective_rpc",
    "/abort_requests",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/start_profile",
    "/stop_profile",
    "/update_weights",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)


class ScalingMiddleware:
    """Refuses requests while the engine commits and after the rank retired."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer 503, or pass the request on."""
        retired = flags.get_elastic_ep_rank_retired()
        closed = retired or flags.get_scaling_elastic_ep()
        if scope["type"] == "http" and closed and scope["path"] not in ALWAYS_ANSWERED:
            refusal = JSONResponse({"error": RETIRED if retired else SCALING}, 503)
            return refusal(scope, receive, send)
        return self.app(scope, receive, send)


class ApiKeyMiddleware:
    """`--api-key`: covers /v1, /v2 and /inference only, as in vLLM."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self._headers = {f"Bearer {key}".encode() for key in keys}

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer 401, or pass the request on."""
        guarded = scope["type"] == "http" and scope["path"].startswith(("/v1", "/v2", "/inference"))
        if guarded and dict(scope["headers"]).get(b"authorization") not in self._headers:
            return JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        return self.app(scope, receive, send)


def build_app(
    config: Config, client: EngineClient, group: Group, terminate: Callable[[], None]
) -> FastAPI:
    """The application. `terminate` ends the server when a request finds the engine dead.

    Raises ConfigError for a middleware that can't be imported.
    """
    app = FastAPI()
    app.state.engine_client = client
    app.state.vllm_config = client.vllm_config
    _add_errors(app, terminate)
    _add_observation(app, config, client)
    _add_resize(app, group)
    _add_completions(app, config, client)
    if config.api_keys:
        app.add_middleware(ApiKeyMiddleware, keys=config.api_keys)
    app.add_middleware(ScalingMiddleware)
    for name in config.middleware:
        _add_middleware(app, name)
    return app


def _add_middleware(app: FastAPI, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--middleware {name}: {error}") from None
    if inspect.isclass(found):
        app.add_middleware(cast(Callable[..., ASGIApp], found))
    elif inspect.iscoroutinefunction(found):
        app.middleware("http")(found)
    else:
        raise ConfigError(f"--middleware {name}: must be a function or a class")


def _add_errors(app: FastAPI, terminate: Callable[[], None]) -> None:
    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        return JSONResponse(
            error_body(str(error.detail), phrase, error.status_code), error.status_code
        )

    async def bad_request(_: Request, error: Exception) -> Response:
        assert isinstance(error, BadRequestError)
        kind = "NotFoundError" if error.status == 404 else "BadRequestError"
        return JSONResponse(error_body(str(error), kind, error.status, error.param), error.status)

    async def engine_dead(_: Request, error: Exception) -> Response:
        terminate()
        return JSONResponse(error_body(completions.DEAD_MESSAGE, "InternalServerError", 500), 500)

    async def other(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(str(error), "InternalServerError", 500), 500)

    app.exception_handler(HTTPException)(http_error)
    app.exception_handler(BadRequestError)(bad_request)
    app.exception_handler(EngineDeadError)(engine_dead)
    app.exception_handler(AttributeError)(other)


def _add_observation(app: FastAPI, config: Config, client: EngineClient) -> None:
    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if client.errored else 200)

    @app.api_route("/ping", methods=["GET", "POST"])
    async def ping() -> Response:
        return await health()

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": VERSION})

    @app.get("/load")
    async def load() -> Response:
        return JSONResponse({"server_load": 0})  # vLLM counts only when told to

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(
            prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )

    @app.get("/v1/models")
    async def models() -> Response:
        data = [
            {
                "id": name,
                "object": "model",
                "owned_by": "vllm",
                "root": config.model,
                "parent": None,
                "max_model_len": config.max_model_len,
            }
            for name in config.served_model_names
        ]
        return JSONResponse({"object": "list", "data": data})

    async def admin() -> Response:
        return Response(status_code=200)

    for path in ADMIN_PATHS:
        app.add_api_route(path, admin, methods=["POST"])


async def _json_object(request: Request) -> Any:
    media_type = request.headers.get("content-type", "").lower().split(";")[0]
    if media_type != "application/json":
        raise HTTPException(
            400,
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
        )
    try:
        return json.loads(await request.body())
    except ValueError:
        raise HTTPException(400, "Invalid JSON format") from None


def _add_resize(app: FastAPI, group: Group) -> None:
    @app.post("/scale_elastic_ep")
    async def scale_elastic_ep(request: Request) -> Response:
        body = await _json_object(request)
        target = body.get("new_data_parallel_size")  # not an object: 500, as in vLLM
        drain_timeout = body.get("drain_timeout", 120)
        if target is None:
            raise HTTPException(400, "new_data_parallel_size is required")
        if not isinstance(target, int) or target <= 0:
            raise HTTPException(400, "new_data_parallel_size must be a positive integer")
        if not isinstance(drain_timeout, int) or drain_timeout <= 0:
            raise HTTPException(400, "drain_timeout must be a positive integer")
        try:
            await group.scale(target)
        except TimeoutError as error:  # vLLM blames the drain whatever took too long
            raise HTTPException(
                408,
                f"Scale failed due to request drain timeout after {drain_timeout} seconds",
            ) from error
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except Exception as error:
            logger.error("Scale failed: %s", error)
            raise HTTPException(500, "Scale failed") from error
        return JSONResponse({"message": f"Scaled to {target} data parallel engines"})

    @app.post("/is_scaling_elastic_ep")
    async def is_scaling_elastic_ep() -> Response:
        try:
            status = await group.status()
        except Exception as error:
            logger.warning("Failed to query external Elastic EP status: %s", error)
            raise HTTPException(
                503, "External Elastic EP status is temporarily unavailable"
            ) from error
        scaling = status["phase"] in ("preparing", "committing")
        return JSONResponse({"is_scaling_elastic_ep": scaling, **status})


async def _unless_hung_up(raw: Request, answer: Answer) -> Response:
    """The whole answer; a client that hangs up meanwhile ends its request, as in vLLM."""

    async def hung_up() -> None:
        while (await raw.receive())["type"] != "http.disconnect":
            pass

    making, leaving = asyncio.create_task(answer.whole()), asyncio.create_task(hung_up())
    try:
        await asyncio.wait([making, leaving], return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(making.result()) if making.done() else Response(status_code=499)
    finally:
        making.cancel()
        leaving.cancel()


def _add_completions(app: FastAPI, config: Config, client: EngineClient) -> None:
    async def complete(raw: Request, chat: bool) -> Response:
        body = await _json_object(raw)
        if not isinstance(body, dict):
            raise HTTPException(400, "the body must be a JSON object")
        names, length = config.served_model_names, config.max_model_len
        request = completions.parse(body, chat, names, length)
        answer = Answer(client, request)
        if client.errored:
            raise EngineDeadError
        if request.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        return await _unless_hung_up(raw, answer)

    @app.post("/v1/completions")
    async def create_completion(raw: Request) -> Response:
        return await complete(raw, chat=False)

    @app.post("/v1/chat/completions")
    async def create_chat_completion(raw: Request) -> Response:
        return await complete(raw, chat=True)
