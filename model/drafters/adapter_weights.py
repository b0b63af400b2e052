"""The weights of an adapter, from the tensors of its folder."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import Mlp, TrainedConfidence
from kangaroo_kernels.packed_weight import Layout, PackedWeight

from ..target.config import LlamaConfig
from ..target.weights import (
    LayerWeights,
    NamedTensors,
    Places,
    Unpacked,
    finish_layer,
    finish_mlp,
    layer_places,
    mlp_places,
)
from .parts import PAPER_PARTS, Parts


class Factors(NamedTuple):
    """A head of a low rank r: ``up(rms_norm(down(h)))``.

    Attributes:
        down: ``[r, hidden]``.
        up: ``[V, r]``.
    """

    down: PackedWeight
    up: PackedWeight


class BlockWeights(NamedTuple):
    """What drafts several tokens in one pass (``block.py``).

    Attributes:
        places: ``[K - 1, hidden]``, what the adapter reads for the places behind the first.
        correction: ``[hidden, hidden]``, over the embedding of the draft before.
    """

    places: Tensor
    correction: PackedWeight


@dataclass(frozen=True)
class AdapterWeights:
    """The adapter's layer, its own final norm, and the parts that it has (``Parts``).

    Attributes:
        layer: of attention, perhaps with an MLP.
        norm: ``[hidden]``, or ``[r]`` before a head of rank r.
        state: the SwiGLU over its deep state.
        factors: a head of its own.
        block: for drafts of one pass.
        confidence: what is held against the threshold in the probability's stead.
    """

    layer: LayerWeights
    norm: Tensor
    state: Mlp | None = None
    factors: Factors | None = None
    block: BlockWeights | None = None
    confidence: TrainedConfidence | None = None


def load_adapter(
    tensors: NamedTensors | None,
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
    layout: Layout | None = None,
    source: str = "the adapter",
    rounded_to: torch.dtype | None = None,
    parts: Parts = PAPER_PARTS,
) -> AdapterWeights:
    """Load an adapter's tensors, ours or the paper's authors' (same names); arguments as for ``load_target``.

    ``parts`` are those that it has besides its layer.

    Raises:
        KangarooError: as for ``load_target``.
    """
    places, hidden, rank = Places(device, dtype, rounded_to), config.hidden_size, parts.draft_head_rank
    layer, others = layer_places(places, config, "layers.0.", layout), Unpacked(layout)
    norm = places.pack({"norm.weight": (rank or hidden,)})
    if parts.deep_state_size:
        mlp_places(places, config, parts.deep_state_size, "state_layernorm.weight", "state_mlp", others)
    if rank:
        others.matrices["factor_down"] = places.pack({"draft_head.down.weight": (rank, hidden)}), None
        others.matrices["factor_up"] = places.pack({"draft_head.up.weight": (config.vocab_size, rank)}), None
    if parts.draft_block:
        others.vectors["places"] = places.pack({"block.places": (parts.draft_block - 1, hidden)})
        others.matrices["correction"] = places.pack({"block.correction.weight": (hidden, hidden)}), None
    if parts.trained_confidence:
        others.vectors["confidence"] = places.pack({"confidence.weight": (1, (rank or hidden) + 1)})
        others.vectors["confidence_bias"] = places.pack({"confidence.bias": (1,)})
    if tensors is not None:
        places.fill(tensors, {}, source)
    places.slots.clear()
    return AdapterWeights(
        finish_layer(layer),
        norm,
        finish_mlp(others) if parts.deep_state_size else None,
        Factors(others.packed("factor_down"), others.packed("factor_up")) if rank else None,
        BlockWeights(others.vectors["places"], others.packed("correction")) if parts.draft_block else None,
        _confidence(norm, others) if parts.trained_confidence else None,
    )


def _confidence(norm: Tensor, others: Unpacked) -> TrainedConfidence:
    """Its weight has the norm's as a factor."""
    weight, bias = others.vectors["confidence"][0].float(), others.vectors["confidence_bias"].float()
    return TrainedConfidence(weight[:-1] * norm.float(), torch.cat((weight[-1:], bias)))
