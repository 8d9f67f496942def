"""Which requests only the sidecar may make."""

from __future__ import annotations

import pytest
from elasticmoe_engine.gate.paths import kind_of

ADMIN = [
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/pause",
    "/resume",
    "/collective_rpc",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
    "/update_weights",
    "/init_weight_transfer_engine",
    "/server_info",
    "/start_profile",
    "/abort_requests",
    "/inference/v1/abort_requests",
    "/fault_tolerance/apply",
]


@pytest.mark.parametrize("path", ADMIN)
@pytest.mark.parametrize("trick", ["{}", "{}/", "/{}", "//{}//", "{}\n", " {}", "/.{}"])
def test_admin_paths_are_found_through_tricks(path: str, trick: str) -> None:
    assert kind_of(trick.format(path)) == "admin"


@pytest.mark.parametrize("path", ADMIN)
def test_a_root_path_hides_nothing(path: str) -> None:
    assert kind_of("/proxy" + path, "/proxy") == "admin"
    assert kind_of("/proxy" + path, "/proxy/") == "admin"
    assert kind_of(path, "/proxy") == "admin"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/load_lora_adapter",
        "/tokenize",
        "/pauses",
        "/v1/pause",
        "/ping",
        "/load",
        "/version",
        "/",
    ],
)
def test_the_rest_is_the_users(path: str) -> None:
    assert kind_of(path) == "user"


def test_probes_and_metrics_are_neither() -> None:
    assert kind_of("/health") == kind_of("/proxy/health", "/proxy") == "health"
    assert kind_of("/metrics") == kind_of("/metrics/") == "metrics"
