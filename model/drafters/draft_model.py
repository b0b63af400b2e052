"""The drafter as the operation ``draft_loop`` takes it: weights and caches gathered for one launch."""

from typing import TYPE_CHECKING, Any, NamedTuple

from kangaroo_kernels.contract import AttentionBlock, DraftModel, Layer

from ..target.cache import KVCache
from ..target.config import LlamaConfig
from ..target.llama import Llama
from ..target.weights import LayerWeights
from .adapter import Adapter, DraftNetwork

if TYPE_CHECKING:
    from ..loop.state import TextState


class PreparedLoop(NamedTuple):
    """What one launch needs.

    Attributes:
        model: weights and caches.
        prepared: what the backend's ``prepare_draft_loop`` made of them, on the kernels a ``DraftLoop``: workspaces and
            a table of addresses on the device. None on the references, which need nothing.
    """

    model: DraftModel
    prepared: Any


def prepare_loop(target: Llama, adapter: DraftNetwork, text: "TextState", drafts: int) -> PreparedLoop:
    """Gather the shallow layers and the adapter over the caches of a text, for at most ``drafts`` drafts."""

    def layer(weights: LayerWeights, config: LlamaConfig, cache: KVCache, index: int) -> Layer:
        attention, caches = weights.attention, (cache.keys[index], cache.values[index])
        eps, scale = config.rms_norm_eps, config.head_dim**-0.5
        block = AttentionBlock(attention.norm, attention.qkv, attention.output, *caches, cache.phases, eps, scale)
        return Layer(block, weights.mlp)

    assert isinstance(adapter, Adapter), "draft_loop runs one layer behind the exit"
    head, shallow = adapter.head, enumerate(target.weights.layers[: adapter.config.exit_layer])
    model = DraftModel(
        tuple(layer(weights, target.config, text.cache, index) for index, weights in shallow),
        layer(adapter.layer.weights, adapter.config.llama, text.memory.cache, 0),
        head.norm,
        head.weight,
        head.eps,
        target.weights.embedding,
        head.vocabulary,
    )
    return PreparedLoop(model, target.backend.prepare_draft_loop(model, drafts))
