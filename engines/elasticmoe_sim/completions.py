"""`/v1/completions` and `/v1/chat/completions` in vLLM's words, whole or as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from elasticmoe_sim.client import EngineClient, EngineDeadError, Output

VERSION = "0.33.0"
DEAD_MESSAGE = "The server had an error while processing your request."
_SYLLABLES = (
    "ba",
    "de",
    "fi",
    "go",
    "ku",
    "la",
    "me",
    "ni",
    "po",
    "ru",
    "sa",
    "te",
    "vi",
    "wo",
    "xu",
    "ya",
)


class BadRequestError(ValueError):
    """The request is refused; `param` names what is wrong in it."""

    def __init__(self, text: str, param: str | None, status: int = 400) -> None:
        super().__init__(text)
        self.param = param
        self.status = status


@dataclass(frozen=True)
class Request:
    """A completion as asked for; pure."""

    chat: bool
    model: str
    prompt: list[int]
    max_tokens: int
    stream: bool
    usage: bool
    logprobs: bool
    token_ids: bool


def parse(body: dict[str, Any], chat: bool, models: tuple[str, ...], max_len: int) -> Request:
    """Check a request's body; raises BadRequestError."""
    model = body.get("model") or models[0]
    if model not in models:
        aliases = ", ".join(models)
        raise BadRequestError(
            f"The model `{model}` does not exist. Valid aliases: {aliases}.", "model", 404
        )
    prompt = _chat_prompt(body) if chat else _prompt(body)
    default = max_len - len(prompt) if chat else 16
    name = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    max_tokens = body.get(name)
    if max_tokens is None:
        max_tokens = default
    tail = f" (parameter={name}, value={max_tokens})"
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise BadRequestError(f"{name} must be at least 1, got {max_tokens}.{tail}", name)
    if max_tokens > max_len:
        raise BadRequestError(
            f"{name}={max_tokens} cannot be greater than max_model_len={max_len}. "
            f"Please request fewer output tokens.{tail}",
            name,
        )
    options = body.get("stream_options") or {}
    return Request(
        chat=chat,
        model=model,
        prompt=prompt,
        max_tokens=min(max_tokens, max(1, max_len - len(prompt))),
        stream=bool(body.get("stream")),
        usage=bool(options.get("include_usage")),
        logprobs=body.get("logprobs") not in (None, False),
        token_ids=bool(body.get("return_token_ids")),
    )


def _prompt(body: dict[str, Any]) -> list[int]:
    prompt = body.get("prompt")
    if not prompt:
        raise BadRequestError(
            "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
            "prompt",
        )
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return list(prompt)
    if isinstance(prompt, str):
        return list(prompt.encode())
    raise BadRequestError("one prompt a request: a string or a list of token ids", "prompt")


def _chat_prompt(body: dict[str, Any]) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise BadRequestError("messages must be a list of objects", "messages")
    lines = [f"{one.get('role')}: {one.get('content')}\n" for one in messages]
    return list("".join([*lines, "assistant:"]).encode())


def text_of(token: int) -> str:
    """Text of a token: two syllables, a blank before."""
    return f" {_SYLLABLES[token // 16 % 16]}{_SYLLABLES[token % 16]}"


class Answer:
    """Makes one request's response out of the engine's outputs."""

    def __init__(self, client: EngineClient, request: Request) -> None:
        self._client = client
        self._request = request
        self._id = ("chatcmpl-" if request.chat else "cmpl-") + uuid4().hex[:16]
        self._created = int(time.time())
        self._made = 0

    def _outputs(self) -> AsyncIterator[Output]:
        return self._client.generate(self._request.prompt, self._request.max_tokens)

    async def whole(self) -> dict[str, Any]:
        """The body of a response that is no stream; raises EngineDeadError."""
        outputs = [output async for output in self._outputs()]
        made = [output for output in outputs if output.token is not None]
        self._made = len(made)
        text = "".join(text_of(output.token or 0) for output in made)
        choice: dict[str, Any] = {"index": 0}
        if self._request.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice |= {
            "logprobs": self._logprobs(made, 0),
            "finish_reason": outputs[-1].finish_reason,
            "stop_reason": None,
            "token_ids": [one.token for one in made] if self._request.token_ids else None,
        }
        prompt = self._request.prompt if self._request.token_ids else None
        body: dict[str, Any] = {}
        (body if self._request.chat else choice)["prompt_token_ids"] = prompt
        kind = "chat.completion" if self._request.chat else "text_completion"
        return {
            **self._head(kind),
            "choices": [choice],
            "system_fingerprint": self._fingerprint(),
            "usage": self._usage(),
            **body,
        }

    async def stream(self) -> AsyncIterator[str]:
        """The events of a stream; an engine that dies ends it with an error event."""
        request = self._request
        if request.chat:
            delta = {"role": "assistant", "content": ""}
            yield self._event([{"index": 0, "delta": delta, "finish_reason": None}])
        try:
            offset = 0
            async with aclosing(self._outputs()) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    yield self._event([self._stream_choice(output, offset)])
                    if output.token is not None:
                        offset += len(text_of(output.token))
                        self._made += 1
            if request.usage:
                yield self._event([], {"usage": self._usage()})
        except EngineDeadError:
            error = error_body(DEAD_MESSAGE, "InternalServerError", 500)
            yield f"data: {json.dumps(error)}\n\n"
        yield "data: [DONE]\n\n"

    def _stream_choice(self, output: Output, offset: int) -> dict[str, Any]:
        request, made = self._request, [output] if output.token is not None else []
        text = text_of(output.token) if output.token is not None else ""
        choice: dict[str, Any] = {"index": 0}
        if request.chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
            choice["prompt_token_ids"] = (
                request.prompt if request.token_ids and self._made == 0 else None
            )
        return choice | {
            "logprobs": self._logprobs(made, offset),
            "finish_reason": output.finish_reason,
            "stop_reason": None,
            "token_ids": [one.token for one in made] if request.token_ids else None,
        }

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> str:
        kind = "chat.completion.chunk" if self._request.chat else "text_completion"
        body = {**self._head(kind), "choices": choices, **(more or {})}
        return f"data: {json.dumps(body)}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
        }

    def _fingerprint(self) -> str:
        size = self._client.vllm_config.parallel_config.data_parallel_size
        return f"vllm-{VERSION}-dp{size}-ep-sim"

    def _usage(self) -> dict[str, int]:
        prompt = len(self._request.prompt)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self._made,
            "completion_tokens": self._made,
        }

    def _logprobs(self, made: list[Output], offset: int) -> dict[str, Any] | None:
        if not self._request.logprobs or not made:
            return None
        tokens = [text_of(one.token or 0) for one in made]
        values = [one.logprob for one in made]
        if self._request.chat:
            pairs = zip(tokens, values, strict=True)
            return {
                "content": [
                    {"token": t, "logprob": v, "bytes": list(t.encode()), "top_logprobs": []}
                    for t, v in pairs
                ]
            }
        offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        return {
            "text_offset": offsets,
            "token_logprobs": values,
            "tokens": tokens,
            "top_logprobs": [{t: v} for t, v in zip(tokens, values, strict=True)],
        }


def error_body(text: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error, as vLLM writes it."""
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}
