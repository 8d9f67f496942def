"""What vLLM 0.33's elastic EP needs to run on CPU over gloo.

The data plane is replaced: communicators, expert kernel, EPLB's timing, warm-up. The control plane
(HTTP, middleware, `external_elastic_ep`) is vLLM's own; `elastic_state` gets a store client of its
own and a pause while it polls.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

_POLL_PAUSE_S = 0.02
# gloo's own words, and those of torch's logger that fails while it reports them
_PEER_GONE = re.compile("onnection (closed|reset|refused)|is not initialized in the world group")


@functools.cache
def apply() -> None:
    """Patch this process, once."""
    _replace_communicators()
    _teach_experts_their_place()
    _load_model_with_eplb()
    _replace_eplb_transfer()
    _skip_what_needs_a_gpu()
    _let_engine_and_worker_share_a_process()
    _hang_when_a_peer_is_gone()


def _exchange(group: Any, sends: list[Any], receives: list[Any]) -> None:
    """Point to point over a stateless gloo group, which torch.distributed.isend does not know."""
    works = [group.recv([tensor], peer, 0) for tensor, peer in receives]
    works += [group.send([tensor.contiguous()], peer, 0) for tensor, peer in sends]
    for work in works:
        work.wait()


def _replace_communicators() -> None:
    import vllm.distributed.stateless_coordinator as coordinator
    from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )

    class GlooCommunicator(DeviceCommunicatorBase):
        """What CudaCommunicator is to the elastic groups."""

        def __init__(
            self,
            cpu_group: Any,
            device: Any = None,
            device_group: Any = None,
            unique_name: str = "",
            global_ranks: Any = None,
            global_world_size: Any = None,
            tcp_store_group: Any = None,
            use_all2all: bool = False,
        ) -> None:
            super().__init__(
                cpu_group,
                device,
                device_group,
                unique_name,
                global_ranks,
                global_world_size,
                use_all2all,
            )
            if self.use_all2all:
                self.all2all_manager = AgRsAll2AllManager(cpu_group, tcp_store_group)

        def all_gatherv(self, input_: Any, dim: int = 0, sizes: Any = None) -> Any:
            if not isinstance(input_, torch.Tensor):
                return [self.all_gatherv(one, dim, sizes) for one in input_]
            sizes = sizes or [input_.shape[0]] * self.world_size
            padded = input_.new_zeros((max(sizes), *input_.shape[1:]))  # gloo: equal sizes only
            padded[: input_.shape[0]] = input_
            parts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(parts, padded, group=self.cpu_group)
            return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

        def reduce_scatterv(self, input_: Any, dim: int = -1, sizes: Any = None) -> Any:
            total = input_.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=self.cpu_group)
            sizes = sizes or [total.shape[0] // self.world_size] * self.world_size
            return total.split(sizes)[self.rank_in_group].contiguous()

        def batch_isend_irecv(self, ops: list[Any]) -> None:
            sends = [(op.tensor, op.group_peer) for op in ops if op.op is dist.isend]
            receives = [(op.tensor, op.group_peer) for op in ops if op.op is dist.irecv]
            _exchange(self.cpu_group, sends, receives)

        def dispatch_router_logits(self, *args: Any, **kwargs: Any) -> Any:
            return self.all2all_manager.dispatch_router_logits(*args, **kwargs)

        def dispatch(self, *args: Any, **kwargs: Any) -> Any:
            return self.all2all_manager.dispatch(*args, **kwargs)

        def combine(self, *args: Any, **kwargs: Any) -> Any:
            return self.all2all_manager.combine(*args, **kwargs)

    # The stateless coordinator asserts that the platform's communicator is this very name.
    coordinator.CudaCommunicator = GlooCommunicator
    coordinator.resolve_obj_by_qualname = lambda name: GlooCommunicator


def _teach_experts_their_place() -> None:
    import vllm.model_executor.layers.fused_moe.router.base_router as router
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = CPUUnquantizedExperts.apply

    def apply_local(
        self: Any, *, topk_weights: Any, topk_ids: Any, expert_map: Any, **rest: Any
    ) -> None:
        """The kernel knows no expert_map: give it local ids, and no weight to remote experts."""
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            remote = local < 0
            topk_weights = topk_weights.masked_fill(remote, 0.0)
            topk_ids = local.masked_fill(remote, 0).to(topk_ids.dtype)
        kernel(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **rest)

    CPUUnquantizedExperts.apply = apply_local

    def map_and_record(
        topk_ids: Any,
        expert_load_view: Any,
        logical_to_physical_map: Any,
        logical_replica_count: Any,
        record_enabled: Any,
        num_unpadded_tokens: Any = None,
    ) -> Any:
        """The original is a Triton kernel on CUDA and returns wrong ids elsewhere."""
        if topk_ids.numel() == 0:
            return topk_ids
        ids = topk_ids.long()
        turn = torch.arange(ids.numel()).reshape(ids.shape)
        physical = logical_to_physical_map[ids, turn % logical_replica_count[ids].clamp(min=1)]
        if bool(record_enabled):
            used = physical if num_unpadded_tokens is None else physical[: int(num_unpadded_tokens)]
            used = used[(used >= 0) & (used < expert_load_view.shape[0])].long()
            ones = torch.ones_like(used, dtype=expert_load_view.dtype)
            expert_load_view.index_add_(0, used, ones)
        return physical.to(topk_ids.dtype)

    router.eplb_map_to_physical_and_record = map_and_record


def _load_model_with_eplb() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    # The CPU runner's own load_model sets up no EPLB state.
    CPUModelRunner.load_model = GPUModelRunner.load_model


def _replace_eplb_transfer() -> None:
    import vllm.distributed.eplb.eplb_communicator as communicator
    import vllm.distributed.eplb.eplb_state as state

    class GlooTransfer(communicator.EplbCommunicator):
        """Expert weights over the stateless gloo group; the stock gloo one needs a CUDA stream."""

        def __init__(self, group: Any) -> None:
            self.group = group
            self.sends: list[Any] = []
            self.receives: list[Any] = []

        def add_send(self, tensors: Any, dst_rank: int, expert_id: int) -> None:
            self.sends += [(tensor, dst_rank) for tensor in tensors]

        def add_recv(self, tensors: Any, src_rank: int, expert_id: int) -> None:
            self.receives += [(tensor, src_rank) for tensor in tensors]

        def execute(self) -> None:
            _exchange(self.group, self.sends, self.receives)
            self.sends, self.receives = [], []

    def create(group_coordinator: Any, *_: Any, **__: Any) -> GlooTransfer:
        return GlooTransfer(group_coordinator.cpu_group)

    communicator.create_eplb_communicator = state.create_eplb_communicator = create

    class HostEvent:
        """torch.Event with the elapsed_time that exists on accelerators only."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.at = 0.0

        def record(self, *_: Any) -> None:
            self.at = time.monotonic()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: HostEvent) -> float:
            return (other.at - self.at) * 1000

    rearrange = state.EplbState.rearrange

    def timed_rearrange(self: Any, *args: Any, **kwargs: Any) -> Any:
        stock, torch.Event = torch.Event, HostEvent
        try:
            return rearrange(self, *args, **kwargs)
        finally:
            torch.Event = stock

    state.EplbState.rearrange = timed_rearrange


def _skip_what_needs_a_gpu() -> None:
    import vllm.distributed.elastic_ep.elastic_execute as execute

    executor = execute.ElasticEPScalingExecutor

    def warm_target_groups(self: Any, dp_group: Any, ep_group: Any) -> None:
        """The original runs on a CUDA stream."""
        for group in (dp_group, ep_group):
            dist.all_reduce(torch.zeros(1, dtype=torch.int32), group=group.cpu_group)

    executor._warm_target_groups = warm_target_groups
    # A joiner loads real weights: the CPU kernels prepack them, and dummy loading is refused.
    executor.load_model = lambda self: self.worker.load_model()
    execute.kernel_warmup = lambda *args, **kwargs: None
    execute.unlock_workspace = execute.lock_workspace = lambda: None


def _let_engine_and_worker_share_a_process() -> None:
    import vllm.distributed.elastic_ep.elastic_state as state

    # A TCPStore client admits one call at a time: the engine's background wait() on a client
    # shared with the worker thread would block that for ever.
    state.get_cached_tcp_store_client = functools.lru_cache(maxsize=1)(
        lambda host, port: dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    )

    progress = state.ElasticEPScalingState.progress

    def yielding_progress(self: Any) -> Any:
        """The engine polls this in a busy loop, which starves ranks that share two cores."""
        before = self.state
        result = progress(self)
        if self.state == before:
            time.sleep(_POLL_PAUSE_S)
        return result

    state.ElasticEPScalingState.progress = yielding_progress


def _hang_when_a_peer_is_gone() -> None:
    """Behave as on GPUs (measured there): a step whose peer died never ends and says nothing.

    NCCL waits for ever where gloo notices the closed connection, which would end the engine core.
    """
    from vllm.v1.worker.gpu_worker import Worker

    def hanging(step: Any) -> Any:
        @functools.wraps(step)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return step(self, *args, **kwargs)
            except (RuntimeError, ValueError) as error:
                if not _PEER_GONE.search(str(error)):
                    raise
                print(f"a peer is gone, this rank hangs: {error}", file=sys.stderr, flush=True)
                while True:
                    time.sleep(3600)

        return run

    Worker.execute_model = hanging(Worker.execute_model)
    Worker.execute_dummy_batch = hanging(Worker.execute_dummy_batch)
