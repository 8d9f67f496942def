"""Writes a random Qwen3-MoE of two million parameters with its tokenizer. Standard library only.

    python -m elasticmoe_vllm_cpu.tiny_model FOLDER [--seed 0] [--experts 16]

Weights are float32. Tokens are the 256 bytes, two special ones and 254 made-up words; the output
layer prefers words, so that what the model says can be read.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 512
HIDDEN = 128
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
EXPERT_HIDDEN = 64
_FIRST_WORD = 258
_SPREAD = 0.14  # uniform in +-0.14 has a deviation of 0.08
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo")


def write(folder: Path, seed: int = 0, experts: int = 16) -> None:
    """Write model and tokenizer to `folder`; the same seed makes the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / "config.json", _config(experts))
    _dump(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    _dump(folder / "tokenizer.json", _tokenizer())
    _dump(folder / "tokenizer_config.json", _tokenizer_config())
    _write_weights(folder / "model.safetensors", seed, experts)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _config(experts: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_HIDDEN,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _tokenizer_config() -> dict[str, Any]:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "chat_template": template,
    }


def _tokenizer() -> dict[str, Any]:
    vocabulary = {"<s>": 0, "</s>": 1}
    for character in _byte_characters():
        vocabulary[character] = len(vocabulary)
    words = (
        "\u0120" + a + b + c for a in ("", *_SYLLABLES) for b in _SYLLABLES for c in _SYLLABLES
    )
    while len(vocabulary) < VOCABULARY:  # \u0120 is the blank
        vocabulary.setdefault(next(words), len(vocabulary))
    special = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, text in enumerate(("<s>", "</s>"))
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The characters by which byte-level tokenizers write the 256 bytes."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def _shapes(experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        yield layer + "input_layernorm.weight", (HIDDEN,)
        yield layer + "post_attention_layernorm.weight", (HIDDEN,)
        yield layer + "self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)
        yield layer + "self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield layer + "self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield layer + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)
        yield layer + "self_attn.q_norm.weight", (HEAD_DIM,)
        yield layer + "self_attn.k_norm.weight", (HEAD_DIM,)
        yield layer + "mlp.gate.weight", (experts, HIDDEN)
        for expert in range(experts):
            yield f"{layer}mlp.experts.{expert}.gate_proj.weight", (EXPERT_HIDDEN, HIDDEN)
            yield f"{layer}mlp.experts.{expert}.up_proj.weight", (EXPERT_HIDDEN, HIDDEN)
            yield f"{layer}mlp.experts.{expert}.down_proj.weight", (HIDDEN, EXPERT_HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _write_weights(path: Path, seed: int, experts: int) -> None:
    """safetensors: length of the header, header as JSON, then the tensors' bytes."""
    generator = random.Random(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors: list[array[float]] = []
    offset = 0
    for name, shape in _shapes(experts):
        tensor = _tensor(generator, name, shape)
        end = offset + 4 * len(tensor)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        tensors.append(tensor)
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            if sys.byteorder == "big":
                tensor.byteswap()
            tensor.tofile(file)


def _tensor(generator: random.Random, name: str, shape: tuple[int, ...]) -> array[float]:
    if len(shape) == 1:
        return array("f", [1.0]) * shape[0]
    rows, columns = shape
    draw = generator.random
    values = array("f", [(draw() * 2 - 1) * _SPREAD for _ in range(rows * columns)])
    if name == "lm_head.weight":
        for index in range(_FIRST_WORD * columns):
            values[index] *= 0.1
    return values


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m elasticmoe_vllm_cpu.tiny_model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=16)
    args = parser.parse_args()
    write(args.folder, args.seed, args.experts)
    print(f"tiny model written to {args.folder}")


if __name__ == "__main__":
    main()
