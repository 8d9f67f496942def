"""What a model's files say."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from elasticmoe_engine import model


def safetensors(path: Path, **tensors: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        offsets = [end, end := end + size]
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": offsets}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * end)


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        ({"num_experts": 128}, 128),
        ({"n_routed_experts": 256, "n_shared_experts": 1}, 256),
        ({"num_local_experts": 8}, 8),
        ({"moe_num_experts": [64, 64]}, 64),
        ({"text_config": {"num_experts": 60}}, 60),
        ({"model_type": "llama"}, 0),
        ({"num_experts": 0}, 0),
        ({"num_experts": None}, 0),
        ([], 0),
    ],
)
def test_experts(config: Any, experts: int) -> None:
    assert model.experts_in(config) == experts


def test_experts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_experts": 16}')
    assert model.count_experts(tmp_path) == 16
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(model.ModelError, match="give the model's folder"):
        model.count_experts(tmp_path)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert model.find_folder(str(tmp_path), {}) == tmp_path


def test_a_name_is_looked_up_in_the_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n")
    for environ in ({"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub")}):
        assert model.find_folder("org/name", environ) == snapshot
        assert model.find_folder("org/name", environ, revision="abc") == snapshot
        assert model.find_folder("org/name", environ, revision="v2") is None
    assert model.find_folder("org/name", {"HF_HOME": str(tmp_path / "x")}) is None
    found = model.find_folder("org/name", {"HF_HOME": "/x"}, download_dir=str(tmp_path / "hub"))
    assert found == snapshot


def test_weight_files_by_index_or_by_name(tmp_path: Path) -> None:
    with pytest.raises(model.ModelError, match="copy the whole model"):
        model.weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"12345678")
    assert [path.name for path in model.weight_files(tmp_path)] == ["pytorch_model.bin"]
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    assert [path.name for path in model.open_weights(tmp_path)] == ["a.safetensors"]
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [p.name for p in model.weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    with pytest.raises(model.ModelError, match=r"b\.safetensors can't be read"):
        model.open_weights(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(model.ModelError, match=r"b\.safetensors is empty"):
        model.open_weights(tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_unreadable_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"12345678")
    path.chmod(0)
    with pytest.raises(model.ModelError, match="mount the model"):
        model.open_weights(tmp_path)


def test_bytes_a_rank(tmp_path: Path) -> None:
    names = {
        "model.layers.0.mlp.experts.0.up.weight": 800,
        "model.layers.0.mlp.experts.gate_up": 800,
    }
    safetensors(tmp_path / "a.safetensors", **names)
    safetensors(tmp_path / "b.safetensors", **{"lm_head": 100, "mlp.shared_expert.up": 50})
    size = model.size_of([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert size == model.Size(experts=1600, rest=150)
    assert size.bytes_per_rank(slots=12, num_experts=16) == 1350


def test_bytes_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"12345678")
    assert model.size_of([tmp_path / "a.bin"]) is None
    (tmp_path / "a.safetensors").write_bytes(b"1234567")
    assert model.size_of([tmp_path / "a.safetensors"]) is None


def test_a_home_that_may_not_be_entered_has_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: object, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", forbidden)
    for environ in ({"HF_HOME": "/root/hf"}, {}):
        monkeypatch.delenv("HOME", raising=False)
        assert model.find_folder("org/name", environ) is None
        assert model.find_folder("/models/name", environ) is None
