"""Decoding in plain PyTorch, compiled: the fastest that ``torch.compile`` makes of a Llama, on a target's own weights.

It does what gpt-fast shows (github.com/meta-pytorch/gpt-fast, ``generate.py`` and ``model.py``): a cache of fixed size,
a whole step as one compiled function under CUDA graphs, attention and products of one row left to the compiler, and a
host that never waits for a token. transformers' ``generate`` compiles the forward pass alone. Around it, its host
chooses each token, asks whether the text is over, and makes a new cache in every call.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch._dynamo.utils
import torch._inductor.config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kangaroo_kernels.model.target.config import LlamaConfig
from kangaroo_kernels.model.target.llama import Llama
from kangaroo_kernels.model.target.weights import LayerWeights
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.reference.qkv_rope import rope_table

GRANULE = 8
"""Positions of a cache are a multiple of it."""


def turned(x: Tensor, phases: Tensor) -> Tensor:
    """RoPE on ``[H, T, D]``; ``phases`` ``[T, D / 2, 2]`` are cosines and sines of adjacent pairs."""
    first, second = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = phases.unbind(-1)
    pairs = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


def matrix(weight: Weight) -> Tensor:
    """A weight without a bias, ``[N, K]``."""
    return weight if isinstance(weight, Tensor) else weight.unpacked()


class PlainLayer(nn.Module):
    """A decoder layer and its cache.

    Args:
        weights: the target's; they are not copied.
        config: the target's.
        room: positions of the cache.
    """

    norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, weights: LayerWeights, config: LlamaConfig, room: int) -> None:
        super().__init__()
        attention, mlp = weights.attention, weights.mlp
        assert mlp is not None
        self.eps, self.heads = config.rms_norm_eps, (config.num_attention_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        qkv, output, gate_up, down = map(matrix, (attention.qkv, attention.output, mlp.gate_up, mlp.down))
        cache = qkv.new_zeros(config.num_key_value_heads, room, config.head_dim)
        tensors = {"norm": attention.norm, "qkv": qkv, "output": output, "mlp_norm": mlp.norm}
        tensors |= {"gate_up": gate_up, "down": down, "keys": cache, "values": cache.clone()}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, hidden: Tensor, position: Tensor, phases: Tensor, seen: Tensor) -> Tensor:
        """``[T, hidden]`` to the same, for tokens at ``position`` ``[T]`` that see ``seen`` ``[T, room]``."""
        heads, kv_heads = self.heads
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.eps)
        projected = F.linear(normed, self.qkv).view(len(hidden), -1, self.head_dim).transpose(0, 1)
        q, k, v = projected.split((heads, kv_heads, kv_heads))
        self.keys[:, position] = turned(k, phases)
        self.values[:, position] = v
        caches = self.keys[None], self.values[None]
        mixed = F.scaled_dot_product_attention(turned(q, phases)[None], *caches, seen, enable_gqa=heads != kv_heads)
        hidden = hidden + F.linear(mixed[0].transpose(0, 1).flatten(1), self.output)
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.mlp_norm, self.eps)
        gate, up = F.linear(normed, self.gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, self.down)


class PlainLlama(nn.Module):
    """A Llama without biases that decodes greedily.

    Args:
        target: whose weights it takes.
        length: of the longest text.
        compiled: whether a step is compiled, which takes a GPU.
    """

    embedding: Tensor
    norm: Tensor
    head: Tensor
    phases: Tensor
    seen: Tensor

    def __init__(self, target: Llama, length: int, *, compiled: bool) -> None:
        super().__init__()
        config, weights = target.config, target.weights
        room = -(-length // GRANULE) * GRANULE
        self.eps, self.compiled = config.rms_norm_eps, compiled
        self.layers = nn.ModuleList(PlainLayer(layer, config, room) for layer in weights.layers)
        phases = torch.view_as_real(rope_table(config.inv_freq(room).to(target.device), room))[:, 0]
        seen = torch.ones(room, room, dtype=torch.bool, device=target.device).tril()
        tensors = {"embedding": weights.embedding, "norm": weights.norm, "head": matrix(weights.head)}
        for name, tensor in (tensors | {"phases": phases, "seen": seen}).items():
            self.register_buffer(name, tensor)
        self.step: Callable[..., Tensor] = (
            torch.compile(self.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
            if compiled
            else self.forward
        )

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens ``[T]`` at ``position`` ``[T]``, both int64, to the token that follows: ``[1]`` int64."""
        hidden, phases, seen = self.embedding[tokens], self.phases[position], self.seen[position]
        for layer in self.layers:
            hidden = layer(hidden, position, phases, seen)
        last = F.rms_norm(hidden[-1:], hidden.shape[-1:], self.norm, self.eps)
        return F.linear(last, self.head).argmax(dim=-1)

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], tokens: int, settled: int, synchronize: Callable[[], None]
    ) -> tuple[list[int], float]:
        """So many greedy tokens, and the seconds of those behind the first ``settled``.

        Raises:
            RuntimeError: the compiler took no CUDA graph, which it says nowhere else.
        """
        skipped = graphs_skipped()
        new = [self(torch.tensor(prompt, device=self.head.device), torch.arange(len(prompt), device=self.head.device))]
        position, began = torch.tensor([len(prompt)], device=self.head.device), time.perf_counter()
        with as_gpt_fast() if self.compiled else nullcontext():
            for index in range(1, tokens):
                if index == settled:
                    synchronize()
                    began = time.perf_counter()
                new.append(self.step(new[-1], position).clone())  # the next replay overwrites what this one gave
                position += 1
        synchronize()
        seconds = time.perf_counter() - began
        if graphs_skipped() > skipped:
            raise RuntimeError("torch.compile captured no CUDA graph, so this is not the way that was asked for.")
        return torch.cat(new).tolist(), seconds


def graphs_skipped() -> int:
    """How many compiled functions got no CUDA graph so far."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


@contextmanager
def as_gpt_fast() -> Iterator[None]:
    """Within it, a product with one row is compiled like a sum, and attention like any other code."""
    with torch._inductor.config.patch(coordinate_descent_tuning=True), sdpa_kernel(SDPBackend.MATH):
        yield
