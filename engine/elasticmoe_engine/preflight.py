"""Checks of an instance before any running rank is told of it. The rules are in `run`, in order.

A joiner gets its weights from peers, so it would join well with unreadable files and break the
group's next start: everything that a start needs is looked at.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elasticmoe_engine import model
from elasticmoe_engine.command import flags_that_differ

MIN_VERSION = (0, 33)
"""The first vLLM with elastic EP behind an external load balancer."""
CONNECT_LIMIT_S = 3.0
_MIB = 1 << 20


@dataclass(frozen=True)
class Instance:
    """What this instance is. folder: None when the model's files are not here yet.

    version, num_experts: "" and -1 when not known. parallel: GPUs a rank. idle: no engine here.
    """

    warm: bool
    warm_error: str
    version: str
    model: str
    folder: Path | None
    num_experts: int
    fingerprint: str
    flags: str
    parallel: int = 1
    idle: bool = True


@dataclass(frozen=True)
class Group:
    """Fields as in the protocol's PreflightSpec; "" and 0 are not compared."""

    slots: int
    master_address: str
    master_probe_port: int
    engine_version: str
    model: str
    fingerprint: str
    flags: str

    @classmethod
    def from_json(cls, body: Any) -> Group:
        """Read a request's body. Raises ValueError."""
        try:
            return cls(
                slots=int(body.get("slots", 0)),
                master_address=str(body.get("master_address", "")),
                master_probe_port=int(body.get("master_probe_port", 0)),
                engine_version=str(body.get("engine_version", "")),
                model=str(body.get("model", "")),
                fingerprint=str(body.get("fingerprint", "")),
                flags=str(body.get("flags", "")),
            )
        except (AttributeError, TypeError, ValueError):
            raise ValueError("send a PreflightSpec as a JSON object") from None


def release(version: str) -> tuple[int, ...]:
    """The numbers at the beginning of a version: (0, 33, 1) of "0.33.1rc2+cu130"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def too_old(version: str) -> str:
    """Why this vLLM can't be used, "" when it can."""
    if version and release(version) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        return f"vLLM {version} is too old for elastic EP: use an image with vLLM {wanted} or newer"
    return ""


def no_moe(name: str, num_experts: int) -> str:
    """Why this model can't be used, "" when it can or it is not known."""
    if num_experts == 0:
        return f"{name} has no routed experts: elastic EP needs a Mixture-of-Experts model"
    return ""


def run(
    instance: Instance,
    group: Group,
    reach: Callable[[str, int], str],
    free_bytes: Callable[[int], int | None],
) -> str:
    """The first thing that is wrong, in one line that says what to do; "" when nothing is.

    reach: (host, port) -> why not. free_bytes: GPUs a rank -> bytes free on each, None unknown.
    """
    return next((reason for reason in _reasons(instance, group, reach, free_bytes) if reason), "")


def _reasons(
    instance: Instance,
    group: Group,
    reach: Callable[[str, int], str],
    free_bytes: Callable[[int], int | None],
) -> Iterator[str]:
    if not instance.warm:
        yield instance.warm_error or "the engine's modules are still being imported: wait"
    yield too_old(instance.version)
    ours, theirs = instance.version, group.engine_version
    if ours and theirs and ours != theirs:
        yield f"vLLM {ours} here, {theirs} in the group: start this instance with the same image"
    yield no_moe(instance.model, instance.num_experts)
    if group.model and group.model != instance.model:
        yield f"model {instance.model} here, {group.model} in the group: start it with that one"
    if group.fingerprint and group.fingerprint != instance.fingerprint:
        differ = flags_that_differ(instance.flags, group.flags) or "flags differ"
        yield f"other flags than the group's ({differ}): start this instance with the same flags"
    if group.master_address and group.master_probe_port:
        yield reach(group.master_address, group.master_probe_port)
    if instance.folder is not None:
        yield _weights(instance, group, instance.folder, free_bytes)


def _weights(
    instance: Instance, group: Group, folder: Path, free_bytes: Callable[[int], int | None]
) -> str:
    try:
        files = model.open_weights(folder)
    except model.ModelError as error:
        return str(error)
    known = group.slots > 0 and instance.num_experts > 0 and instance.idle
    size = model.size_of(files) if known else None
    if size is None:
        return ""
    needed = size.bytes_per_rank(group.slots, instance.num_experts) // instance.parallel
    free = free_bytes(instance.parallel)
    if free is None or free >= needed:
        return ""
    return (
        f"{needed // _MIB} MiB of weights a GPU for {group.slots} expert slots, "
        f"{free // _MIB} MiB free: free the GPU, or set a larger minimum of ranks"
    )


def reach(host: str, port: int) -> str:
    """Why rank 0's launcher can't be reached, "" when it can."""
    try:
        socket.create_connection((host, port), CONNECT_LIMIT_S).close()
    except OSError as error:
        return (
            f"rank 0's launcher at {host}:{port} can't be reached ({error}): "
            "allow all TCP among the group's instances"
        )
    return ""


def free_gpu_bytes(count: int) -> int | None:
    """Bytes free on the fullest of the first `count` visible GPUs; None where nobody can say."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible:
        command += ["-i", ",".join(visible.split(",")[:count])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        free = [int(line) for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return min(free[:count]) * _MIB if free else None
