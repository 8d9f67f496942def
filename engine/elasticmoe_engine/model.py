"""What a model's files say: routed experts, weight files, bytes a rank. Reads files only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_EXPERT = re.compile(r"\.experts\.")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class ModelError(Exception):
    """The model's files are not as they must be; the text says what to do."""


def find_folder(
    model: str, environ: Mapping[str, str], revision: str = "", download_dir: str = ""
) -> Path | None:
    """Folder with the model's files: itself, or in Hugging Face's cache; None when not here."""
    # os.path, because what may not be looked at (another user's home) is not there for us.
    if os.path.isdir(model):
        return Path(model)
    repository = f"models--{model.replace('/', '--')}"
    for cache in _caches(environ, download_dir):
        snapshots = cache / repository / "snapshots"
        wanted = revision or "main"
        with contextlib.suppress(OSError):  # a commit names its snapshot itself
            wanted = (cache / repository / "refs" / wanted).read_text().strip()
        if os.path.isfile(snapshots / wanted / "config.json"):
            return snapshots / wanted
    return None


def _caches(environ: Mapping[str, str], download_dir: str) -> Iterator[Path]:
    if download_dir:
        yield Path(download_dir)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            yield Path(environ[name])
    home = environ.get("HF_HOME") or os.path.join(
        environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    yield Path(home) / "hub"


def count_experts(folder: Path) -> int:
    """Routed experts a layer; 0 for a model that has none. Raises ModelError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read ({error}): give the model's folder") from None
    return experts_in(config)


def experts_in(config: Any) -> int:
    """Routed experts a layer that a model's configuration names, at its top or nested in it."""
    if not isinstance(config, dict):
        return 0
    for key in _EXPERT_KEYS:
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    nested = (value for key, value in config.items() if key.endswith("_config"))
    return next((found for value in nested if (found := experts_in(value))), 0)


def weight_files(folder: Path) -> list[Path]:
    """The files with weights, by the index where there is one. Raises ModelError for none."""
    for name in _INDEXES:
        try:
            names = set(json.loads((folder / name).read_text())["weight_map"].values())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{folder / name} can't be read ({error}): copy it again") from None
        return sorted(folder / one for one in names)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ModelError(f"no weight files in {folder}: copy the whole model there")
    return files


def open_weights(folder: Path) -> list[Path]:
    """The weight files, each opened and read from. Raises ModelError."""
    files = weight_files(folder)
    for path in files:
        try:
            with path.open("rb") as file:
                empty = not file.read(8)
        except OSError as error:
            raise ModelError(
                f"{path} can't be read ({error.strerror}): mount the model where every rank is"
            ) from None
        if empty:
            raise ModelError(f"{path} is empty: copy it again")
    return files


@dataclass(frozen=True)
class Size:
    """Bytes of a checkpoint. experts: of all routed experts. rest: what every rank holds."""

    experts: int
    rest: int

    def bytes_per_rank(self, slots: int, num_experts: int) -> int:
        """Bytes of weights on a rank with so many expert slots."""
        return self.rest + self.experts * slots // max(1, num_experts)


def size_of(files: list[Path]) -> Size | None:
    """Sum over safetensors' headers; None for another format or a header that is none."""
    experts = rest = 0
    for path in files:
        if path.suffix != ".safetensors":
            return None
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 1 << 27)))
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                begin, end = tensor["data_offsets"]
                if _EXPERT.search(name):
                    experts += end - begin
                else:
                    rest += end - begin
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None
    return Size(experts, rest)
