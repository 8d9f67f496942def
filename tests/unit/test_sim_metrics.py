from elasticmoe_sim.metrics import Metrics
from prometheus_client import CollectorRegistry, generate_latest


def lines(registry: CollectorRegistry) -> list[str]:
    return [one for one in generate_latest(registry).decode().splitlines() if one[0] != "#"]


def test_series_carry_vllms_names_and_labels() -> None:
    registry = CollectorRegistry()
    metrics = Metrics("m", registry)
    metrics.register([1])
    metrics.first_token(1, 7)
    metrics.tokens(1, 2)
    metrics.load(1, 3, 4, 0.5)
    metrics.finished(1, "length")
    found = lines(registry)
    for series in (
        'vllm:num_requests_running{engine="1",model_name="m"} 3.0',
        'vllm:num_requests_waiting{engine="1",model_name="m"} 4.0',
        'vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5',
        'vllm:prompt_tokens_total{engine="1",model_name="m"} 7.0',
        'vllm:generation_tokens_total{engine="1",model_name="m"} 2.0',
        'vllm:request_success_total{engine="1",finished_reason="length",model_name="m"} 1.0',
        'vllm:request_success_total{engine="1",finished_reason="abort",model_name="m"} 0.0',
    ):
        assert series in found


def test_a_scale_up_registers_all_engines_from_zero() -> None:
    registry = CollectorRegistry()
    metrics = Metrics("m", registry)
    metrics.register([0])
    metrics.tokens(0, 5)
    metrics.register(range(3))
    found = lines(registry)
    for engine in range(3):
        assert f'vllm:generation_tokens_total{{engine="{engine}",model_name="m"}} 0.0' in found
