"""The series of vLLM that a sidecar or an autoscaler reads, under vLLM's names and labels."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

_LABELS = ["model_name", "engine"]
FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")


class Metrics:
    """Series of one API server in the process's registry."""

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._model_name = model_name

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, _LABELS, registry=registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, [*_LABELS, *more], registry=registry)

        self._running = gauge(
            "vllm:num_requests_running", "Number of requests in model execution batches."
        )
        self._waiting = gauge(
            "vllm:num_requests_waiting", "Number of requests waiting to be processed."
        )
        self._kv_cache = gauge(
            "vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage."
        )
        self._prompt = counter("vllm:prompt_tokens", "Number of prefill tokens processed.")
        self._generated = counter(
            "vllm:generation_tokens", "Number of generation tokens processed."
        )
        self._success = counter(
            "vllm:request_success", "Count of successfully processed requests.", "finished_reason"
        )

    def register(self, engines: Iterable[int]) -> None:
        """Make the series of `engines`, all at zero.

        vLLM does so with its own rank at the start and with all ranks after a scale-up.
        """
        for metric in self._all():
            metric.clear()
        for engine in engines:
            for metric in (self._running, self._waiting, self._kv_cache):
                metric.labels(self._model_name, str(engine))
            for total in (self._prompt, self._generated):
                total.labels(self._model_name, str(engine))
            for reason in FINISHED_REASONS:
                self._success.labels(self._model_name, str(engine), reason)

    def _all(self) -> list[Gauge | Counter]:
        return [
            self._running,
            self._waiting,
            self._kv_cache,
            self._prompt,
            self._generated,
            self._success,
        ]

    def load(self, engine: int, running: int, waiting: int, kv_cache: float) -> None:
        """What the engine core said with its last step."""
        self._running.labels(self._model_name, str(engine)).set(running)
        self._waiting.labels(self._model_name, str(engine)).set(waiting)
        self._kv_cache.labels(self._model_name, str(engine)).set(kv_cache)

    def first_token(self, engine: int, prompt_tokens: int) -> None:
        """A request's prompt was processed."""
        self._prompt.labels(self._model_name, str(engine)).inc(prompt_tokens)

    def tokens(self, engine: int, count: int) -> None:
        """Tokens were generated."""
        self._generated.labels(self._model_name, str(engine)).inc(count)

    def finished(self, engine: int, reason: str) -> None:
        """A request ended."""
        self._success.labels(self._model_name, str(engine), reason).inc()
