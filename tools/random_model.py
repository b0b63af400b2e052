"""Targets and adapters at the shapes of real models with random weights, made where they will live.

How fast a decode is does not depend on what the weights say. They are scaled so that hidden states stay near 1 through
every layer: nothing overflows, and nothing is zeros, which can run faster than data does.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from synthetic import Trace, with_synthetic_acceptance
from torch import Tensor

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.backend import REFERENCES, Backend, load_backend
from kangaroo_kernels.model.drafters.adapter import Adapter, AdapterConfig
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.drafters.protocol import PAPER_DRAFT_CONFIDENCE_THRESHOLD, PAPER_NUM_SPECULATIVE_TOKENS
from kangaroo_kernels.model.target.config import LlamaConfig, RopeConfig
from kangaroo_kernels.model.target.llama import Llama
from kangaroo_kernels.model.target.weights import AdapterWeights, AttentionWeights, LayerWeights, TargetWeights
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
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        rope=RopeConfig(),
        eos_token_ids=(),
        dtype=dtype,
    )


def exit_layer_of(shape: ModelShape) -> int:
    """The paper's share of the layers: 2 of 32."""
    return max(1, shape.layers // 16)


def random_prompt(shape: ModelShape, length: int) -> list[int]:
    """So many tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(length)
    prompt: list[int] = torch.randint(shape.vocab_size, (length,), generator=generator).tolist()
    return prompt


class _Maker:
    """Random tensors on a device."""

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
        config = self.config
        q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return AttentionWeights(
            self.norm(),
            self.matrix(q_rows + 2 * kv_rows, config.hidden_size),
            self.matrix(config.hidden_size, q_rows, scale),
        )

    def layer(self, scale: float) -> LayerWeights:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return LayerWeights(
            self.attention(scale), self.norm(), self.matrix(2 * inner, hidden), self.matrix(hidden, inner, scale)
        )


def random_target(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backend: Backend | None = None,
    quiet: float = 1.0,
    seed: int = 0,
) -> Llama:
    """A target with random weights.

    Args:
        shape: its sizes.
        device: where it is made, never passing through the host; on ``meta`` it holds no numbers.
        dtype: of its weights.
        backend: what it computes with; the Triton kernels if None (on a CPU in Triton's interpreter).
        quiet: how much the layers behind the exit add, of what they would; below 1, drafts can be right.
        seed: of the weights.
    """
    config = config_of(shape, dtype)
    maker, added = _Maker(config, device, seed), (2 * shape.layers) ** -0.5
    first_quiet = exit_layer_of(shape)
    with torch.inference_mode():
        weights = TargetWeights(
            maker.normal(shape.vocab_size, shape.hidden, 1.0),
            [maker.layer(added * (quiet if index >= first_quiet else 1.0)) for index in range(shape.layers)],
            maker.norm(),
            maker.matrix(shape.vocab_size, shape.hidden),
        )
    return Llama(config, weights, backend or load_backend("triton", device, dtype))


def random_drafter(
    target: Llama, exit_layer: int, *, scale: float = 0.1, seed: int = 1, persistent: bool = False
) -> KangarooDrafter:
    """An adapter of the target's own attention shape, with the paper's settings; it adds ``scale`` times its states.

    Its norm is the target's last one, so that an exit state which says the target's token already drafts it.
    """
    config = replace(target.config, num_hidden_layers=1)
    with torch.inference_mode():
        weights = AdapterWeights(_Maker(config, target.device, seed).attention(scale), target.weights.norm)
    settings = AdapterConfig(config, exit_layer, PAPER_NUM_SPECULATIVE_TOKENS, PAPER_DRAFT_CONFIDENCE_THRESHOLD)
    return KangarooDrafter(target, Adapter(settings, weights, target), persistent)


def random_kangaroo(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, *, references: bool = False, quiet: float = 1.0
) -> Kangaroo:
    """A random target with a random drafter; with ``references`` they compute so, in the loop on the device."""
    target = random_target(shape, device, dtype, backend=RESIDENT_REFERENCES if references else None, quiet=quiet)
    return Kangaroo(target, random_drafter(target, exit_layer_of(shape)))


def sharing_weights(
    kangaroo: Kangaroo, *, trace: Trace | None = None, graphs: bool = True, persistent: bool = False
) -> Kangaroo:
    """Another decoder on the same target's weights, with caches and graphs of its own.

    Args:
        kangaroo: whose weights.
        trace: what becomes of its drafts (``synthetic.py``), instead of what the weights say.
        graphs: whether its iterations are captured.
        persistent: whether it drafts in one kernel.
    """
    assert kangaroo.drafter is not None
    target = kangaroo.target if trace is None else with_synthetic_acceptance(kangaroo.target, trace)
    return Kangaroo(target, random_drafter(target, kangaroo.drafter.first_layer, persistent=persistent), graphs=graphs)


Verified = tuple[Tensor, Tensor, Tensor, Tensor]
"""The last hidden states ``[M, hidden]``, tokens ``[M]``, confidences ``[M]`` and logits ``[M, V]`` of some rows."""


def verification(kangaroo: Kangaroo, prompt: Sequence[int], states: Tensor) -> Callable[[int, int], Verified]:
    """``verify(first, last)``: the deep layers and the head on those of the exit layer's ``states`` behind a prompt."""
    target, drafter = kangaroo.target, kangaroo.drafter
    assert drafter is not None
    config, weights, position = target.config, target.weights, len(prompt)
    cache = target.new_cache()
    cache.reserve(position + len(states))
    target.run(target.embed(prompt), cache, 0, 0, config.num_hidden_layers)

    def verify(first: int, last: int) -> Verified:
        hidden = target.run(states[first:last], cache, position + first, drafter.first_layer, config.num_hidden_layers)
        best = target.backend.top1_head(hidden, weights.norm, weights.head, eps=config.rms_norm_eps)
        # the library multiplies one row at a time, which is one shape for it: equal states have equal logits
        logits = torch.cat([target.logits(hidden[row : row + 1]) for row in range(len(hidden))])
        return hidden, best.token, best.confidence, logits

    return verify
