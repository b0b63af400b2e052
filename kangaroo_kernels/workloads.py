"""The operations of a decode step at the shapes of real models: what reports, the tuner and benchmarks run.

A ``Workload`` makes the arguments of one operation (with random numbers, on any device, ``meta`` included) and knows
the bytes that it must move.
"""

from typing import NamedTuple

import torch

from kangaroo_kernels.operation import OPERATIONS, Arguments, Inputs


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
LARGER_MODELS = (
    ModelShape("Llama-3.1-70B", 8192, 28672, 64, 8, 128, 128256, 80),
    ModelShape("Llama-3.1-405B", 16384, 53248, 128, 8, 128, 128256, 126),
)
"""Too large for one card: they are planned for, and no tool runs them."""

TINY = ModelShape("tiny", 192, 512, 3, 3, 64, 2048, 14)


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
        shape: the model's.
        out_features: weight rows; 0 for attention.
        in_features: K of the weight; 0 for attention.
    """

    op: str
    role: str
    shape: ModelShape
    out_features: int
    in_features: int

    def make(self, settings: Settings) -> Arguments:
        """Random arguments of the launcher and of the reference."""
        shape = self.shape
        inputs = Inputs(settings.rows, settings.length, shape.heads, shape.kv_heads, shape.head_dim, *settings[2:])
        example = OPERATIONS[self.op].example
        assert example is not None
        return example(inputs, self.out_features, self.in_features)

    def bytes_moved(self, rows: int, length: int, itemsize: int) -> int:
        """Bytes that must move for ``rows`` tokens in flight at the end of a text of ``length``.

        They are those of the weight, or of the caches where there is none.
        """
        caches = 2 * self.shape.kv_heads * self.shape.head_dim * length
        return itemsize * (self.out_features * self.in_features or caches)


def workloads(shape: ModelShape) -> tuple[Workload, ...]:
    """The operations of one layer and of the two heads, in the order of a decode step."""
    hidden, inner, vocab = shape.hidden, shape.inner, shape.vocab_size
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return (
        Workload("qkv_rope", "qkv", shape, query + 2 * kv, hidden),
        Workload("attention", "kv", shape, 0, 0),
        Workload("linear_residual", "output", shape, hidden, query),
        Workload("gate_up", "gate_up", shape, 2 * inner, hidden),
        Workload("linear_residual", "down", shape, hidden, inner),
        Workload("top1_head", "head", shape, vocab, hidden),
        Workload("sample_head", "head", shape, vocab, hidden),
    )
