"""Who can serve in a group, and what is said of who can't."""

from __future__ import annotations

import dataclasses

import pytest
from elasticmoe_coordinator.core.fitness import WARM_LIMIT, objection
from elasticmoe_coordinator.core.members import Roster
from elasticmoe_protocol.messages import Hello
from support.rules import facts, group, instance, member, until_serving


def judged(*, reference=None, now=0.0, **changes):
    return objection(instance("one", **changes), reference, now)


def test_nothing_is_wrong_with_a_fit_instance():
    assert judged() == ""
    assert judged(reference=instance("other")) == ""


def test_nobody_is_taken_before_the_first_report():
    silent = dataclasses.replace(instance("one"), report=None)
    assert objection(silent, None, 0.0) == "its first report is awaited"


@pytest.mark.parametrize("version", ["0.32.9", "0.9.2", "0.32.0rc1", "0.32.1.dev7+g0123456"])
def test_an_old_engine_is_refused(version):
    line = f"vLLM {version} is too old for elastic EP: use 0.33 or newer"
    assert judged(engine_version=version) == line


@pytest.mark.parametrize(
    "version", ["0.33.0", "0.33.1rc2", "0.34.0.dev3+g01", "0.100.0", "1.0.0", ""]
)
def test_a_new_engine_and_one_of_no_known_version_are_taken(version):
    assert judged(engine_version=version) == ""


def test_a_model_without_experts_is_refused():
    line = "dense has no routed experts: elastic EP needs a Mixture-of-Experts model"
    assert judged(model="dense", num_experts=0) == line


def test_a_model_that_can_not_be_read_is_refused():
    assert "can be read" in judged(num_experts=-1)


def test_what_the_instance_says_itself_comes_before_what_it_does_not_know():
    assert judged(num_experts=-1, error="no such model: mo") == "no such model: mo"


def test_another_version_is_named_with_whom_it_differs_from():
    line = judged(engine_version="0.34.0", reference=instance("other"))
    assert line == "it runs vLLM 0.34.0, other runs 0.33.0: start it with the same image"


@pytest.mark.parametrize("changes", [{"model": "mo"}, {"num_experts": 16}])
def test_another_model_is_named_with_its_experts(changes):
    line = judged(reference=instance("other"), **changes)
    mine = f"{changes.get('model', 'moe')} ({changes.get('num_experts', 8)} experts)"
    assert line == f"it serves {mine}, other serves moe (8): start it with the same model"


def test_other_flags_are_named_on_both_sides():
    line = judged(
        fingerprint="g",
        flags="--dtype=float16 --max-model-len=4096",
        reference=instance("other", flags="--dtype=float16 --max-model-len=8192"),
    )
    assert "other's" in line
    assert "only here: --max-model-len=4096" in line
    assert "only there: --max-model-len=8192" in line
    assert "float16" not in line


def test_a_flag_with_spaces_stays_one():
    spaced = """--eplb-config='{"window_size": 10}'"""
    line = judged(fingerprint="g", flags=spaced, reference=instance("other"))
    assert """only here: '--eplb-config={"window_size": 10}'""" in line


def test_flags_that_differ_in_nothing_that_can_be_told_point_to_the_log():
    line = judged(fingerprint="g", reference=instance("other"))
    assert "its launcher's log" in line


def test_the_reference_does_not_differ_from_itself():
    reference = instance("other")
    assert objection(reference, reference, 0.0) == ""


def test_a_cold_launcher_is_waited_for_and_then_taken():
    assert "being imported" in judged(warm=False, registered_at=10.0, now=10.0)
    assert "being imported" in judged(warm=False, registered_at=10.0, now=9.9 + WARM_LIMIT)
    assert judged(warm=False, registered_at=10.0, now=10.0 + WARM_LIMIT) == ""


def test_a_name_belongs_to_one_incarnation_until_it_is_silent():
    roster = Roster(silence=1.5)

    def hello(incarnation: str, now: float) -> str:
        message = Hello(
            deployment="moe",
            instance="one",
            incarnation=incarnation,
            boot=f"boot of {incarnation}",
            facts=facts(),
        )
        return roster.hello(message, now)

    assert hello("first", 0.0) == ""
    assert "another instance is registered as one" in hello("second", 1.0)
    assert roster.get("one").incarnation == "first"
    assert hello("first", 1.5) == ""
    assert hello("second", 3.5) == ""
    assert roster.get("one").incarnation == "second"
    assert roster.get("one").replaced_at == 3.5


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"engine_version": "0.32.0"}, "too old"),
        ({"engine_version": "0.34.0"}, "same image"),
        ({"model": "other"}, "same model"),
        ({"num_experts": 0}, "Mixture-of-Experts"),
        ({"fingerprint": "g", "flags": "--seed=1"}, "only here: --seed=1"),
    ],
)
def test_who_does_not_fit_does_not_join_and_the_status_says_why(changes, word):
    world = group(2)
    world.add("odd", **changes)
    world.run(2)
    assert world.try_put(3)
    world.run(30)
    status = world.status
    assert (status.size, status.elastic) == (2, True)
    assert word in status.message
    assert word in member(world, "odd").reason
    assert world.hosts["odd"].engine is None
    world.add("h2")
    until_serving(world, 3)
    assert world.hosts["odd"].engine is None
