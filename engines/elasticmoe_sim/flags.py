"""Process-local flags of an elastic resize, under vLLM's own function names.

A gate finds them through the environment variable `ELASTICMOE_ENGINE_STATE`.
"""

_scaling = False
_retired = False


def get_scaling_elastic_ep() -> bool:
    """Whether this API server refuses requests because its engine commits."""
    return _scaling


def set_scaling_elastic_ep(value: bool) -> None:
    """Set at the start of a commit; a failed commit leaves it set for ever."""
    global _scaling
    _scaling = value


def get_elastic_ep_rank_retired() -> bool:
    """Whether this rank has left the group and waits to be stopped."""
    return _retired


def set_elastic_ep_rank_retired(value: bool) -> None:
    """Set before the commit that removes this rank, undone when that fails."""
    global _retired
    _retired = value
