"""A model's files as the runtime sees them, and how a Hugging Face folder is read: its tensors one at a time.

``pytorch_model.bin`` is read with ``weights_only``: no code of a checkpoint ever runs.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KangarooError
from ..text import load_tokenizer
from .config import LlamaConfig, add_generation_config, load_config_values, parse_config

FORMATS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Weights in one file, and the index of weights in several, in the order in which they are looked for."""

DRAFT_VOCABULARY_FILE = "draft_vocabulary.safetensors"
"""Lies in an adapter's folder, where the adapter drafts from a part of the vocabulary (``drafters/vocabulary.py``)."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, whatever their format. The configuration was read; the rest is read when it is asked for.

    Attributes:
        path: the folder or file.
        values: the configuration in transformers' terms.
        config: the same, validated.
        tensors: gives every tensor under transformers' name, one at a time.
        tokenizer: loads the tokenizer; gives None where there is none.
        adjacent_pairs: whether query and key rows already lie in the runtime's order (``load_target``).
        quantized: whether weights are stored in blocks, whose numbers are exact in float32 alone; ``config.dtype`` is
            then what a GPU rounds them to.
    """

    path: Path
    values: dict[str, Any]
    config: LlamaConfig
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    tokenizer: Callable[[], Any]
    adjacent_pairs: bool = False
    quantized: bool = False


def open_folder(folder: Path) -> Checkpoint:
    """Read a Hugging Face folder as far as its configuration.

    Raises:
        KangarooError: as ``load_config_values``, ``parse_config`` and ``add_generation_config``.
    """
    values = load_config_values(folder, "model")
    config = add_generation_config(parse_config(values, folder / "config.json"), folder)
    return Checkpoint(folder, values, config, partial(read_tensors, folder), partial(load_tokenizer, folder))


def _shards(folder: Path) -> list[Path]:
    for single, index in FORMATS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
                shards = [folder / name for name in names]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise KangarooError(f"{folder / index} is not a valid index of shards.") from error
            missing = [path.name for path in shards if not path.is_file()]
            if missing:
                raise KangarooError(f"{folder}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}.")
            return shards
    raise KangarooError(f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin.")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint with its name, one at a time.

    Raises:
        KangarooError: files missing, truncated, or holding anything but tensors.
    """
    for path in _shards(folder):
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise KangarooError(f"{path} is truncated or not a safetensors file ({error}).") from error
        else:
            try:
                mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except Exception as error:  # a damaged pickle raises whatever its bytes lead to
                runs_code = isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in str(error)
                reason = "it would run code" if runs_code else "truncated or not a checkpoint"
                raise KangarooError(f"{path} cannot be loaded: {reason}.") from error
            if not isinstance(tensors, Mapping):
                raise KangarooError(f"{path} holds no dictionary of tensors.")
            # detached, for some files hold parameters
            yield from ((str(name), tensor.detach()) for name, tensor in tensors.items() if isinstance(tensor, Tensor))
