"""Which token a row of logits gives: one rule for target and drafter, greedy or sampled.

The token at absolute position p is a pure function of (logits, seed, p). With ``coupled`` acceptance the drafter uses
the target's noise, and what is accepted is what plain sampling with that seed would have said. ``rejection`` (Leviathan
et al., arXiv 2211.17192) draws the drafts with other noise and keeps the target's distribution, not its tokens.
"""

from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import ACCEPT_STREAM, DRAFT_STREAM, TARGET_STREAM, Top1
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.reference.noise import gumbel_rows, uniform
from kangaroo_kernels.reference.sample_head import filter_logits
from kangaroo_kernels.reference.top1_head import confidence_of, lm_head

from .backend import REFERENCES, Backend
from .errors import KangarooError

ACCEPTANCES = ("coupled", "rejection")


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked; ``temperature=0`` is greedy.

    Raises:
        KangarooError: a setting out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    acceptance: str = "coupled"

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not (self.temperature == 0 or 1e-3 <= self.temperature <= 100):
            raise KangarooError(f"temperature is {self.temperature!r}; it must be 0 (greedy) or from 0.001 to 100.")
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            raise KangarooError(f"top_k is {self.top_k!r}; it must be a whole number of at least 1.")
        if self.top_p is not None and (not is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise KangarooError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1.")
        if not is_whole(self.seed) or not 0 <= self.seed < 1 << 64:
            raise KangarooError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2^64 - 1.")
        if self.acceptance not in ACCEPTANCES:
            raise KangarooError(f"acceptance is {self.acceptance!r}; it must be one of {', '.join(ACCEPTANCES)}.")
        for name in ("temperature", "top_k", "top_p", "seed"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def rejects(self) -> bool:
        """Whether drafts are accepted by rejection sampling; greedy decoding never needs it."""
        return self.acceptance == "rejection" and not self.greedy

    def without_idle_filters(self, vocab_size: int) -> "Sampling":
        """The same with None for a top-k or top-p that keeps every token."""
        top_k = None if self.top_k is not None and self.top_k >= vocab_size else self.top_k
        return replace(self, top_k=top_k, top_p=None if self.top_p is not None and self.top_p >= 1 else self.top_p)

    def filter(self, logits: Tensor) -> Tensor:
        """Temperature, top-k and top-p: ``[M, V]`` to a new ``[M, V]``."""
        return filter_logits(logits, self.temperature, self.top_k, self.top_p)


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number, Python's or NumPy's; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number, Python's or NumPy's; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain_number(value: Any) -> Any:
    """The same as Python's own ``int`` or ``float``; anything else, None for instance, as it is."""
    return int(value) if is_whole(value) else float(value) if is_number(value) else value


class SamplingTensors(NamedTuple):
    """The numbers of a ``Sampling`` in device memory, so that work which is captured once serves all values.

    Attributes:
        temperature: ``[1]`` float32, not read where decoding is greedy.
        top_k: ``[1]`` int64, or None to keep all.
        top_p: ``[1]`` float32, or None to keep all.
        seed: ``[1]`` int64, with the bits of the unsigned seed.
    """

    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    seed: Tensor


class Chooser:
    """Picks tokens for one text: the target's and, from the same noise or its own, the drafter's.

    Args:
        sampling: how tokens are picked.
        backend: the operations that pick them.
        numbers: the numbers of ``sampling`` in device memory, for work that is captured.
    """

    def __init__(
        self, sampling: Sampling, backend: Backend = REFERENCES, numbers: SamplingTensors | None = None
    ) -> None:
        self.sampling, self.backend = sampling, backend
        self.numbers = sampling if numbers is None else numbers
        self.draft_stream = DRAFT_STREAM if sampling.rejects else TARGET_STREAM

    def target(
        self, hidden: Tensor, norm: Tensor, head: Weight, eps: float, position: int | Tensor, out: Top1 | None = None
    ) -> Tensor:
        """The target's tokens at ``position, ...`` from the last layer's output ``[M, hidden]``: ``[M]`` int64."""
        return self._pick(hidden, norm, head, eps, position, TARGET_STREAM, out=out).token

    def draft(
        self, hidden: Tensor, norm: Tensor, head: Weight, eps: float, position: int | Tensor, **step: Any
    ) -> Top1:
        """The drafter's token at ``position`` and its un-tempered top-1 probability; ``step`` goes to the head."""
        return self._pick(hidden, norm, head, eps, position, self.draft_stream, **step)

    def _pick(
        self, hidden: Tensor, norm: Tensor, head: Weight, eps: float, position: int | Tensor, stream: int, **step: Any
    ) -> Top1:
        numbers, operations = self.numbers, self.backend.for_rows(hidden.shape[0])
        if self.sampling.greedy:
            return operations.top1_head(hidden, norm, head, eps=eps, **step)
        return operations.sample_head(
            hidden,
            norm,
            head,
            position,
            eps=eps,
            temperature=numbers.temperature,
            seed=numbers.seed,
            stream=stream,
            top_k=numbers.top_k,
            top_p=numbers.top_p,
            **step,
        )

    def noise(self, stream: int, position: int, logits: Tensor) -> Tensor:
        """Gumbel noise for rows of logits at ``position, ...``: ``[rows, V]``."""
        return gumbel_rows(self.sampling.seed, stream, position, logits.shape[0], logits.shape[1], logits.device)

    def draft_with_distribution(
        self, hidden: Tensor, norm: Tensor, head: Weight, eps: float, position: int
    ) -> tuple[Top1, Tensor]:
        """For rejection sampling: a draft and the distribution it was drawn from, ``[1, V]``."""
        logits = lm_head(hidden, norm, head, eps=eps)
        filtered = self.sampling.filter(torch.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=0.0))
        token = (filtered + self.noise(DRAFT_STREAM, position, logits)).argmax(dim=-1)
        return Top1(token, confidence_of(logits)), torch.softmax(filtered, dim=-1)

    def reject(self, draft: Tensor, draft_distribution: Tensor, target_logits: Tensor, position: int) -> Tensor:
        """Rejection sampling, written as the tokens the target "would have said".

        With the target's distribution ``p_i`` and the draft's ``q_i``, draft ``d_i`` is accepted with probability
        ``min(1, p_i(d_i) / q_i(d_i))``. Otherwise a sample of ``max(p_i - q_i, 0)`` (normalised) takes its place, which
        is never ``d_i``. So the rule for acceptance stays prefix equality.

        Args:
            draft: ``[k]`` int64, the tokens at ``position, ...``.
            draft_distribution: ``[k, V]`` float32, what each was drawn from.
            target_logits: ``[k + 1, V]`` float32.
            position: of the first draft.

        Returns:
            ``[k + 1]`` int64.
        """
        count = len(draft)
        noise = self.noise(TARGET_STREAM, position, target_logits)
        filtered = self.sampling.filter(target_logits)
        tokens = (filtered + noise).argmax(dim=-1)
        if count == 0:
            return tokens
        p = torch.softmax(filtered[:count], dim=-1)
        residual = (p - draft_distribution).clamp_(min=0)
        exhausted = residual.sum(dim=-1, keepdim=True) <= 0  # p equals q up to rounding: any rejection is rounding too
        weights = torch.where(exhausted, p, residual)
        replaced = (weights.log() + noise[:count]).argmax(dim=-1)
        positions = torch.arange(position, position + count, device=draft.device)
        u = uniform(self.sampling.seed, ACCEPT_STREAM, positions, 1)[:, 0]
        p_draft = p.gather(1, draft[:, None])[:, 0]
        q_draft = draft_distribution.gather(1, draft[:, None])[:, 0]
        tokens[:count] = torch.where(u * q_draft < p_draft, draft, replaced)
        return tokens
