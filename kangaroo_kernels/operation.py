"""The table of operations, one row each. Code that needs the operations, or some of them, reads ``OPERATIONS``.

The runtime takes its kernels or references from here, and ``ops.py`` what it registers with PyTorch. Workloads,
measuring tools and tests take a kernel, its reference and arguments for both. Importing this module imports the
references, which need only torch; a kernel, and Triton with it, is imported when its launcher is first asked for.

A new operand of an operation is added in its reference, in its kernel, in its row here, and in its test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS, RECORD_HEAD, TARGET_STREAM, Experience, Hint, Match, Ranked, Top1, Tree
from kangaroo_kernels.reference.accept import accept
from kangaroo_kernels.reference.attention import attention
from kangaroo_kernels.reference.commit import commit
from kangaroo_kernels.reference.draft_loop import draft_loop
from kangaroo_kernels.reference.gate_up import gate_up
from kangaroo_kernels.reference.grow import grow
from kangaroo_kernels.reference.linear_residual import linear_residual
from kangaroo_kernels.reference.look_up import look_up
from kangaroo_kernels.reference.qkv_rope import qkv_rope, rope_table
from kangaroo_kernels.reference.rank import rank
from kangaroo_kernels.reference.sample_head import sample_head
from kangaroo_kernels.reference.straighten import straighten
from kangaroo_kernels.reference.top1_head import top1_head
from kangaroo_kernels.reference.walk import walk
from kangaroo_kernels.reference.weigh import weigh

EPS = 1e-5
"""The eps of the norms in random arguments."""

# ---- what a row is made of


@dataclass(frozen=True)
class Inputs:
    """The sizes of a call that do not follow from a weight, and random operands of these sizes.

    Attributes:
        rows: tokens in flight, M.
        length: of the text, the tokens in flight included; the caches hold this many positions.
        heads: H.
        kv_heads: H_kv.
        head_dim: D.
        dtype: of weights and hidden states.
        device: any; on ``meta`` nothing is computed.
    """

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, dtype=self.dtype, device=self.device).mul_(scale)

    def normed(self, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``[M, K]``, a norm's weight ``[K]`` and a matrix ``[N, K]``."""
        return self.random(self.rows, k), 1 + self.random(k, scale=0.1), self.random(n, k, scale=k**-0.5)

    def caches(self) -> tuple[Tensor, Tensor]:
        """The caches of keys and of values, ``[H_kv, T, D]`` each."""
        size = (self.kv_heads, self.length, self.head_dim)
        return self.random(*size), self.random(*size)

    def integers(self, *values: int) -> Tensor:
        """One row of int64."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def position(self) -> Tensor:
        """The position of the first token in flight, ``[1]`` int64."""
        return self.integers(self.length - self.rows)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of a launcher and of its reference."""


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        reference: the operation in PyTorch; its name is the operation's.
        schema: the arguments and results of ``torch.ops.kangaroo.<name>``, in PyTorch's own words. Arguments have the
            reference's names; a ``bias`` goes into the weight before it. None where the operation is not registered.
        fake: makes uninitialised results for the schema's arguments, which ``torch.compile`` traces with.
        example: makes random arguments from the sizes and from N and K of the weight (V and K of the embedding for
            ``commit``; unused where there is neither); None where a whole model is an argument.
    """

    reference: Callable[..., Any]
    schema: str | None = None
    fake: Callable[..., Any] | None = None
    example: Callable[[Inputs, int, int], Arguments] | None = None

    @property
    def name(self) -> str:
        """The name of the operation, of its kernel's module and of the function in it."""
        return self.reference.__name__

    @cached_property
    def launcher(self) -> Callable[..., Any]:
        """The function that launches the kernel; it has the reference's signature."""
        function: Callable[..., Any] = getattr(import_module(f"kangaroo_kernels.{self.name}"), self.name)
        return function


# ---- qkv_rope


def _fake_qkv_rope(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, k_cache: Tensor, *_: Any
) -> Tensor:
    kv_heads, head_dim = k_cache.shape[-3], k_cache.shape[-1]
    return x.new_empty(x.shape[0], weight.shape[0] // head_dim - 2 * kv_heads, head_dim)


def _example_of_qkv_rope(given: Inputs, n: int, k: int) -> Arguments:
    table = rope_table(1e4 ** -torch.linspace(0, 1, given.head_dim // 2, device=given.device), given.length)
    return (*given.normed(n, k), table, *given.caches(), given.position()), {"eps": EPS}


QKV_ROPE = Operation(
    qkv_rope,
    "(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, Tensor table, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor position, float eps, Tensor? block_table=None, Tensor? ancestors=None) -> Tensor",
    _fake_qkv_rope,
    _example_of_qkv_rope,
)

# ---- attention


def _example_of_attention(given: Inputs, n: int, k: int) -> Arguments:
    q = given.random(given.rows, given.heads, given.head_dim)
    arrivals = torch.zeros(given.heads, dtype=torch.int32, device=given.device)
    return (q, *given.caches(), given.position()), {"scale": given.head_dim**-0.5, "arrivals": arrivals}


ATTENTION = Operation(
    attention,
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position, float scale, int? max_length=None, "
    "Tensor? block_table=None, Tensor? ancestors=None) -> Tensor",
    lambda q, *_: q.new_empty(q.shape[0], q.shape[1] * q.shape[2]),
    _example_of_attention,
)

# ---- linear_residual


def _example_of_linear_residual(given: Inputs, n: int, k: int) -> Arguments:
    x, _, weight = given.normed(n, k)
    return (x, weight, given.random(given.rows, n)), {}


LINEAR_RESIDUAL = Operation(
    linear_residual,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    _example_of_linear_residual,
)

# ---- gate_up


def _example_with_norm(given: Inputs, n: int, k: int) -> Arguments:
    return given.normed(n, k), {"eps": EPS}


GATE_UP = Operation(
    gate_up,
    "(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, float eps) -> Tensor",
    lambda x, norm_weight, weight, *_: x.new_empty(x.shape[0], weight.shape[0] // 2),
    _example_with_norm,
)

# ---- top1_head, sample_head


def _fake_head(x: Tensor, *_: Any) -> Top1:
    return Top1.empty(x.shape[0], x.device)


TOP1_HEAD = Operation(
    top1_head,
    "(Tensor x, Tensor norm_weight, Tensor weight, float eps) -> (Tensor token, Tensor confidence)",
    _fake_head,
    _example_with_norm,
)


def _example_of_sample_head(given: Inputs, n: int, k: int) -> Arguments:
    settings = {"eps": EPS, "temperature": 0.8, "seed": given.integers(7)}
    return (*given.normed(n, k), given.integers(given.length)), settings


SAMPLE_HEAD = Operation(
    sample_head,
    "(Tensor x, Tensor norm_weight, Tensor weight, Tensor position, Tensor seed, float eps, float temperature, "
    f"int stream={TARGET_STREAM}, int? top_k=None, float? top_p=None, Tensor? ancestors=None) "
    "-> (Tensor token, Tensor confidence)",
    _fake_head,
    _example_of_sample_head,
)

# ---- look_up, weigh


def _example_of_look_up(given: Inputs, n: int, k: int) -> Arguments:
    text = torch.arange(given.length, device=given.device) % 7
    arrivals = torch.zeros(2, dtype=torch.int64, device=given.device)
    return (text, given.integers(given.length), given.rows - 1, 3), {"arrivals": arrivals}


LOOK_UP = Operation(
    look_up,
    "(Tensor text, Tensor length, int most, int least) -> (Tensor tokens, Tensor matched)",
    lambda text, length, most, least: Match.empty(most, text.device),
    _example_of_look_up,
)


def _example_of_weigh(given: Inputs, n: int, k: int) -> Arguments:
    thresholds = torch.full((given.rows - 1,), 0.5, device=given.device)
    lengths = given.integers(given.length), given.integers(given.length + 20)
    return (given.integers(9), thresholds, *lengths, Experience.none((3, 9), (0.8, 0.9), given.device)), {}


WEIGH = Operation(weigh, example=_example_of_weigh)

# ---- accept


def _example_of_accept(given: Inputs, n: int, k: int) -> Arguments:
    target = torch.arange(given.rows, device=given.device)
    limit = given.integers(given.length + given.rows)
    confidence = torch.ones(given.rows, dtype=torch.float32, device=given.device)
    tokens = target[1:], target, given.integers(-1, -2)
    return (*tokens, given.integers(given.length), limit), {"confidence": confidence}


ACCEPT = Operation(
    accept,
    "(Tensor draft, Tensor target, Tensor stop_tokens, Tensor length, Tensor limit, Tensor? confidence=None) -> Tensor",
    lambda draft, *_, **__: draft.new_empty(3),
    _example_of_accept,
)

# ---- rank, grow, walk, straighten


def _example_of_rank(given: Inputs, n: int, k: int) -> Arguments:
    logits = torch.randn(given.rows, n, device=given.device)
    return (logits, min(4, n), given.integers(given.length)), {"temperature": 0.8, "seed": given.integers(7)}


def _example_of_grow(given: Inputs, n: int, k: int) -> Arguments:
    device, threshold = given.device, torch.full((1,), 0.2, device=given.device)
    tokens, confidences = torch.arange(4, device=device)[None], torch.full((1, 4), 0.25, device=device)
    hint = Hint(torch.arange(MAX_ROWS, device=device), given.integers(5), threshold)
    numbers = Tree.root(MAX_ROWS, device), Ranked(tokens, confidences), 0, 3, threshold
    flags, following = torch.zeros(4, dtype=torch.int32, device=device).split((3, 1))
    return numbers, {"hint": hint, "flags": flags, "following": following}


def _example_of_walk(given: Inputs, n: int, k: int) -> Arguments:
    rows, device = given.rows, given.device
    ancestors = torch.tensor([1, *(1 | 1 << row for row in range(1, rows))], dtype=torch.int32, device=device)
    target = torch.arange(rows, 0, -1, device=device)
    lengths = given.integers(given.length), given.integers(given.length + rows)
    return (target[1:], target, ancestors, given.integers(-1, -2), *lengths), {}


def _example_of_straighten(given: Inputs, n: int, k: int) -> Arguments:
    keys, _ = given.caches()
    path = torch.arange(given.rows, device=given.device)
    path[-1:] += 1
    return (path, given.integers(0), keys), {}


RANK = Operation(rank, example=_example_of_rank)
GROW = Operation(grow, example=_example_of_grow)
WALK = Operation(walk, example=_example_of_walk)
STRAIGHTEN = Operation(straighten, example=_example_of_straighten)

# ---- commit


def _example_of_commit(given: Inputs, n: int, k: int) -> Arguments:
    rows, before = given.rows, given.length - given.rows

    def zeros(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=given.device)

    decision, lengths = given.integers(0, before + 1, 0), (given.integers(before), given.integers(given.length))
    states = given.random(rows + 1, k), given.random(n, k), given.random(1, k)
    counted = zeros(rows), zeros(given.length), *lengths, zeros(rows + 2), zeros(rows, torch.int32)
    return (decision, *counted, *states, zeros(RECORD_HEAD + rows)), {}


COMMIT = Operation(commit, example=_example_of_commit)

# ---- the table

OPERATIONS = {
    row.name: row
    for row in (
        QKV_ROPE,
        ATTENTION,
        LINEAR_RESIDUAL,
        GATE_UP,
        TOP1_HEAD,
        SAMPLE_HEAD,
        LOOK_UP,
        WEIGH,
        ACCEPT,
        RANK,
        GROW,
        WALK,
        STRAIGHTEN,
        COMMIT,
        Operation(draft_loop),
    )
}
"""Every operation by its name."""
