"""Which instance runs which rank, and how a group gets from one layout to the next."""

from __future__ import annotations

import pytest
from elasticmoe_coordinator.core.layout import (
    Plan,
    choose,
    plan,
    redundant_experts,
    slots_per_rank,
)
from hypothesis import given
from hypothesis import strategies as st
from support.rules import instance

NAMES = ("a", "b", "c", "d", "e")
experts = st.integers(1, 1024)
layouts = st.lists(st.sampled_from(NAMES), unique=True)


@pytest.mark.parametrize(
    ("num_experts", "min_size", "slots"),
    [(64, 2, 32), (64, 3, 22), (8, 4, 2), (8, 5, 2), (7, 8, 1)],
)
def test_all_experts_fit_into_the_slots_of_the_smallest_size(num_experts, min_size, slots):
    assert slots_per_rank(num_experts, min_size) == slots


@given(num_experts=experts, min_size=st.integers(2, 64))
def test_slots_are_no_more_than_the_smallest_size_needs(num_experts, min_size):
    slots = slots_per_rank(num_experts, min_size)
    assert slots * min_size >= num_experts > (slots - 1) * min_size


@given(num_experts=experts, min_size=st.integers(2, 32), more=st.integers(0, 64))
def test_experts_divide_at_every_size(num_experts, min_size, more):
    size = min_size + more
    redundant = redundant_experts(num_experts, slots_per_rank(num_experts, min_size), size)
    assert redundant >= 0
    assert (num_experts + redundant) % size == 0


@given(
    num_experts=experts,
    min_size=st.integers(2, 32),
    before=st.integers(0, 32),
    after=st.integers(0, 32),
)
def test_a_joiner_is_told_what_the_engines_compute_themselves(num_experts, min_size, before, after):
    """vLLM: (experts + redundant) * new // old - experts."""
    slots = slots_per_rank(num_experts, min_size)
    old, new = min_size + before, min_size + after
    present = redundant_experts(num_experts, slots, old)
    computed = (num_experts + present) * new // old - num_experts
    assert redundant_experts(num_experts, slots, new) == computed


def test_redundancy_is_never_negative_while_the_slots_are_not_known():
    assert redundant_experts(64, 0, 2) == 0


def test_ordinals_give_the_ranks():
    crowd = [instance("b", 1, ordinal=2), instance("a", 2, ordinal=0), instance("c", 3, ordinal=1)]
    assert choose(crowd, ["b"], 3) == ["a", "c", "b"]


def test_ordinals_are_numbers():
    crowd = [instance(f"h-{number}", number + 1, ordinal=number) for number in (10, 9, 2)]
    assert choose(crowd, [], 3) == ["h-2", "h-9", "h-10"]


def test_a_gap_between_ordinals_leaves_ranks_dense():
    crowd = [instance("a", 1, ordinal=0), instance("c", 2, ordinal=2), instance("d", 3, ordinal=3)]
    assert choose(crowd, [], 2) == ["a", "c"]


def test_without_ordinals_members_keep_their_ranks_and_others_follow_as_they_came():
    crowd = [instance(name, order) for order, name in enumerate("abcd")]
    assert choose(crowd, ["d", "b"], 4) == ["d", "b", "a", "c"]


def test_a_member_that_is_not_there_leaves_no_gap():
    crowd = [instance(name, order) for order, name in enumerate("abc")]
    assert choose(crowd, ["c", "x", "b"], 3) == ["c", "b", "a"]


def test_one_instance_without_an_ordinal_makes_all_follow_the_order_of_registration():
    crowd = [instance("b", 1, ordinal=1), instance("a", 2, ordinal=0), instance("x", 3)]
    assert choose(crowd, [], 3) == ["b", "a", "x"]


@given(
    size=st.integers(0, 6),
    ordinals=st.one_of(st.none(), st.permutations(range(len(NAMES)))),
    members=layouts,
)
def test_no_more_are_chosen_than_wanted_and_nobody_twice(size, ordinals, members):
    crowd = [
        instance(name, order, ordinal=ordinals[order] if ordinals else None)
        for order, name in enumerate(NAMES)
    ]
    chosen = choose(crowd, members, size)
    assert len(chosen) == len(set(chosen)) == min(size, len(NAMES))
    assert chosen == choose(crowd[::-1], members, size)
    assert chosen == choose(crowd, members, len(NAMES))[:size]


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ("ab", "ab", "none"),
        ("ab", "abc", "scale_up"),
        ("ab", "abcd", "scale_up"),
        ("abcd", "ab", "scale_down"),
        ("abc", "ab", "scale_down"),
        ("abc", "ac", "restart"),
        ("abc", "bc", "restart"),
        ("ab", "ba", "restart"),
        ("ab", "cab", "restart"),
        ("ab", "acb", "restart"),
        ("ab", "ac", "restart"),
        ("ab", "cd", "restart"),
    ],
)
def test_only_the_highest_ranks_join_and_leave(before, after, change):
    assert plan(before, after).change == change


def test_a_restart_says_who_leaves_from_the_middle():
    assert plan("abcd", "ad") == Plan(
        "restart", "b, c leaves from the middle: engines drop only their highest rank"
    )


def test_a_restart_says_that_the_order_is_restored():
    assert plan("bc", "abc") == Plan("restart", "the order of ranks is restored")


@pytest.mark.parametrize("after", ["abc", "a"])
def test_without_elasticity_a_resize_is_a_restart_for_that_reason(after):
    assert plan("ab", after, "a resize failed") == Plan("restart", "a resize failed")


def test_without_elasticity_the_same_layout_needs_nothing():
    assert plan("ab", "ab", "a resize failed") == Plan("none")


@given(before=layouts, after=layouts)
def test_a_resize_in_place_moves_nobody(before, after):
    planned = plan(before, after)
    common = min(len(before), len(after))
    in_place = before[:common] == after[:common]
    assert (planned.change == "none") == (before == after)
    assert (planned.change == "restart") == (not in_place)
    assert bool(planned.reason) == (planned.change == "restart")
    if planned.change == "scale_up":
        assert len(after) > len(before)
    if planned.change == "scale_down":
        assert len(after) < len(before)
