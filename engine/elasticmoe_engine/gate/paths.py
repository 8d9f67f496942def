"""Which paths of vLLM's API server are whose. Pure.

The admin paths are those of vLLM 0.33's routers under `vllm/entrypoints/serve` and
`vllm/entrypoints/rl`: they change the engine for everybody, or tell of it.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["user", "admin", "health", "metrics"]

_ADMIN = frozenset(
    {
        "scale_elastic_ep",
        "is_scaling_elastic_ep",
        "pause",
        "resume",
        "is_paused",
        "abort_requests",
        "inference/v1/abort_requests",
        "get_world_size",
        "sleep",
        "wake_up",
        "is_sleeping",
        "release_kv_cache_memory",
        "collective_rpc",
        "server_info",
        "start_profile",
        "stop_profile",
        "reset_prefix_cache",
        "reset_mm_cache",
        "reset_encoder_cache",
        "init_weight_transfer_engine",
        "shutdown_weight_transfer_engine",
        "start_weight_update",
        "start_draft_weight_update",
        "finish_weight_update",
        "update_weight_version",
        "weight_info",
        "weight_checker",
    }
)
_ADMIN_STARTS = ("fault_tolerance", "update_weights", "init_weights_update_group")


def kind_of(path: str, root_path: str = "") -> Kind:
    """Whose a request with this (decoded) path is.

    More is taken for admin than vLLM's router would take for it: what a router makes of doubled
    slashes, a slash or a newline at the end, or of a root path is not worth depending on.
    """
    plain = _plain(path)
    root = _plain(root_path)
    inner = plain.removeprefix(root + "/") if root else plain
    if _is_admin(plain) or _is_admin(inner):
        return "admin"
    if inner == "health":
        return "health"
    return "metrics" if inner == "metrics" else "user"


def _plain(path: str) -> str:
    parts = (part.strip() for part in path.split("/"))
    return "/".join(part for part in parts if part and part != ".")


def _is_admin(plain: str) -> bool:
    return plain in _ADMIN or plain.startswith(_ADMIN_STARTS)
