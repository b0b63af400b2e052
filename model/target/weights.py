"""Read a checkpoint's tensors from disk straight into the packed matrices of the runtime.

Tensors arrive one at a time and are copied into their place, so beside the model there is never more in memory than one
shard's mapping. ``pytorch_model.bin`` is read with ``weights_only``: no code of a checkpoint ever runs.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference.qkv_rope import interleave_rope

from ..errors import KangarooError
from .config import LlamaConfig

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DOWNLOADED = ("*.json", "*.safetensors", "*.bin", "tokenizer*", "*.model")


def find_folder(name_or_path: str | Path, what: str) -> Path:
    """The folder itself, or the local copy of a hub repository, fetched if need be."""
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
    except Exception as error:  # the hub, its HTTP client and the file system each have their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise KangarooError(f"{what} {name!r} is neither a folder nor to be had from the hub ({reason}).") from error


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
                mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except Exception as error:  # a damaged pickle raises whatever its bytes lead to
                runs_code = isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in str(error)
                reason = "it would run code" if runs_code else "truncated or not a checkpoint"
                raise KangarooError(f"{path} cannot be loaded: {reason}.") from error
            if not isinstance(tensors, Mapping):
                raise KangarooError(f"{path} holds no dictionary of tensors.")
            # detached, for some files hold parameters
            yield from ((str(name), tensor.detach()) for name, tensor in tensors.items() if isinstance(tensor, Tensor))


class _Places:
    """Where each tensor of a checkpoint goes: a slice of a packed matrix, perhaps reordered for RoPE."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.slots: dict[str, tuple[Tensor, int | None]] = {}

    def pack(self, rows: Mapping[str, tuple[int, ...]], rope_head_dim: Mapping[str, int] | None = None) -> Tensor:
        """A matrix (or vector) with the named tensors' rows stacked; they are filled in as they arrive."""
        shapes = list(rows.values())
        packed = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), device=self.device, dtype=self.dtype)
        start = 0
        for name, shape in rows.items():
            self.slots[name] = (packed[start : start + shape[0]], (rope_head_dim or {}).get(name))
            start += shape[0]
        return packed

    def fill(self, folder: Path, tied: Mapping[str, str]) -> None:
        """Copy every tensor to its place; all must come, in the right shape, finite.

        ``tied`` maps names that may come besides to the tensors they must equal.
        """
        waiting, twins = dict(self.slots), {}
        for name, tensor in read_tensors(folder):
            if name not in waiting:
                if name in tied:
                    twins[name] = tensor
                if name in tied or name in self.slots or name.endswith("rotary_emb.inv_freq"):
                    continue
                raise KangarooError(f"{folder}: unexpected tensor {name!r}; config.json names another model.")
            slot, head_dim = waiting.pop(name)
            if tensor.shape != slot.shape:
                found, wanted = list(tensor.shape), list(slot.shape)
                raise KangarooError(f"{folder}: tensor {name!r} has shape {found}; config.json asks for {wanted}.")
            if tensor.dtype not in STORED_DTYPES:
                raise KangarooError(f"{folder}: tensor {name!r} is {tensor.dtype}; it must be a float type.")
            slot.copy_(tensor if head_dim is None else interleave_rope(tensor, head_dim))
            # looked at in its place, for float16 cannot hold all that bfloat16 can
            if not bool(torch.isfinite(slot).all()):
                raise KangarooError(f"{folder}: tensor {name!r} holds values that are not finite in {self.dtype}.")
        if waiting:
            first = next(iter(waiting))
            raise KangarooError(f"{folder}: {len(waiting)} of {len(self.slots)} tensors are missing, first {first!r}.")
        for name, tensor in twins.items():
            original = self.slots[tied[name]][0]
            if tensor.shape != original.shape or not torch.equal(original, tensor.to(original)):
                raise KangarooError(f"{folder}: config.json ties {name!r} to {tied[name]!r}, but the two differ.")


@dataclass(frozen=True)
class AttentionWeights:
    """One attention block: norm ``[hidden]``, packed q, k, v, and the output projection."""

    norm: Tensor
    qkv: PackedWeight
    output: PackedWeight


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    attention: AttentionWeights
    mlp_norm: Tensor
    gate_up: PackedWeight
    down: PackedWeight


@dataclass(frozen=True)
class TargetWeights:
    """The whole target: embedding ``[V, hidden]``, layers, final norm ``[hidden]`` and LM head."""

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: PackedWeight


@dataclass(frozen=True)
class AdapterWeights:
    """The adapter's attention block and its own final norm."""

    attention: AttentionWeights
    norm: Tensor


class _Unpacked:
    """A block's matrices while they are being filled; ``packed`` packs one and lets the original go."""

    def __init__(self, layout: Layout | None) -> None:
        self.layout = layout
        self.matrices: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.vectors: dict[str, Tensor] = {}

    def packed(self, name: str) -> PackedWeight:
        return PackedWeight(*self.matrices.pop(name), self.layout)


def _attention_places(places: _Places, config: LlamaConfig, prefix: str, layout: Layout | None) -> _Unpacked:
    block = _Unpacked(layout)
    hidden, head_dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    name = f"{prefix}self_attn.{{}}_proj.{{}}"
    turned = {name.format(part, kind): head_dim for part in "qk" for kind in ("weight", "bias")}

    def biased(parts: Mapping[str, int]) -> Tensor | None:
        if not config.attention_bias:
            return None
        return places.pack({name.format(part, "bias"): (size,) for part, size in parts.items()}, turned)

    weight = places.pack({name.format(part, "weight"): (size, hidden) for part, size in rows.items()}, turned)
    block.matrices["qkv"] = (weight, biased(rows))
    output = places.pack({name.format("o", "weight"): (hidden, q_rows)})
    block.matrices["output"] = (output, biased({"o": hidden}))
    norm = f"{prefix}input_layernorm.weight"
    block.vectors["norm"] = places.pack({norm: (hidden,)})
    return block


def _finish_attention(block: _Unpacked) -> AttentionWeights:
    return AttentionWeights(block.vectors["norm"], block.packed("qkv"), block.packed("output"))


def _mlp_places(places: _Places, config: LlamaConfig, prefix: str, block: _Unpacked) -> None:
    hidden, inner = config.hidden_size, config.intermediate_size
    name = f"{prefix}mlp.{{}}_proj.{{}}"

    def pack(parts: Mapping[str, int], columns: int) -> tuple[Tensor, Tensor | None]:
        weight = places.pack({name.format(part, "weight"): (size, columns) for part, size in parts.items()})
        if not config.mlp_bias:
            return weight, None
        return weight, places.pack({name.format(part, "bias"): (size,) for part, size in parts.items()})

    block.matrices["gate_up"] = pack({"gate": inner, "up": inner}, hidden)
    block.matrices["down"] = pack({"down": hidden}, inner)
    block.vectors["mlp_norm"] = places.pack({f"{prefix}post_attention_layernorm.weight": (hidden,)})


def load_target(
    folder: Path, config: LlamaConfig, device: torch.device, dtype: torch.dtype, layout: Layout | None = None
) -> TargetWeights:
    """Read a Llama checkpoint; ``layout`` is its matrices', each the fastest for its machine if None.

    Raises:
        KangarooError: files or tensors missing, of another shape, or not finite.
    """
    places = _Places(device, dtype)
    shape = (config.vocab_size, config.hidden_size)
    head = embedding = places.pack({"model.embed_tokens.weight": shape})
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    if not config.tie_word_embeddings:
        head = places.pack({"lm_head.weight": shape})
        tied = {}
    norm = places.pack({"model.norm.weight": (config.hidden_size,)})
    blocks = []
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        block = _attention_places(places, config, prefix, layout)
        _mlp_places(places, config, prefix, block)
        blocks.append(block)
    places.fill(folder, tied)
    places.slots.clear()
    layers = [
        LayerWeights(_finish_attention(block), block.vectors["mlp_norm"], block.packed("gate_up"), block.packed("down"))
        for block in blocks
    ]
    return TargetWeights(embedding, layers, norm, PackedWeight(head, layout=layout))


def load_adapter(
    folder: Path, config: LlamaConfig, device: torch.device, dtype: torch.dtype, layout: Layout | None = None
) -> AdapterWeights:
    """Read an adapter, ours or the paper's authors' (same names, ``pytorch_model.bin``); ``layout`` as above.

    Raises:
        KangarooError: as for ``load_target``.
    """
    places = _Places(device, dtype)
    norm = places.pack({"norm.weight": (config.hidden_size,)})
    block = _attention_places(places, config, "layers.0.", layout)
    places.fill(folder, {})
    places.slots.clear()
    return AdapterWeights(_finish_attention(block), norm)
