"""The process-local flags of an engine under a gate, as vLLM's own module has them."""

scaling = False
retired = False


def get_scaling_elastic_ep() -> bool:
    return scaling


def get_elastic_ep_rank_retired() -> bool:
    return retired
