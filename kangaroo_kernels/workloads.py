"""The operations of a decode step at the shapes of real models: what reports, the tuner and benchmarks run.

A ``Workload`` makes the arguments of one operation (with random numbers, on any device, ``meta`` included) and knows
the bytes that it must move.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.reference.qkv_rope import rope_table


class ModelShape(NamedTuple):
    """The sizes of a Llama model that its operations see."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    layers: int


MODELS = (
    ModelShape("Vicuna-7B", 4096, 11008, 32, 32, 128, 32000, 32),
    ModelShape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256, 32),
    ModelShape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 128256, 16),
)
TINY = ModelShape("tiny", 192, 512, 3, 3, 64, 2048, 14)
EPS = 1e-5


class Settings(NamedTuple):
    """Where and on what a workload runs.

    Attributes:
        rows: tokens in flight, M.
        length: of the text, the tokens in flight included.
        dtype: of weights and hidden states.
        device: any; on ``meta`` nothing is computed.
    """

    rows: int
    length: int
    dtype: torch.dtype
    device: torch.device


class Workload(NamedTuple):
    """One operation at one shape.

    Attributes:
        op: the operation's name.
        role: which of the model's matrices it reads, where an operation serves two.
        out_features: weight rows; 0 for attention.
        in_features: K of the weight; 0 for attention.
        elements: that must be read or written, of the model's dtype, from (rows, length).
        make: ``(settings) -> (args, kwargs)`` of the launcher and of the reference.
    """

    op: str
    role: str
    out_features: int
    in_features: int
    elements: Callable[[int, int], int]
    make: Callable[[Settings], tuple[tuple[Any, ...], dict[str, Any]]]

    def bytes_moved(self, rows: int, length: int, itemsize: int) -> int:
        """Bytes that must move for ``rows`` tokens in flight at the end of a text of ``length``."""
        return itemsize * self.elements(rows, length)


def random(settings: Settings, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of the settings' dtype, on their device."""
    return torch.randn(shape, dtype=settings.dtype, device=settings.device).mul_(scale)


def workloads(shape: ModelShape) -> tuple[Workload, ...]:
    """The operations of one layer and of the two heads, in the order of a decode step."""
    hidden, inner, vocab = shape.hidden, shape.inner, shape.vocab_size
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def scalar(settings: Settings, value: int) -> Tensor:
        return torch.full((1,), value, dtype=torch.int64, device=settings.device)

    def caches(settings: Settings) -> tuple[Tensor, Tensor]:
        size = (shape.kv_heads, settings.length, shape.head_dim)
        return random(settings, *size), random(settings, *size)

    def weight(settings: Settings, rows: int, columns: int) -> Tensor:
        return random(settings, rows, columns, scale=columns**-0.5)

    def normed(settings: Settings, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            random(settings, settings.rows, hidden),
            1 + random(settings, hidden, scale=0.1),
            weight(settings, rows, hidden),
        )

    def make_qkv_rope(settings: Settings) -> tuple[tuple[Any, ...], dict[str, Any]]:
        frequencies = 1e4 ** -torch.linspace(0, 1, shape.head_dim // 2, device=settings.device)
        table = rope_table(frequencies, settings.length)
        position = scalar(settings, settings.length - settings.rows)
        return (*normed(settings, query + 2 * kv), table, *caches(settings), position), {"eps": EPS}

    def make_attention(settings: Settings) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q = random(settings, settings.rows, shape.heads, shape.head_dim)
        position = scalar(settings, settings.length - settings.rows)
        return (q, *caches(settings), position), {"scale": shape.head_dim**-0.5}

    def linear(columns: int) -> Callable[[Settings], tuple[tuple[Any, ...], dict[str, Any]]]:
        def make(settings: Settings) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x, residual = random(settings, settings.rows, columns), random(settings, settings.rows, hidden)
            return (x, weight(settings, hidden, columns), residual), {}

        return make

    def make_gate_up(settings: Settings) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return normed(settings, 2 * inner), {"eps": EPS}

    def make_top1_head(settings: Settings) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return normed(settings, vocab), {"eps": EPS}

    def make_sample_head(settings: Settings) -> tuple[tuple[Any, ...], dict[str, Any]]:
        position, seed = scalar(settings, settings.length), scalar(settings, 7)
        return (*normed(settings, vocab), position), {"eps": EPS, "temperature": 0.8, "seed": seed}

    def matrix(rows: int, columns: int) -> Callable[[int, int], int]:
        return lambda m, length: rows * columns

    def cache(m: int, length: int) -> int:
        return 2 * kv * length

    return (
        Workload("qkv_rope", "qkv", query + 2 * kv, hidden, matrix(query + 2 * kv, hidden), make_qkv_rope),
        Workload("attention", "kv", 0, 0, cache, make_attention),
        Workload("linear_residual", "output", hidden, query, matrix(hidden, query), linear(query)),
        Workload("gate_up", "gate_up", 2 * inner, hidden, matrix(2 * inner, hidden), make_gate_up),
        Workload("linear_residual", "down", hidden, inner, matrix(hidden, inner), linear(inner)),
        Workload("top1_head", "head", vocab, hidden, matrix(vocab, hidden), make_top1_head),
        Workload("sample_head", "head", vocab, hidden, matrix(vocab, hidden), make_sample_head),
    )
