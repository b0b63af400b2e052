"""What kernels, references and the runtime agree on: numbers and types that are defined here and nowhere else."""

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.packed_weight import Weight

# ---- numbers

MAX_ROWS = 16
"""The most tokens in flight that the kernels take; more of them are a prefill, which the references run."""

MAX_SPECULATIVE_TOKENS = MAX_ROWS - 1
"""The most drafts a step: with the newest token they fill the rows of a verification."""

MAX_STOPS = 1024
"""The most stop tokens that the kernel of ``accept`` takes. One warp compares each with every row in its registers, of
which this number takes 168 per thread; with 4,096 stop tokens they spill."""

WIDEST_HEAD = 128
"""The largest head size for which the kernel of ``draft_loop`` runs on a GPU, in 16 bits. For wider heads the kernel of
``attention`` has 8 warps, which sum in another order, so the two would differ in bits."""

WIDEST_GROUP = 32
"""The most query heads a key-value head for which the kernel of ``draft_loop`` runs on a GPU: those of an adapter's two
rows fill a tile of attention."""

MAX_CHILDREN = 4
"""The most candidates behind a tree's row that a drafter ranks, and the most rows that a tree grows by at once."""

CANDIDATES = 8
"""Places for the candidates behind a row: those that are ranked, and one that lookup expects."""

LEAST_SHARE = 0.02
"""The share below which a candidate is not worth its row."""

LEAST_DOUBT = 1e-6
"""A trained confidence takes no token for less likely than this, or for likelier than one minus this, so that the logit
of its probability is finite."""

NO_TOKEN = -1
"""Stands where there is no token: in a tree's rows of padding, and at the end of the list of stop tokens."""

TARGET_STREAM, DRAFT_STREAM, ACCEPT_STREAM = range(3)
"""Streams of noise, which make the draws at one position independent. The first draws the target's tokens (and those of
a coupled drafter, so that they are the same), the second those of a drafter that draws on its own, and the third
decides whether rejection sampling accepts a draft."""

USUAL_WEIGHT = 3.0
"""How many looked-up tokens of a text itself weigh as much as what is usual in others."""

EXPERIENCE_MEMORY = 0.95
"""What an observation of ``weigh`` counts for after the next step, so what failed is tried again some steps later."""


def seed_bits(seed: int) -> int:
    """A seed from 0 to 2^64 - 1 as the int64 that has the same bits, which is how tensors hold it."""
    seed = index(seed)
    return seed - (1 << 64) if seed >> 63 else seed


# ---- types


class Top1(NamedTuple):
    """The token that a head gives each row.

    Attributes:
        token: ``[M]`` int64.
        confidence: ``[M]`` float32, the most likely token's softmax probability, or the trained confidence where the
            head has one; NaN where the row holds a NaN.
    """

    token: Tensor
    confidence: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "Top1":
        """New, uninitialised memory for ``rows`` rows."""
        return cls(
            torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, dtype=torch.float32, device=device)
        )


class Ranked(NamedTuple):
    """The likeliest tokens behind rows, the likeliest first.

    Attributes:
        tokens: ``[M, C]`` int64.
        confidences: ``[M, C]`` float32, their probabilities; NaN where the row holds a NaN.
    """

    tokens: Tensor
    confidences: Tensor

    @classmethod
    def empty(cls, rows: int, count: int, device: torch.device) -> "Ranked":
        """New, uninitialised memory for ``count`` tokens a row."""
        size = rows, count
        return cls(
            torch.empty(size, dtype=torch.int64, device=device), torch.empty(size, dtype=torch.float32, device=device)
        )


class Hint(NamedTuple):
    """Looked-up tokens that are candidates of a tree, each behind the one before it.

    Attributes:
        tokens: ``[>= R]`` int64, for a tree of R drafts.
        matched: ``[1]`` int64, the length of the match; as many of the tokens are expected.
        sure: ``[1]`` float32, how likely each is to stand behind the one before.
    """

    tokens: Tensor
    matched: Tensor
    sure: Tensor


class Tree(NamedTuple):
    """A tree of drafts while it grows. Row 0 is the newest token, every other row a draft.

    Attributes:
        tokens: ``[R + 1]`` int64; -1 for a row of padding. Row 0's means nothing.
        ancestors: ``[R + 1]`` int32, of each row (``reference/ancestors.py``).
        confidences: ``[R + 1]`` float32, the probability of each row's token behind the row that it follows.
        shares: ``[R + 1]`` float32, the product of these along a row's branch.
        said: ``[R + 1]`` int64, how many of a hint's tokens each row's branch says; -1 where it says others.
        offers: ``[R + 1, 8]`` float32, the shares of the candidates behind each row; 0 where there is none.
        chances: ``[R + 1, 8]`` float32, their confidences.
        offered: ``[R + 1, 8]`` int64, their tokens.
    """

    tokens: Tensor
    ancestors: Tensor
    confidences: Tensor
    shares: Tensor
    said: Tensor
    offers: Tensor
    chances: Tensor
    offered: Tensor

    @classmethod
    def root(cls, rows: int, device: torch.device) -> "Tree":
        """Room for ``rows`` rows, of which the first is there. A tree begins anew without being made anew."""

        def whole(*size: int, value: int = 0) -> Tensor:
            return torch.full(size, value, dtype=torch.int64, device=device)

        def ones(*size: int) -> Tensor:
            return torch.ones(size, device=device)

        sizes = rows, CANDIDATES
        return cls(
            whole(rows),
            whole(rows, value=1).int(),
            ones(rows),
            ones(rows),
            whole(rows),
            ones(*sizes),
            ones(*sizes),
            whole(*sizes),
        )


class Walk(NamedTuple):
    """Where the target's own tokens lead through a tree of drafts.

    Attributes:
        decision: ``[3]`` int64, as ``accept`` decides: drafts agreed, new length, stopped.
        path: ``[R + 1]`` int64: the rows that were walked through, the newest token's first, then 1, 2, ... as in a
            chain, each at its own place.
        tokens: ``[R + 1]`` int64: the target's token after each row of ``path``.
    """

    decision: Tensor
    path: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "Walk":
        """New, uninitialised memory for R + 1 rows."""
        return cls(*(torch.empty(size, dtype=torch.int64, device=device) for size in (3, rows, rows)))


class Match(NamedTuple):
    """Where a text said before what it says at its end.

    Attributes:
        tokens: ``[R]`` int64, what followed there.
        matched: ``[1]`` int64, how many tokens before them are the text's last ones; 0 where there is no match.
    """

    tokens: Tensor
    matched: Tensor

    @classmethod
    def empty(cls, most: int, device: torch.device) -> "Match":
        """New, uninitialised memory for ``most`` tokens."""
        return cls(*(torch.empty(size, dtype=torch.int64, device=device) for size in (most, 1)))


class Experience(NamedTuple):
    """What became of a text's latest drafts, those by lookup and those of a drafter beside it.

    Attributes:
        kinds: ``[K]`` int64, ascending: how many matched tokens make a match of each kind; fewer make none.
        usual: ``[K]`` float64, how often a token stands that follows such a match, in other texts.
        stood: ``[K]`` float64, looked-up tokens of this text that stood; older steps count less and less.
        tried: ``[K]`` float64, those that were compared: all that stood, and the first of a draft that did not.
        beside: ``[1]`` float64, how many of the other drafter's drafts stood in a step.
        latest: ``[3]`` int64, of the step under way: the text's length before it, the length of its match (0 where the
            other drafts), and how many drafts there are (of the other's, whether there are any).
    """

    kinds: Tensor
    usual: Tensor
    stood: Tensor
    tried: Tensor
    beside: Tensor
    latest: Tensor

    @classmethod
    def none(cls, kinds: Sequence[int], usual: Sequence[float], device: torch.device) -> "Experience":
        """That of a text which has not begun."""

        def real(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float64, device=device)

        nothing = [0.0] * len(kinds)
        lengths = [torch.tensor(each, dtype=torch.int64, device=device) for each in (kinds, [0, 0, 0])]
        return cls(lengths[0], real(usual), real(nothing), real(nothing), real([1.0]), lengths[1])

    def forget(self) -> None:
        """Begin another text."""
        for each in (self.stood, self.tried, self.latest):
            each.zero_()
        self.beside.fill_(1.0)


class Weighed(NamedTuple):
    """Which drafts of a step are looked-up tokens.

    Attributes:
        made: ``[R]`` int32, 1 for each that is; all are 0 where the other drafter drafts.
        sure: ``[R]`` float32, how likely each is to stand; 0 where it is not made.
    """

    made: Tensor
    sure: Tensor

    @classmethod
    def empty(cls, most: int, device: torch.device) -> "Weighed":
        """New, uninitialised memory for ``most`` drafts."""
        return cls(
            torch.empty(most, dtype=torch.int32, device=device), torch.empty(most, dtype=torch.float32, device=device)
        )


class DraftVocabulary(NamedTuple):
    """The tokens that a drafter's head has rows for, where it has fewer than the target's (FR-Spec, arXiv 2502.14856).

    The tokens ascend, so the lowest row that has the best score is the lowest token that has it: ties fall as in the
    whole head.

    Attributes:
        tokens: ``[R]`` int32, the token of each row, ascending.
        size: V, of the whole vocabulary.
    """

    tokens: Tensor
    size: int

    def tokens_of(self, rows: Tensor) -> Tensor:
        """The tokens of some rows, int64, in the shape of ``rows``."""
        return self.tokens.index_select(0, rows.flatten()).view(rows.shape).long()

    def spread(self, logits: Tensor) -> Tensor:
        """Logits ``[M, R]`` as those of the whole vocabulary, ``[M, V]`` of the same dtype: -inf for the others."""
        whole = logits.new_full((len(logits), self.size), float("-inf"))
        return whole.index_copy_(1, self.tokens.long(), logits)


class TrainedConfidence(NamedTuple):
    """What makes a drafting head's confidence of its input row x and of p, the most likely token's probability.

    It is ``sigmoid(scale * logit(p) + dot(weight, x / sqrt(mean(x^2) + eps)) + bias)``, with p kept ``LEAST_DOUBT``
    away from 0 and 1, and takes p's place wherever the confidence is reported or compared.

    Attributes:
        weight: ``[K]`` float32; the head's norm weight is already a factor of it.
        scale_bias: ``[2]`` float32, the scale and the bias.
    """

    weight: Tensor
    scale_bias: Tensor


class Record(NamedTuple):
    """The words with which a record of ``commit`` begins; the target's tokens follow.

    Attributes:
        before: length of the text before the iteration.
        reached: length after it.
        agreed: drafts that the target agreed with, also beyond an early end.
        drafted: drafts that were made.
        stopped: 1 if the last committed token is a stop token, else 0.
    """

    before: int
    reached: int
    agreed: int
    drafted: int
    stopped: int


RECORD_HEAD = len(Record._fields)
"""How many words of a record come before the tokens."""


class AttentionBlock(NamedTuple):
    """Pre-norm attention with its residual, and the cache that it attends to.

    Attributes:
        norm: ``[K]``.
        qkv: ``[(H + 2 * H_kv) * D, K]``, as ``qkv_rope`` takes it.
        output: ``[K, H * D]``.
        k_cache: ``[H_kv, T, D]``.
        v_cache: as ``k_cache``.
        table: ``[>= T, 1, D / 2]`` complex64 from ``rope_table``.
        eps: of the norm.
        scale: of the scores.
    """

    norm: Tensor
    qkv: Weight
    output: Weight
    k_cache: Tensor
    v_cache: Tensor
    table: Tensor
    eps: float
    scale: float


class Mlp(NamedTuple):
    """Pre-norm SwiGLU with its residual; its norm has the eps of the attention's before it.

    Attributes:
        norm: ``[K]``.
        gate_up: ``[2 * I, K]``, the gate's rows first.
        down: ``[K, I]``.
    """

    norm: Tensor
    gate_up: Weight
    down: Weight


class Layer(NamedTuple):
    """A decoder layer.

    Attributes:
        attention: the first half.
        mlp: the second; None for an adapter that is attention alone.
    """

    attention: AttentionBlock
    mlp: Mlp | None


class DraftModel(NamedTuple):
    """The drafter and its caches, as ``draft_loop`` takes them.

    Attributes:
        layers: the target's first layers.
        adapter: the layer that runs after them.
        norm: ``[K]``, the adapter's norm before the head.
        head: ``[V, K]``, the target's head, or ``[R, K]``, some rows of it.
        eps: of the adapter's norm.
        embedding: ``[V, K]``, the target's.
        vocabulary: the tokens of the head's rows; None where it has all.
    """

    layers: tuple[Layer, ...]
    adapter: Layer
    norm: Tensor
    head: Weight
    eps: float
    embedding: Tensor
    vocabulary: DraftVocabulary | None = None
