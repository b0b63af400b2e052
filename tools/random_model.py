"""Targets and adapters at the shapes of real models with random weights, made where they will live.

How fast a decode is does not depend on what the weights say. They are scaled so that hidden states stay near 1 through
every layer: nothing overflows, and nothing is zeros, which can run faster than data does.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.contract import Mlp
from kangaroo_kernels.model.backend import REFERENCES, Backend, load_backend
from kangaroo_kernels.model.drafters.adapter import Adapter, AdapterConfig
from kangaroo_kernels.model.drafters.adapter_weights import AdapterWeights
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.drafters.make import make_drafter
from kangaroo_kernels.model.drafters.protocol import PAPER_DRAFT_CONFIDENCE_THRESHOLD, PAPER_NUM_SPECULATIVE_TOKENS
from kangaroo_kernels.model.drafters.ways import Way
from kangaroo_kernels.model.target.config import LlamaConfig, RopeConfig
from kangaroo_kernels.model.target.llama import Llama
from kangaroo_kernels.model.target.weights import (
    AttentionWeights,
    LayerWeights,
    TargetWeights,
)
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.workloads import ModelShape

CONTEXT = 1 << 16
"""Positions that a random model allows; how many it was trained for has no meaning."""

SMOKE = ModelShape("smoke", 32, 32, 2, 1, 16, 64, 2)
"""The model of runs without a GPU: small enough for Triton's interpreter."""

RESIDENT_REFERENCES = replace(REFERENCES, resident=True)
"""The references in the kernels' loop on the device, a thousand times faster than Triton's interpreter on a CPU."""


def config_of(shape: ModelShape, dtype: torch.dtype) -> LlamaConfig:
    """A model's sizes as the runtime reads them; no token ends its text."""
    heads = shape.heads, shape.kv_heads, shape.head_dim
    sizes = shape.vocab_size, shape.hidden, shape.inner, shape.layers, *heads
    off = dict.fromkeys(("tie_word_embeddings", "qkv_bias", "output_bias", "mlp_bias"), False)
    return LlamaConfig(*sizes, 1e-5, CONTEXT, **off, rope=RopeConfig(), eos_token_ids=(), dtype=dtype)


def exit_layer_of(shape: ModelShape) -> int:
    """The paper's share of the layers: 2 of 32."""
    return max(1, shape.layers // 16)


def random_prompt(shape: ModelShape, length: int) -> list[int]:
    """So many tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(length)
    prompt: list[int] = torch.randint(shape.vocab_size, (length,), generator=generator).tolist()
    return prompt


class _Maker:
    """Random tensors on a device; on ``meta`` they hold no numbers."""

    def __init__(self, config: LlamaConfig, device: torch.device, seed: int) -> None:
        self.config, self.device = config, device
        self.generator = torch.Generator(device).manual_seed(seed) if device.type != "meta" else None

    def normal(self, rows: int, columns: int, scale: float) -> Tensor:
        empty = torch.empty(rows, columns, dtype=self.config.dtype, device=self.device)
        return empty.normal_(0.0, scale, generator=self.generator)

    def matrix(self, rows: int, columns: int, scale: float = 1.0) -> PackedWeight:
        return PackedWeight(self.normal(rows, columns, scale * columns**-0.5), layout=Layout.ROWS)

    def norm(self) -> Tensor:
        return 1 + self.normal(1, self.config.hidden_size, 0.1)[0]

    def attention(self, scale: float) -> AttentionWeights:
        hidden, head_dim = self.config.hidden_size, self.config.head_dim
        q_rows, kv_rows = self.config.num_attention_heads * head_dim, self.config.num_key_value_heads * head_dim
        return AttentionWeights(
            self.norm(), self.matrix(q_rows + 2 * kv_rows, hidden), self.matrix(hidden, q_rows, scale)
        )

    def layer(self, scale: float) -> LayerWeights:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        attention = self.attention(scale)
        if not inner:
            return LayerWeights(attention, None)
        mlp = Mlp(self.norm(), self.matrix(2 * inner, hidden), self.matrix(hidden, inner, scale))
        return LayerWeights(attention, mlp)


def random_target(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, *, backend: Backend | None = None, quiet: float = 1.0
) -> Llama:
    """A target with random weights, made on ``device``; on ``meta`` it holds no numbers.

    Args:
        backend: what it computes with; the Triton kernels if None (on a CPU in Triton's interpreter).
        quiet: how much the layers behind the exit add, of what they would; below 1, drafts can be right.
    """
    config = config_of(shape, dtype)
    maker, added, first_quiet = _Maker(config, device, 0), (2 * shape.layers) ** -0.5, exit_layer_of(shape)
    with torch.inference_mode():
        weights = TargetWeights(
            maker.normal(shape.vocab_size, shape.hidden, 1.0),
            [maker.layer(added * (quiet if index >= first_quiet else 1.0)) for index in range(shape.layers)],
            maker.norm(),
            maker.matrix(shape.vocab_size, shape.hidden),
        )
    return Llama(config, weights, backend or load_backend("triton", device, dtype))


def random_drafter(target: Llama, exit_layer: int, *, persistent: bool = False, draft_tree: int = 0) -> KangarooDrafter:
    """An adapter of the target's own attention shape, with the paper's settings; it adds a tenth of its states.

    Its norm is the target's last one, so that an exit state which says the target's token already drafts it. It drafts
    trees of ``draft_tree``, or chains.
    """
    config = replace(target.config, num_hidden_layers=1, intermediate_size=0)
    with torch.inference_mode():
        weights = AdapterWeights(_Maker(config, target.device, 1).layer(0.1), target.weights.norm)
    settings = AdapterConfig(config, exit_layer, PAPER_NUM_SPECULATIVE_TOKENS, PAPER_DRAFT_CONFIDENCE_THRESHOLD)
    return make_drafter(target, Adapter(settings, weights, target), Way(draft_tree), persistent)


def random_kangaroo(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, *, references: bool = False, quiet: float = 1.0
) -> Kangaroo:
    """A random target with a random drafter; with ``references`` they compute so, in the loop on the device."""
    target = random_target(shape, device, dtype, backend=RESIDENT_REFERENCES if references else None, quiet=quiet)
    return Kangaroo(target, random_drafter(target, exit_layer_of(shape)))


def sharing_weights(
    kangaroo: Kangaroo, *, graphs: bool = True, persistent: bool = False, draft_tree: int = 0
) -> Kangaroo:
    """Another decoder on the same target's weights, with caches and graphs of its own."""
    assert kangaroo.drafter is not None
    exit_layer = kangaroo.drafter.first_layer
    drafter = random_drafter(kangaroo.target, exit_layer, persistent=persistent, draft_tree=draft_tree)
    return Kangaroo(kangaroo.target, drafter, graphs=graphs)
