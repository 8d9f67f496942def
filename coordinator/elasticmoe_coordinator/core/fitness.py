"""Why an instance can't serve in a group. Each reason is one line that says what to do. Pure."""

from __future__ import annotations

import re
import shlex

from elasticmoe_coordinator.core.members import Instance

MIN_VERSION = (0, 33)
WARM_LIMIT = 180.0
"""Seconds after which an instance is taken although its engine's modules are not imported: its
launcher fell back to a cold start."""


def objection(instance: Instance, reference: Instance | None, now: float) -> str:
    """The first thing that is wrong, "" when nothing is. reference: whom it has to agree with."""
    facts, report = instance.facts, instance.report
    if report is None:
        return "its first report is awaited"
    version = tuple(int(number) for number in re.findall(r"\d+", facts.engine_version)[:2])
    if version and version < MIN_VERSION:
        return f"vLLM {facts.engine_version} is too old for elastic EP: use 0.33 or newer"
    if facts.num_experts == 0:
        return (
            f"{facts.model or 'its model'} has no routed experts: elastic EP needs a "
            "Mixture-of-Experts model"
        )
    if report.error:
        return report.error
    if facts.num_experts < 0:
        return "the number of experts of its model is not known: check that its model can be read"
    if reference is not None and (differs := difference(instance, reference)):
        return differs
    if not report.warm and now - instance.registered_at < WARM_LIMIT:
        return "its engine's modules are being imported"
    return ""


def difference(instance: Instance, reference: Instance) -> str:
    """Why an instance can't be in one group with another one, "" when it can."""
    ours, theirs = instance.facts, reference.facts
    if ours.engine_version != theirs.engine_version:
        return (
            f"it runs vLLM {ours.engine_version}, {reference.name} runs {theirs.engine_version}: "
            "start it with the same image"
        )
    if ours.model != theirs.model or ours.num_experts != theirs.num_experts:
        return (
            f"it serves {ours.model} ({ours.num_experts} experts), {reference.name} serves "
            f"{theirs.model} ({theirs.num_experts}): start it with the same model"
        )
    if ours.command and theirs.command and ours.command != theirs.command:
        known = f"its command is {ours.command}, {reference.name}'s is {theirs.command}"
        if upcoming(reference) == ours.command:
            return f"{known} until the next restart: ask for one"
        return f"{known}: wait until its file has the same"
    if ours.fingerprint != theirs.fingerprint:
        difference = _flags(ours.flags, theirs.flags)
        return f"its flags differ from {reference.name}'s ({difference}): start it with the same"
    return ""


def kind(instance: Instance) -> tuple[object, ...]:
    """What instances of one group have in common."""
    facts = instance.facts
    same = (facts.engine_version, facts.model, facts.num_experts)
    return (*same, facts.fingerprint, facts.command)


def upcoming(instance: Instance) -> str:
    """Revision of the command with which its next engine starts."""
    facts = instance.facts
    return facts.command if facts.next_problem else facts.next_command or facts.command


def too_few_slots(instance: Instance, slots: int, size: int) -> str:
    """Why its model does not fit into a group of this size, "" when it does or nothing is known."""
    facts = instance.facts
    if not slots or facts.num_experts <= slots * size:
        return ""
    return (
        f"{facts.model} has {facts.num_experts} experts, {size} ranks with {slots} slots hold "
        f"{slots * size}: slots are fixed for a group's life, start a new group for this model"
    )


def _flags(ours: str, theirs: str) -> str:
    """Flags that only one side has."""
    mine, other = set(shlex.split(ours)), set(shlex.split(theirs))
    only = [f"only here: {shlex.join(sorted(mine - other))}"] if mine - other else []
    only += [f"only there: {shlex.join(sorted(other - mine))}"] if other - mine else []
    return "; ".join(only)[:300] or "see its launcher's log"
