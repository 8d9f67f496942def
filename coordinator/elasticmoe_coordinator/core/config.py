"""What a group is told about itself before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["declared", "follow"]
"""declared: somebody PUTs the size. follow: the size is the number of instances present."""

DrainPolicy = Literal["postpone", "abort"]
"""What happens to requests that run past the drain limit: the resize waits, or they are cut."""

LossPolicy = Literal["restart", "none"]
"""What happens after an unplanned loss: the group restarts by itself, or a person decides."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Limits and times of one group. All times are seconds.

    min_size, max_size: DP sizes between which the group moves; vLLM refuses external load balancing
        at one rank, and `max_size` is `--elastic-ep-max-dp-size`.
    size: the first target of a declared group; None waits for one.
    suspect_after: missed heartbeats until an instance is suspect; silence alone loses nobody.
    stall: how long requests may run without any progress in the whole group.
    compile_limit: the same for a rank that has answered nothing yet (first step, compile).
    prepare_limit: must end before vLLM's own 300 s with the drain and 20 s (measured: past those
        the old engines die).
    lame_duck: shortest time from not Ready to closed: endpoints propagate, keep-alive ends (5 s).
    replacement: how long a recovery waits for missing instances before it starts with fewer.
    settle: a `follow` group waits so long for more changes before it acts.
    restart_limit, restart_window: so many unplanned recoveries in so long, then Failed.
    """

    deployment: str
    policy: Policy = "declared"
    min_size: int = 2
    max_size: int = 8
    size: int | None = None
    drain_policy: DrainPolicy = "postpone"
    loss_policy: LossPolicy = "restart"
    heartbeat: float = 0.5
    suspect_after: int = 3
    stall: float = 20.0
    compile_limit: float = 180.0
    preflight_limit: float = 150.0
    start_limit: float = 900.0
    prepare_limit: float = 240.0
    commit_limit: float = 120.0
    drain_timeout: int = 300
    lame_duck: float = 6.0
    replacement: float = 60.0
    settle: float = 2.0
    learn_limit: float = 15.0
    restart_limit: int = 5
    restart_window: float = 1800.0
    backoff: float = 1.0
    backoff_max: float = 60.0
    history: int = 10

    def __post_init__(self) -> None:
        """Raises ValueError with a line that says what to change."""
        if self.min_size < 2:
            raise ValueError(
                f"the smallest size is 2, not {self.min_size}: vLLM refuses external load "
                "balancing with one rank"
            )
        if self.max_size < self.min_size:
            raise ValueError(
                f"max size {self.max_size} is under min size {self.min_size}: raise it"
            )
        if self.size is not None and not self.min_size <= self.size <= self.max_size:
            raise ValueError(
                f"size {self.size} is not between {self.min_size} and {self.max_size}: choose one "
                "that is, or change min and max size"
            )
