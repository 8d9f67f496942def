"""The rules of a preflight: each failure is one line that says what to do."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from elasticmoe_engine import preflight
from elasticmoe_engine.preflight import Group, Instance


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    header = {"experts.": {"data_offsets": [0, 1600 << 20]}}
    names = {"m.experts.0.w": header["experts."], "rest": {"data_offsets": [0, 100 << 20]}}
    raw = json.dumps(names).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    return tmp_path


@pytest.fixture
def instance(folder: Path) -> Instance:
    return Instance(
        warm=True,
        warm_error="",
        version="0.33.0",
        model="/models/m",
        folder=folder,
        num_experts=16,
        fingerprint="f1",
        flags="--dtype=float32",
    )


GROUP = Group(
    slots=12,
    master_address="10.0.0.1",
    master_probe_port=9000,
    engine_version="0.33.0",
    model="/models/m",
    fingerprint="f1",
    flags="--dtype=float32",
)


def reachable(host: str, port: int) -> str:
    return ""


def check(instance: Instance, group: Group = GROUP, free_mib: int | None = 10_000) -> str:
    free = None if free_mib is None else free_mib << 20
    reason = preflight.run(instance, group, reachable, lambda _: free)
    assert "\n" not in reason
    return reason


def test_all_is_well(instance: Instance) -> None:
    assert check(instance) == ""


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"warm": False}, "still being imported: wait"),
        ({"warm": False, "warm_error": "no torch"}, "no torch"),
        ({"version": "0.32.1"}, "too old for elastic EP: use an image with vLLM 0.33 or newer"),
        ({"version": "0.34.0"}, "0.34.0 here, 0.33.0 in the group: start this instance with"),
        ({"num_experts": 0}, "needs a Mixture-of-Experts model"),
        ({"model": "other"}, "model other here, /models/m in the group"),
        (
            {"fingerprint": "f2", "flags": "--dtype=float16"},
            "only here: --dtype=float16; only in the group: --dtype=float32",
        ),
    ],
)
def test_a_joiner_that_does_not_fit(instance: Instance, change: dict[str, Any], text: str) -> None:
    assert text in check(replace(instance, **change))


def test_what_is_not_known_is_not_compared(instance: Instance) -> None:
    assert check(replace(instance, version="", num_experts=-1)) == ""
    nothing = Group.from_json({"check": "c"})
    assert check(instance, nothing) == ""


def test_rank_0_must_be_reachable(instance: Instance) -> None:
    asked = []

    def unreachable(host: str, port: int) -> str:
        asked.append((host, port))
        return "no route"

    reason = preflight.run(instance, GROUP, unreachable, lambda _: None)
    assert (reason, asked) == ("no route", [("10.0.0.1", 9000)])


def test_memory_for_the_slots(instance: Instance) -> None:
    # 1600 MiB of experts * 12 of 16 slots + 100 MiB
    assert "1300 MiB of weights a GPU for 12 expert slots, 1299 MiB free" in check(
        instance, free_mib=1299
    )
    assert check(instance, free_mib=1300) == ""
    assert check(instance, free_mib=None) == ""
    assert check(replace(instance, parallel=2), free_mib=650) == ""
    assert check(replace(instance, idle=False), free_mib=0) == ""


def test_weights_must_be_there(instance: Instance, folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    assert "no weight files" in check(instance)
    assert check(replace(instance, folder=None)) == ""


def test_reach(unused_tcp_port: int) -> None:
    assert "allow all TCP" in preflight.reach("127.0.0.1", unused_tcp_port)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("0.33.0", (0, 33, 0)), ("0.33.1rc1.dev3+gabc", (0, 33, 1)), ("1.0", (1, 0)), ("dev", ())],
)
def test_versions(version: str, numbers: tuple[int, ...]) -> None:
    assert preflight.release(version) == numbers


def test_a_group_that_cannot_be_read() -> None:
    for body in (None, [], {"slots": "many"}):
        with pytest.raises(ValueError, match="PreflightSpec"):
            Group.from_json(body)
