"""The files of a checkpoint: where its folder is, and its tensors, one at a time.

``pytorch_model.bin`` is read with ``weights_only``: no code of a checkpoint ever runs.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import KangarooError

DOWNLOADED = ("*.json", "*.safetensors", "*.bin", "tokenizer*", "*.model")


def find_folder(name_or_path: str | Path, what: str) -> Path:
    """The folder itself, or the local copy of a hub repository, downloaded if necessary."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if folder.exists():
        raise KangarooError(f"{what} {name!r} is a file; give the folder that holds it.")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip():
        raise KangarooError(f"{what} folder {name!r} does not exist.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # the hub, its HTTP client and the file system raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise KangarooError(f"{what} {name!r} is not a folder, and the hub does not provide it ({reason}).") from error


def _shards(folder: Path) -> list[Path]:
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
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
