"""How one rank takes part in the start and in the resizes of its group.

The choreography is that of vLLM 0.33 with an external load balancer: every old rank is told, rank 0
publishes an epoch and opens the handshake for the joiners, all get ready (prepare), all switch
(commit). What one rank has to know of the others it reads in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from uuid import uuid4

from elasticmoe_sim import flags
from elasticmoe_sim.client import EngineClient
from elasticmoe_sim.config import Config
from elasticmoe_sim.faults import Faults
from elasticmoe_sim.metrics import Metrics
from elasticmoe_sim.store import DIE, StoreClient

logger = logging.getLogger("elasticmoe_sim")

EPOCH = "current_epoch"
HANDSHAKE = "handshake"


@dataclass(frozen=True)
class _Operation:
    """One resize as this rank sees it."""

    epoch: str
    old: int
    new: int

    def key(self, *parts: str | int) -> str:
        return "/".join([self.epoch, *map(str, parts)])

    def keys(self, name: str, ranks: range) -> list[str]:
        return [self.key(name, rank) for rank in ranks]

    @property
    def scale_up(self) -> bool:
        return self.new > self.old


class JoinError(RuntimeError):
    """A joiner did not get into the group."""


class Group:
    """This rank's place in its group."""

    def __init__(
        self,
        config: Config,
        store: StoreClient,
        client: EngineClient,
        metrics: Metrics,
        faults: Faults,
    ) -> None:
        self._config = config
        self._store = store
        self._client = client
        self._metrics = metrics
        self._faults = faults
        self._redundant = config.redundant_experts
        self._lock = asyncio.Lock()
        self._reconfiguring = False
        self._last_epoch: str | None = None
        self._getting_ready: asyncio.Task[None] | None = None

    # --- start ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine core together with the other ranks of a new group."""
        await self._store.set(f"up/{self._config.rank}")
        ranks = range(self._config.size)
        limit = self._config.timing.start_limit_s
        await self._store.wait([f"up/{r}" for r in ranks], timeout=limit)
        await self._client.start()
        self._client.send("join")

    async def join(self) -> None:
        """Shake hands with rank 0, get ready and switch with the old ranks; raises JoinError.

        The handshake is open only during an operation; a joiner that comes earlier waits for it.
        """
        rank, limit = self._config.rank, self._config.timing.limit_s
        try:
            logger.info("joiner %d waits for its handshake", rank)
            epoch = (await self._store.wait([HANDSHAKE], timeout=limit))[HANDSHAKE]
            bootstrap = await self._store.get(f"{epoch}/bootstrap") or ""
            operation = _Operation(epoch, *map(int, bootstrap.split(">")))
            if not operation.old <= rank < operation.new:
                await self._store.set(operation.key("unexpected"), str(rank))
            logger.info("joiner %d shakes hands in operation %s", rank, epoch)
            again = await self._store.get(operation.key("hello", rank)) is not None
            await self._store.set(operation.key("hello", rank))
            await self._client.start()
            if again:  # a second HELLO is answered, but its place in the bootstrap is taken
                await asyncio.sleep(limit)
                raise TimeoutError
            await self._get_ready(operation)
            completed = operation.key("completed")
            await self._store.wait([operation.key("phase", "committing")], timeout=limit)
            await self._store.set(operation.key("switching", rank))
            await self._store.wait([completed], timeout=self._config.timing.commit_limit_s)
        except TimeoutError:
            raise JoinError("Timed out waiting to join the group") from None
        self._last_epoch = epoch
        self._client.vllm_config.parallel_config.data_parallel_size = operation.new
        self._client.send("join")

    # --- status --------------------------------------------------------------------------------

    async def status(self) -> dict[str, str | int | None]:
        """What `/is_scaling_elastic_ep` says; raises ConnectionError without rank 0."""
        epoch = await self._store.get(EPOCH)
        status: dict[str, str | int | None] = {
            "phase": "idle",
            "epoch": epoch,
            "error": None,
            "requested_data_parallel_size": None,
        }
        if epoch is None:
            return status
        error = await self._store.get(f"{epoch}/error")
        bootstrap = await self._store.get(f"{epoch}/bootstrap") or ""
        status["requested_data_parallel_size"] = int(bootstrap.partition(">")[2])
        status["error"] = error
        if error is not None:
            status["phase"] = "failed"
        elif await self._store.get(f"{epoch}/completed") is not None:
            status["phase"] = "completed"
        elif await self._store.get(f"{epoch}/phase/committing") is not None:
            status["phase"] = "committing"
        else:
            status["phase"] = "preparing"
        return status

    # --- resize --------------------------------------------------------------------------------

    async def scale(self, target: int) -> None:
        """Take part in a resize to `target` ranks.

        Raises ValueError (bad target), TimeoutError (prepare took too long) and RuntimeError.
        """
        async with self._lock:
            parallel = self._client.vllm_config.parallel_config
            if target == parallel.data_parallel_size:
                return
            operation = await self._prepare(parallel.data_parallel_size, target)
            if operation.scale_up:
                self._metrics.register(range(target))
            await self._commit(operation)

    def _redundant_at(self, old: int, new: int) -> int:
        experts = self._config.num_experts
        return (experts + self._redundant) * new // old - experts

    async def _prepare(self, old: int, new: int) -> _Operation:
        rank, limit = self._config.rank, self._config.timing.limit_s
        if new > self._config.max_size:
            raise ValueError(
                f"Cannot scale to data_parallel_size {new}; "
                f"--elastic-ep-max-dp-size is {self._config.max_size}."
            )
        if self._redundant_at(old, new) < 0:
            raise ValueError(
                f"Cannot scale external Elastic EP from DP size {old} to {new}: "
                "the target topology cannot retain all model experts."
            )
        operation = await (self._publish(old, new) if rank == 0 else self._follow(old, new))
        self._last_epoch = operation.epoch
        try:
            if operation.scale_up or rank < new:
                if self._reconfiguring or "refuse" in self._faults:
                    raise RuntimeError("Elastic EP reconfiguration is already active")
                self._reconfiguring = True
                if "fail_prepare" in self._faults:
                    raise RuntimeError("the engine core failed to prepare")
                self._getting_ready = asyncio.create_task(self._get_ready(operation))
            await self._wait_for_ready(operation, limit)
        except BaseException as error:
            await self._fail(operation, error)
            raise
        finally:
            if rank == 0:
                await self._store.delete(HANDSHAKE)
        return operation

    async def _publish(self, old: int, new: int) -> _Operation:
        """Rank 0 makes an epoch known and opens the handshake."""
        current = await self._store.get(EPOCH)
        if current is not None:
            ended = [f"{current}/error", f"{current}/completed"]
            if not any([await self._store.get(key) for key in ended]):
                raise RuntimeError(
                    "Another external Elastic EP scaling operation is already active."
                )
        operation = _Operation(uuid4().hex, old, new)
        await self._store.set(operation.key("bootstrap"), f"{old}>{new}")
        await self._store.set(EPOCH, operation.epoch)
        await self._store.set(f"after/{current}", operation.epoch)
        if operation.scale_up:
            await self._store.set(HANDSHAKE, operation.epoch)
        return operation

    async def _follow(self, old: int, new: int) -> _Operation:
        """The others wait for rank 0's epoch; raises TimeoutError."""
        previous = self._last_epoch
        current = await self._store.get(EPOCH)
        if current is not None and await self._store.get(f"{current}/completed") is not None:
            previous = current
        if current is None or current == previous:
            after = f"after/{previous}"
            try:
                found = await self._store.wait([after], timeout=self._config.timing.limit_s)
            except TimeoutError:
                raise TimeoutError(
                    "Timed out waiting for rank 0 to publish external Elastic EP "
                    "bootstrap metadata."
                ) from None
            current = found[after]
        operation = _Operation(current, old, new)
        bootstrap = await self._store.get(operation.key("bootstrap"))
        error = await self._store.get(operation.key("error"))
        if error is not None:
            self._last_epoch = current
            raise RuntimeError(error)
        if bootstrap != f"{old}>{new}":
            raise RuntimeError(
                "A different external Elastic EP scaling operation is already in progress for "
                f"target dp size {str(bootstrap).partition('>')[2]}."
            )
        return operation

    async def _get_ready(self, operation: _Operation) -> None:
        """What the engine core does in the background: it bootstraps the new group with the others.

        Everybody has to come; a joiner that stops in the middle takes the old engines with it.
        """
        rank, limit = self._config.rank, self._config.timing.limit_s
        await self._store.set(operation.key("bootstrapping", rank))
        with contextlib.suppress(TimeoutError, ConnectionError):
            await self._store.wait(
                operation.keys("bootstrapping", range(operation.new)), timeout=limit
            )
            if self._config.joiner and "hang_joiner" in self._faults:
                await asyncio.sleep(limit)
                await self._store.set(DIE)
                raise JoinError("stuck half-way through the bootstrap")
            await asyncio.sleep(self._config.timing.prepare_s * self._faults.slowness)
            await self._store.set(operation.key("ready", rank))

    async def _wait_for_ready(self, operation: _Operation, limit: float) -> None:
        trouble = [operation.key("error")]
        if self._config.rank == 0:
            trouble.append(operation.key("unexpected"))
        else:  # rank 0's clock decides; the others hear of it
            limit += 5.0
        try:
            found = await self._store.wait(
                operation.keys("ready", range(operation.new)), trouble, timeout=limit
            )
        except TimeoutError:
            raise TimeoutError(
                "Timed out waiting for external Elastic EP ranks to prepare."
            ) from None
        if operation.key("error") in found:
            raise RuntimeError(
                "External Elastic EP scaling failed while waiting for ranks to prepare: "
                + found[operation.key("error")]
            )
        if operation.key("unexpected") in found:
            raise RuntimeError(
                "Received scale-up handshake from unexpected dp rank "
                + found[operation.key("unexpected")]
            )

    async def _commit(self, operation: _Operation) -> None:
        rank, parallel = self._config.rank, self._client.vllm_config.parallel_config
        retires = rank >= operation.new
        flags.set_scaling_elastic_ep(True)
        if retires:
            flags.set_elastic_ep_rank_retired(True)
        try:
            await self._switch(operation, retires)
        except BaseException as error:
            flags.set_elastic_ep_rank_retired(False)
            await self._fail(operation, error)
            raise  # the 503 gate stays set for ever: the topology is unknown
        self._redundant = self._redundant_at(operation.old, operation.new)
        parallel.data_parallel_size = operation.new
        self._reconfiguring = False
        flags.set_scaling_elastic_ep(False)
        self._client.send("leave" if retires else "resume")

    async def _switch(self, operation: _Operation, retires: bool) -> None:
        rank, timing = self._config.rank, self._config.timing
        old, everybody = range(operation.old), range(max(operation.old, operation.new))

        async def barrier(keys: list[str], text: str) -> None:
            try:
                found = await self._store.wait(
                    keys, [operation.key("error")], timeout=timing.commit_limit_s
                )
            except TimeoutError:
                raise TimeoutError(text) from None
            if operation.key("error") in found:
                raise RuntimeError(found[operation.key("error")])

        await self._store.set(operation.key("commit_ready", rank))
        await barrier(
            operation.keys("commit_ready", old),
            "Timed out waiting for external Elastic EP drains.",
        )
        await self._store.set(operation.key("phase", "committing"))
        self._client.send("pause", "abort" if retires else "keep")
        if "fail_commit" in self._faults:
            raise RuntimeError("the engine core failed to commit")
        await self._store.set(operation.key("switching", rank))
        text = "Timed out waiting for local external Elastic EP reconfiguration to finish."
        await barrier(operation.keys("switching", everybody), text)
        await asyncio.sleep(timing.commit_s * self._faults.slowness)
        await self._store.set(operation.key("finished", rank))
        await barrier(operation.keys("finished", old), text)
        if rank == 0:
            await self._store.set(operation.key("completed"))

    async def _fail(self, operation: _Operation, error: BaseException) -> None:
        logger.error("Elastic EP operation %s failed: %s", operation.epoch, error)
        with contextlib.suppress(ConnectionError):
            await self._store.set(operation.key("error"), str(error) or type(error).__name__)
