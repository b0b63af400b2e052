"""Which token a row of logits gives: one rule for target and drafter, greedy or sampled.

The token at absolute position p is a pure function of (logits, seed, p). With ``coupled`` acceptance the drafter uses
the target's noise, and what is accepted is what plain sampling with that seed would have said. ``rejection`` (Leviathan
et al., arXiv 2211.17192) draws the drafts with other noise and keeps the target's distribution, not its tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import DRAFT_STREAM, TARGET_STREAM, Top1
from kangaroo_kernels.reference.noise import gumbel_rows
from kangaroo_kernels.reference.sample_head import filter_logits
from kangaroo_kernels.reference.top1_head import confidence_of

from .backend import REFERENCES, Backend
from .errors import KangarooError
from .head import Head
from .number import is_number, is_whole, plain_number
from .rejection import reject
from .results import TokenLogprobs
from .shaping import NO_SHAPING, Shaping, logprobs_of

ACCEPTANCES = ("coupled", "rejection")
KNOWN_POSITIONS = "rows of logits are chosen from by the loop that the host leads"


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
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not (self.temperature == 0 or 1e-3 <= self.temperature <= 100):
            raise KangarooError(f"temperature is {self.temperature!r}; it must be 0 (greedy) or from 0.001 to 100.")
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            raise KangarooError(f"top_k is {self.top_k!r}; it must be a whole number of at least 1.")
        if self.top_p is not None and (not is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise KangarooError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1.")
        if self.min_p is not None and (not is_number(self.min_p) or not 0 <= self.min_p <= 1):
            raise KangarooError(f"min_p is {self.min_p!r}; it must be a number from 0 to 1.")
        if not is_whole(self.seed) or not 0 <= self.seed < 1 << 64:
            raise KangarooError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2^64 - 1.")
        if self.acceptance not in ACCEPTANCES:
            raise KangarooError(f"acceptance is {self.acceptance!r}; it must be one of {', '.join(ACCEPTANCES)}.")
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def rejects(self) -> bool:
        """Whether drafts are accepted by rejection sampling; greedy decoding never needs it."""
        return self.acceptance == "rejection" and not self.greedy

    @property
    def uses_min_p(self) -> bool:
        """Whether min-p leaves tokens out; greedy decoding never needs it."""
        return bool(self.min_p) and not self.greedy

    def without_idle_filters(self, vocab_size: int) -> "Sampling":
        """The same with None for a top-k or top-p that keeps every token."""
        top_k = None if self.top_k is not None and self.top_k >= vocab_size else self.top_k
        top_p = None if self.top_p is not None and self.top_p >= 1 else self.top_p
        return replace(self, top_k=top_k, top_p=top_p)

    def filter(self, logits: Tensor) -> Tensor:
        """Temperature, top-k, top-p and min-p, in this order: ``[M, V]`` to a new ``[M, V]``.

        Min-p (arXiv 2407.01082) keeps the tokens that are at least ``min_p`` times as likely as the likeliest.
        """
        filtered = filter_logits(logits, self.temperature, self.top_k, self.top_p)
        if self.min_p:
            least = filtered.amax(dim=-1, keepdim=True) + math.log(self.min_p)
            filtered = filtered.masked_fill(filtered < least, -torch.inf)
        return filtered


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


class Choice(NamedTuple):
    """The target's tokens.

    Attributes:
        token: ``[M]`` int64.
        confidence: ``[M]`` float32, the un-tempered top-1 probability; NaN where the row's logits are not finite.
        logits: ``[M, V]`` float32, as the model gave them; None where nobody needed them written.
    """

    token: Tensor
    confidence: Tensor
    logits: Tensor | None = None


class Chooser:
    """Picks tokens for one text: the target's and, from the same noise or its own, the drafter's.

    The backend's heads pick them, without writing logits where they need not. A text that shapes its logits, filters
    them by min-p or wants log-probabilities has rows of logits written by the same kernels instead, and PyTorch picks;
    only the loop led by the host does that.

    Args:
        sampling: how tokens are picked.
        backend: the operations that pick them.
        numbers: the numbers of ``sampling`` in device memory, for work that is captured.
        shaping: what changes logits before; it needs ``text``.
        text: the committed tokens, prompt included; the loop appends to it.
        logprobs: how many likely tokens the log-probabilities of ``target`` name; None leaves them out.
    """

    def __init__(
        self,
        sampling: Sampling,
        backend: Backend = REFERENCES,
        numbers: SamplingTensors | None = None,
        *,
        shaping: Shaping = NO_SHAPING,
        text: Sequence[int] = (),
        logprobs: int | None = None,
    ) -> None:
        self.sampling, self.backend, self.shaping = sampling, backend, shaping
        self.text, self.most_logprobs = text, logprobs
        self.numbers: Sampling | SamplingTensors = sampling if numbers is None else numbers
        self.draft_stream = DRAFT_STREAM if sampling.rejects else TARGET_STREAM
        self.shapes = not shaping.idle or sampling.uses_min_p

    def target(
        self,
        hidden: Tensor,
        head: Head,
        position: int | Tensor,
        *,
        drafted: Sequence[int] = (),
        ancestors: Tensor | None = None,
        out: Top1 | None = None,
    ) -> Choice:
        """The target's tokens at ``position, ...`` from the last layer's output ``[M, hidden]``.

        ``drafted`` are the tokens behind the text that rows 1 and on were drafted for; shaping counts them as text.
        ``ancestors`` are those of a tree, whose rows stand at positions by their depths.
        """
        if not self.shapes and self.most_logprobs is None:
            return Choice(*self._pick(hidden, head, position, TARGET_STREAM, ancestors, out=out))
        assert isinstance(position, int), KNOWN_POSITIONS
        logits = self.logits(hidden, head)
        if ancestors is None:
            token = self._pick_from(logits, position, TARGET_STREAM, drafted)
        else:
            token = self.scores(logits, head, position, drafted, ancestors).argmax(dim=-1)
        return Choice(token, confidence_of(logits), logits)

    def draft(
        self, hidden: Tensor, head: Head, position: int | Tensor, *, drafted: Sequence[int] = (), **step: Any
    ) -> Top1:
        """The drafter's token at ``position`` and the head's confidence, which is un-tempered, ``[1]`` each.

        ``drafted`` are the tokens behind the text so far; ``step`` goes to the head's operation.
        """
        if not self.shapes:
            return self._pick(hidden, head, position, self.draft_stream, **step)
        assert isinstance(position, int), KNOWN_POSITIONS
        logits = self.logits(hidden, head)
        token = self._pick_from(head.whole_rows(logits), position, self.draft_stream, drafted)
        return Top1(token, head.confidence(hidden, logits))

    def logits(self, hidden: Tensor, head: Head) -> Tensor:
        """What the weight's rows give: ``[M, V]`` or ``[M, R]`` float32, with the bits of the backend's heads."""
        narrowed = head.narrow(hidden, self.backend)
        return self.backend.for_rows(len(hidden)).lm_head(narrowed, head.norm, head.weight, eps=head.eps)

    def shaped(self, logits: Tensor, drafted: Sequence[int]) -> Tensor:
        """Every row of ``[M, V]`` shaped for its place: the last row is that after all of ``drafted``."""
        if self.shaping.idle:
            return logits
        known = [len(drafted) - len(logits) + 1 + row for row in range(len(logits))]
        rows = [self.shaping(logits[row : row + 1], [*self.text, *drafted[:count]]) for row, count in enumerate(known)]
        return torch.cat(rows)

    def _pick_from(self, logits: Tensor, position: int, stream: int, drafted: Sequence[int]) -> Tensor:
        """A token a row, each row by itself: its bits do not depend on how many there are."""
        shaped = self.shaped(logits, drafted)
        if self.sampling.greedy:
            return shaped.argmax(dim=-1)
        rows = [
            (self.sampling.filter(shaped[row : row + 1]) + self.noise(stream, position + row, shaped[:1])).argmax(-1)
            for row in range(len(shaped))
        ]
        return torch.cat(rows)

    def scores(self, logits: Tensor, head: Head, position: int, drafted: Sequence[int], ancestors: Tensor) -> Tensor:
        """What ranks the tokens behind rows of a tree, ``[M, V]`` or ``[M, R]`` as ``logits``: the best is chosen.

        They are the shaped logits where decoding is greedy, else filtered ones with the target's noise at the row's
        position. ``position`` is that of the token behind the root, ``drafted`` the tree's tokens in the order of its
        rows, up to the last that the masks of ``ancestors`` name.
        """
        rows, vocabulary = [], head.vocabulary
        for row, mask in enumerate(ancestors.tolist()):
            path = [drafted[each - 1] for each in range(1, mask.bit_length()) if mask >> each & 1]
            one = logits[row : row + 1]
            if not self.shaping.idle:
                one = self.shaping(head.whole_rows(one), [*self.text, *path])
                one = one if vocabulary is None else one[:, vocabulary.tokens]
            if not self.sampling.greedy:
                size = one.shape[1] if vocabulary is None else vocabulary.size
                stream, place = TARGET_STREAM, position + len(path)
                noise = gumbel_rows(self.sampling.seed, stream, place, 1, size, one.device)
                one = self.sampling.filter(one) + (noise if vocabulary is None else noise[:, vocabulary.tokens])
            rows.append(one)
        return torch.cat(rows)

    def logprobs(self, choice: Choice, committed: Sequence[int]) -> list[TokenLogprobs] | None:
        """Of the tokens that were committed, the first ones of ``choice``; None where nobody wants them."""
        if self.most_logprobs is None or choice.logits is None:
            return None
        return logprobs_of(choice.logits, committed, self.most_logprobs)

    def _pick(
        self,
        hidden: Tensor,
        head: Head,
        position: int | Tensor,
        stream: int,
        ancestors: Tensor | None = None,
        **step: Any,
    ) -> Top1:
        numbers, operations = self.numbers, self.backend.for_rows(len(hidden))
        given = head.narrow(hidden, self.backend, step.get("active")), head.norm, head.weight
        step |= {"eps": head.eps, "vocabulary": head.vocabulary, "trained": head.trained}
        if self.sampling.greedy:
            return operations.top1_head(*given, **step)
        return operations.sample_head(
            *given,
            position,
            temperature=numbers.temperature,
            seed=numbers.seed,
            stream=stream,
            top_k=numbers.top_k,
            top_p=numbers.top_p,
            ancestors=ancestors,
            **step,
        )

    def noise(self, stream: int, position: int, logits: Tensor) -> Tensor:
        """Gumbel noise for rows of logits at ``position, ...``: ``[rows, V]``."""
        return gumbel_rows(self.sampling.seed, stream, position, logits.shape[0], logits.shape[1], logits.device)

    def draft_with_distribution(
        self, hidden: Tensor, head: Head, position: int, drafted: Sequence[int] = ()
    ) -> tuple[Top1, Tensor]:
        """For rejection sampling: a draft and the distribution it was drawn from, ``[1, V]``.

        A token without a row has the probability 0. Where the request bars all others, as the ends that come too early,
        the drafter is certain of one that will not stand.
        """
        logits = self.logits(hidden, head)
        finite = head.whole_rows(torch.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=0.0))
        filtered = self.sampling.filter(self.shaped(finite, drafted))
        token = (filtered + self.noise(DRAFT_STREAM, position, filtered)).argmax(dim=-1)
        filtered[0, token] = filtered[0, token].clamp(min=torch.finfo(filtered.dtype).min)
        return Top1(token, head.confidence(hidden, logits)), torch.softmax(filtered, dim=-1)

    def target_or_draft(
        self, hidden: Tensor, head: Head, position: int, draft: Tensor, draft_distribution: Tensor
    ) -> Choice:
        """As ``target``, by rejection sampling; ``reject`` has the rule."""
        logits = self.logits(hidden, head)
        filtered = self.sampling.filter(self.shaped(logits, draft.tolist()))
        tokens = reject(draft, draft_distribution, filtered, position, self.sampling.seed)
        return Choice(tokens, confidence_of(logits), logits)
