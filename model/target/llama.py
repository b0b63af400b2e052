"""The target: a Llama model as a sequence of the operations of ``kangaroo_kernels``."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import REFERENCES, Backend
from ..head import Head
from .cache import Branches, KVCache, Place
from .config import LlamaConfig
from .weights import LayerWeights, TargetWeights

GPU_LOCKS: "dict[torch.device, threading.RLock]" = {}
"""One for each GPU: while a stream of it is captured, no other thread may wait for the whole device."""


class DecoderLayer:
    """Pre-norm self-attention, then a pre-norm SwiGLU where the weights have one, each with its residual.

    All of the target's layers are such, and so is an adapter.
    """

    def __init__(self, config: LlamaConfig, weights: LayerWeights, backend: Backend) -> None:
        self.weights, self.backend = weights, backend
        self.eps, self.scale = config.rms_norm_eps, config.head_dim**-0.5

    def __call__(
        self,
        hidden: Tensor,
        cache: KVCache,
        layer: int,
        position: Place,
        *,
        reach: int | None = None,
        active: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``[M, hidden]`` to the same; appends M rows to that layer of the cache."""
        attention, mlp, operations = self.weights.attention, self.weights.mlp, self.backend.for_rows(hidden.shape[0])
        q = self.append(hidden, cache, layer, position, active=active)
        first, ancestors = position if isinstance(position, Branches) else (position, None)
        mixed = operations.attention(
            q,
            cache.keys[layer],
            cache.values[layer],
            first,
            scale=self.scale,
            max_length=reach,
            arrivals=cache.arrivals,
            ancestors=ancestors,
            active=active,
        )
        attended = out if mlp is None else None
        hidden = operations.linear_residual(mixed, attention.output, hidden, active=active, out=attended)
        if mlp is None:
            return hidden
        inner = operations.gate_up(hidden, mlp.norm, mlp.gate_up, eps=self.eps, active=active)
        return operations.linear_residual(inner, mlp.down, hidden, active=active, out=out)

    def append(
        self, hidden: Tensor, cache: KVCache, layer: int, position: Place, *, active: Tensor | None = None
    ) -> Tensor:
        """Append the keys and values of M rows to that layer of the cache; return their queries, ``[M, H, D]``."""
        attention, operations = self.weights.attention, self.backend.for_rows(hidden.shape[0])
        first, ancestors = position if isinstance(position, Branches) else (position, None)
        return operations.qkv_rope(
            hidden,
            attention.norm,
            attention.qkv,
            cache.phases,
            cache.keys[layer],
            cache.values[layer],
            first,
            eps=self.eps,
            ancestors=ancestors,
            active=active,
        )


class Llama:
    """A Llama model whose layers can be run a part at a time.

    Attributes:
        config: its shape.
        layers: the decoder layers.
        head: the final norm and the LM head.
        device: where it lives.
        dtype: of its weights and hidden states.
        kv_dtype: in which caches keep keys and values; ``dtype``, unless another is given.
        backend: what it computes with.
        lock: held by whoever runs a step; the texts of a target, and of all targets on one GPU, take turns.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: TargetWeights,
        backend: Backend = REFERENCES,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.weights, self.backend = config, weights, backend
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.kv_dtype = kv_dtype or self.dtype
        on_gpu = self.device.type == "cuda"
        self.lock = GPU_LOCKS.setdefault(self.device, threading.RLock()) if on_gpu else threading.RLock()
        self.layers = [DecoderLayer(config, layer, backend) for layer in weights.layers]
        self.head = Head(weights.norm, weights.head, config.rms_norm_eps)

    def new_cache(self) -> KVCache:
        """An empty cache for all layers."""
        return KVCache(self.config, self.config.num_hidden_layers, self.device, self.kv_dtype)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Token embeddings: ``[M, hidden]``."""
        if len(tokens) == 1:
            return self.weights.embedding[tokens[0] : tokens[0] + 1]
        return self.weights.embedding[torch.tensor(tokens, device=self.device)]

    def run(
        self,
        hidden: Tensor,
        cache: KVCache,
        position: Place,
        first: int,
        last: int,
        *,
        reach: int | None = None,
        active: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Layers ``[first, last)`` on M tokens at ``position, position + 1, ...``: ``[M, hidden]`` to the same.

        Args:
            hidden: ``[M, hidden]``.
            cache: the keys and values of all layers; M rows are appended to those that run.
            position: of the first token; a tensor ``[1]`` int64 where the host does not know it; ``Branches`` for
                tokens of a tree, whose positions do not follow each other.
            first: the first layer to run.
            last: the one after the last.
            reach: bound of ``position + M`` where the host does not know it; None means the cache's capacity.
            active: ``[1]`` int32; where it is 0 nothing is done.
            out: ``[M, hidden]``, made if None.
        """
        for index in range(first, last):
            end = out if index == last - 1 else None
            hidden = self.layers[index](hidden, cache, index, position, reach=reach, active=active, out=end)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head over the last layer's output: ``[M, V]`` float32."""
        return self.head.logits(hidden)
