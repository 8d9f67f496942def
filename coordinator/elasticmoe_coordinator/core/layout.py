"""Which instance runs which rank, and what it takes to get from one layout to the next. Pure.

An engine can only drop its highest ranks and only gain ranks above them (vLLM), so a resize in
place needs one layout to be the beginning of the other. Everything else is a planned warm restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elasticmoe_coordinator.core.members import Instance, place

Change = Literal["none", "scale_up", "scale_down", "restart"]


def slots_per_rank(num_experts: int, min_size: int) -> int:
    """Expert slots of each rank, fixed for a group's life: all experts fit at the smallest size."""
    return -(-num_experts // min_size)


def redundant_experts(num_experts: int, slots: int, size: int) -> int:
    """`num_redundant_experts` at this size: never negative, always divisible (slots * size - E)."""
    return max(0, slots * size - num_experts)


def choose(candidates: Sequence[Instance], members: Sequence[str], size: int) -> list[str]:
    """At most `size` candidates in rank order.

    With ordinals rank = ordinal order. Without, members keep their ranks and others follow in the
    order in which they registered.
    """
    if all(candidate.facts.ordinal is not None for candidate in candidates):
        ordered = sorted(candidates, key=place)
    else:
        rank = {name: number for number, name in enumerate(members)}
        ordered = sorted(candidates, key=lambda c: (rank.get(c.name, len(rank)), c.order))
    return [candidate.name for candidate in ordered[:size]]


@dataclass(frozen=True)
class Plan:
    """How to get to a layout. reason: why it has to be a restart."""

    change: Change
    reason: str = ""


def plan(members: Sequence[str], wanted: Sequence[str], inelastic_reason: str = "") -> Plan:
    """What brings the group from `members` to `wanted` (instances in rank order)."""
    before, after = list(members), list(wanted)
    if before == after:
        return Plan("none")
    if before[: len(after)] == after:
        change = Plan("scale_down")
    elif after[: len(before)] == before:
        change = Plan("scale_up")
    else:
        gone = [name for name in before if name not in after]
        if gone:
            reason = (
                f"{', '.join(gone)} leaves from the middle: engines drop only their highest rank"
            )
        else:
            reason = "the order of ranks is restored"
        return Plan("restart", reason)
    if inelastic_reason:
        return Plan("restart", inelastic_reason)
    return change
