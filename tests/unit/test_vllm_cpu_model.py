import json
import struct
from pathlib import Path

from elasticmoe_sim.config import read_num_experts
from elasticmoe_vllm_cpu import tiny_model


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    tiny_model.write(tmp_path / "a", seed=1)
    tiny_model.write(tmp_path / "b", seed=1)
    tiny_model.write(tmp_path / "c", seed=2)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_weights_are_whole_and_in_safetensors_form(tmp_path: Path) -> None:
    tiny_model.write(tmp_path, experts=4)
    content = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    end = 0
    for tensor in header.values():
        assert tensor["data_offsets"][0] == end
        size = 4
        for side in tensor["shape"]:
            size *= side
        end += size
        assert tensor["data_offsets"][1] == end
    assert len(content) == 8 + length + end
    assert length % 8 == 0
    experts = {name for name in header if ".experts." in name and "layers.0" in name}
    assert len(experts) == 3 * 4
    assert read_num_experts(str(tmp_path)) == 4


def test_tokenizer_has_a_token_for_every_byte_and_id(tmp_path: Path) -> None:
    tiny_model.write(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(512))
    assert {"!", "~", "\u0120", "\u010a"} <= set(vocabulary)  # the blank, the end of a line
