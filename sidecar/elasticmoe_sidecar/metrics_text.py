"""Reads one engine's series out of vLLM's metrics.

After a scale-up vLLM registers its series for all engines of the group, all but the own at zero, so
only those with the own rank in the label `engine` count.
"""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_protocol.messages import Load
from prometheus_client.parser import text_string_to_metric_families

_WAITING = "vllm:num_requests_waiting"
_RUNNING = "vllm:num_requests_running"
_KV_CACHE = "vllm:kv_cache_usage_perc"
_TOKENS = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")


@dataclass(frozen=True)
class EngineMetrics:
    """Load of one engine, and the tokens that it has read and written since its series began."""

    load: Load
    tokens: int


def read(text: str, rank: int) -> EngineMetrics:
    """The metrics of engine `rank`. Raises ValueError when `text` is not Prometheus' text."""
    wanted = {_WAITING, _RUNNING, _KV_CACHE, *_TOKENS}
    values = dict.fromkeys(wanted, 0.0)
    # Most of vLLM's text is histograms; parsing only our lines keeps the sidecar's use of CPU low.
    lines = "\n".join(line for line in text.splitlines() if line.startswith(tuple(wanted)))
    for family in text_string_to_metric_families(lines + "\n"):
        for sample in family.samples:
            if sample.name in wanted and sample.labels.get("engine") == str(rank):
                values[sample.name] += sample.value
    load = Load(waiting=values[_WAITING], running=values[_RUNNING], kv_cache=values[_KV_CACHE])
    return EngineMetrics(load=load, tokens=int(sum(values[name] for name in _TOKENS)))
