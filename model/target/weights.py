"""Put a checkpoint's tensors into the packed matrices of the runtime.

Tensors come from an iterator of (name, tensor) and are copied into their place one at a time, so beside the model there
is never more in memory than what the iterator holds: one shard's mapping, where it reads a folder.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo_kernels.contract import Mlp
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference.qkv_rope import interleave_rope

from ..errors import KangarooError
from .config import LlamaConfig

NamedTensors = Iterable[tuple[str, Tensor]]
"""A model's tensors under transformers' names, in any order."""

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Places:
    """Where each tensor of a checkpoint goes: a slice of a packed matrix, perhaps reordered for RoPE."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        rounded_to: torch.dtype | None = None,
        adjacent_pairs: bool = False,
    ) -> None:
        self.device, self.dtype, self.rounded_to = device, dtype, rounded_to or dtype
        self.adjacent_pairs = adjacent_pairs
        self.slots: dict[str, tuple[Tensor, int | None]] = {}

    def pack(self, rows: Mapping[str, tuple[int, ...]], rope_head_dim: Mapping[str, int] | None = None) -> Tensor:
        """A matrix (or vector) with the named tensors' rows stacked; they are filled in as they arrive."""
        shapes = list(rows.values())
        packed = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), device=self.device, dtype=self.dtype)
        turned = rope_head_dim if rope_head_dim and not self.adjacent_pairs else {}
        start = 0
        for name, shape in rows.items():
            self.slots[name] = (packed[start : start + shape[0]], turned.get(name))
            start += shape[0]
        return packed

    def fill(self, tensors: NamedTensors, tied: Mapping[str, str], source: str) -> None:
        """Copy every tensor to its place; all must come, in the right shape, finite.

        ``tied`` maps names that may also come to the tensors they must equal; errors call the checkpoint ``source``.
        """
        waiting, twins = dict(self.slots), {}
        for name, tensor in tensors:
            if name not in waiting:
                if name in tied:
                    twins[name] = tensor
                if name in tied or name in self.slots or name.endswith("rotary_emb.inv_freq"):
                    continue
                raise KangarooError(f"{source}: unexpected tensor {name!r}; the configuration describes another model.")
            slot, head_dim = waiting.pop(name)
            if tensor.shape != slot.shape:
                found, wanted = list(tensor.shape), list(slot.shape)
                raise KangarooError(
                    f"{source}: tensor {name!r} has shape {found}; the configuration asks for {wanted}."
                )
            if tensor.dtype not in STORED_DTYPES:
                raise KangarooError(f"{source}: tensor {name!r} is {tensor.dtype}; it must be a float type.")
            rounded = tensor.to(self.rounded_to)
            slot.copy_(rounded if head_dim is None else interleave_rope(rounded, head_dim))
            # checked after the copy, since float16 cannot hold all that bfloat16 can
            if not bool(torch.isfinite(slot).all()):
                raise KangarooError(f"{source}: tensor {name!r} holds values that are not finite in {self.rounded_to}.")
        if waiting:
            first = next(iter(waiting))
            raise KangarooError(f"{source}: {len(waiting)} of {len(self.slots)} tensors are missing, first {first!r}.")
        for name, tensor in twins.items():
            original = self.slots[tied[name]][0]
            if tensor.shape != original.shape or not torch.equal(original, tensor.to(self.rounded_to).to(original)):
                raise KangarooError(f"{source}: config.json ties {name!r} to {tied[name]!r}, but the two differ.")


@dataclass(frozen=True)
class AttentionWeights:
    """One attention block: norm ``[hidden]``, packed q, k, v, and the output projection."""

    norm: Tensor
    qkv: PackedWeight
    output: PackedWeight


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; an adapter's may have no MLP."""

    attention: AttentionWeights
    mlp: Mlp | None


@dataclass(frozen=True)
class TargetWeights:
    """The whole target: embedding ``[V, hidden]``, layers, final norm ``[hidden]`` and LM head.

    ``rounded_to`` is the dtype whose numbers they all are, where they are kept in a wider one.
    """

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: PackedWeight
    rounded_to: torch.dtype | None = None


class Unpacked:
    """A block's matrices while they are being filled; ``packed`` packs one and lets the original go."""

    def __init__(self, layout: Layout | None) -> None:
        self.layout = layout
        self.matrices: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.vectors: dict[str, Tensor] = {}

    def packed(self, name: str) -> PackedWeight:
        """One of them, packed."""
        return PackedWeight(*self.matrices.pop(name), self.layout)


def layer_places(places: Places, config: LlamaConfig, prefix: str, layout: Layout | None) -> Unpacked:
    """Places for a layer's tensors, whose names begin with ``prefix``; ``finish_layer`` makes a layer of them."""
    block = Unpacked(layout)
    _attention_places(places, config, prefix, block)
    if config.has_mlp:
        names = f"{prefix}post_attention_layernorm.weight", f"{prefix}mlp"
        mlp_places(places, config, config.intermediate_size, *names, block)
    return block


def finish_layer(block: Unpacked) -> LayerWeights:
    """A layer whose places were filled."""
    attention = AttentionWeights(block.vectors["norm"], block.packed("qkv"), block.packed("output"))
    return LayerWeights(attention, finish_mlp(block) if "mlp_norm" in block.vectors else None)


def finish_mlp(block: Unpacked) -> Mlp:
    """An MLP whose places were filled."""
    return Mlp(block.vectors["mlp_norm"], block.packed("gate_up"), block.packed("down"))


def _attention_places(places: Places, config: LlamaConfig, prefix: str, block: Unpacked) -> None:
    hidden, head_dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    name = f"{prefix}self_attn.{{}}_proj.{{}}"
    turned = {name.format(part, kind): head_dim for part in "qk" for kind in ("weight", "bias")}

    def biases(parts: Mapping[str, int]) -> Tensor:
        return places.pack({name.format(part, "bias"): (size,) for part, size in parts.items()}, turned)

    weight = places.pack({name.format(part, "weight"): (size, hidden) for part, size in rows.items()}, turned)
    block.matrices["qkv"] = (weight, biases(rows) if config.qkv_bias else None)
    output = places.pack({name.format("o", "weight"): (hidden, q_rows)})
    block.matrices["output"] = (output, biases({"o": hidden}) if config.output_bias else None)
    norm = f"{prefix}input_layernorm.weight"
    block.vectors["norm"] = places.pack({norm: (hidden,)})


def mlp_places(places: Places, config: LlamaConfig, inner: int, norm: str, mlp: str, block: Unpacked) -> None:
    """Places in ``block`` for an MLP's tensors and those of its norm, by the names of both."""
    hidden, name = config.hidden_size, f"{mlp}.{{}}_proj.{{}}"

    def pack(parts: Mapping[str, int], columns: int) -> tuple[Tensor, Tensor | None]:
        weight = places.pack({name.format(part, "weight"): (size, columns) for part, size in parts.items()})
        if not config.mlp_bias:
            return weight, None
        return weight, places.pack({name.format(part, "bias"): (size,) for part, size in parts.items()})

    block.matrices["gate_up"] = pack({"gate": inner, "up": inner}, hidden)
    block.matrices["down"] = pack({"down": hidden}, inner)
    block.vectors["mlp_norm"] = places.pack({norm: (hidden,)})


def load_target(
    tensors: NamedTensors | None,
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout | None = None,
    source: str = "the checkpoint",
    adjacent_pairs: bool = False,
    rounded_to: torch.dtype | None = None,
) -> TargetWeights:
    """Load the tensors of a Llama model.

    Args:
        tensors: all of them, from a folder (``read_tensors``) or from elsewhere; None leaves the matrices unfilled, for
            a device without memory (``meta``).
        config: the shape that they must have.
        device: where they go.
        dtype: in which they are kept.
        layout: of the matrices; None chooses a fast one for each (``choose_layout``).
        source: what errors call the place that they came from.
        adjacent_pairs: whether the rows of queries and keys already lie as the runtime wants them, a RoPE pair side by
            side, instead of as transformers keeps them.
        rounded_to: the dtype whose numbers the weights become, if it is another than the one that they are kept in.

    Raises:
        KangarooError: files or tensors missing, of another shape, or not finite.
    """
    places = Places(device, dtype, rounded_to, adjacent_pairs)
    shape = (config.vocab_size, config.hidden_size)
    head = embedding = places.pack({"model.embed_tokens.weight": shape})
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    if not config.tie_word_embeddings:
        head = places.pack({"lm_head.weight": shape})
        tied = {}
    norm = places.pack({"model.norm.weight": (config.hidden_size,)})
    numbers = range(config.num_hidden_layers)
    blocks = [layer_places(places, config, f"model.layers.{number}.", layout) for number in numbers]
    if tensors is not None:
        places.fill(tensors, tied, source)
    places.slots.clear()
    layers = [finish_layer(block) for block in blocks]
    return TargetWeights(embedding, layers, norm, PackedWeight(head, layout=layout), rounded_to)
