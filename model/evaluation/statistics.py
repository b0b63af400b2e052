"""What the answers of an evaluation say: a row of figures for each category and one for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .answers import Answer, Turn
from .loops import in_loops
from .questions import ALL

RESAMPLES = 2000
"""Of the questions, for an interval."""

Counts = NDArray[np.float64]
"""Sums of what a ratio is made of: ``[questions, 2]``, or ``[questions, 4]`` for a ratio of two ratios."""


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums over questions, with the middle 95 % of what resampled questions give (bootstrap).

    Attributes:
        value: None where there was nothing to divide by.
        low: the interval's lower end; None for a single question, as ``high``.
        high: the upper end.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, counts: Counts) -> "Estimate":
        """The first count over the second; of four counts, that over the same of the third and fourth."""
        value = _ratio(counts.sum(0))
        if not np.isfinite(value):
            return cls(None)
        if len(counts) == 1:
            return cls(round(float(value), 4))
        picks = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
        resampled = _ratio(counts[picks].sum(1))
        low, high = np.percentile(resampled[np.isfinite(resampled)], (2.5, 97.5))
        return cls(*(round(float(each), 4) for each in (value, low, high)))


def _ratio(sums: Counts) -> Counts:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Counts = sums[..., 0] / sums[..., 1]
        return ratio if sums.shape[-1] == 2 else ratio / (sums[..., 2] / sums[..., 3])


@dataclass(frozen=True)
class Row:
    """The figures of some questions.

    Attributes:
        category: of the questions.
        questions: how many there are.
        texts: answers to turns.
        identical: how many of ``texts`` have plain decoding's tokens.
        new_tokens: that Kangaroo wrote.
        looping_share: the share of the new tokens in loops.
        mean_acceptance_length: tokens a step, bonus token included.
        fresh_acceptance_length: the same of the steps that wrote no token of a loop.
        draft_acceptance_rate: accepted drafts / all drafts.
        acceptance_rate_per_position: the share of all steps that accepted a draft there.
        plain_tokens_per_second: prefill left out, as in all that follow.
        kangaroo_tokens_per_second: likewise.
        speedup: Kangaroo's tokens/s over plain decoding's.
        processor_speedup: the same by the time that the steps had processors, which other work on the machine disturbs
            less. On a GPU it says nothing.
        processor_share: that time over the wall time of the steps, of both ways of decoding together.
        num_spec_steps: steps with drafts. This name and those that follow are vLLM's, but for ``num_draft_steps``.
        num_draft_tokens: all drafts.
        num_draft_steps: how often the drafter ran its network for them.
        num_accepted_draft_tokens: accepted drafts.
        acceptance_histogram: how many steps with drafts accepted 0, 1, 2, ... of them.
    """

    category: str
    questions: int
    texts: int
    identical: int
    new_tokens: int
    looping_share: float
    mean_acceptance_length: Estimate
    fresh_acceptance_length: Estimate
    draft_acceptance_rate: Estimate
    acceptance_rate_per_position: list[float]
    plain_tokens_per_second: Estimate
    kangaroo_tokens_per_second: Estimate
    speedup: Estimate
    processor_speedup: Estimate
    processor_share: float
    num_spec_steps: int
    num_draft_tokens: int
    num_draft_steps: int
    num_accepted_draft_tokens: int
    acceptance_histogram: list[int]


def rows(plain: Sequence[Answer], drafted: Sequence[Answer]) -> list[Row]:
    """A row for each category, in order of appearance, and one for all; none without answers.

    Args:
        plain: plain decoding's answers.
        drafted: Kangaroo's, to the same questions.
    """
    pairs = list(zip(plain, drafted, strict=True))
    groups: dict[str, list[tuple[Answer, Answer]]] = {}
    for pair in pairs:
        groups.setdefault(pair[0].question.category, []).append(pair)
    if len(groups) > 1:
        groups[ALL] = pairs
    return [row(category, group) for category, group in groups.items()]


def row(category: str, pairs: Sequence[tuple[Answer, Answer]]) -> Row:
    """The figures of one or more questions; each is a pair of plain decoding's answer and Kangaroo's."""
    plain, drafted = ([answer.turns for answer in side] for side in zip(*pairs, strict=True))
    turns = [turn for each in drafted for turn in each]
    tokens = sum(len(turn.tokens) for turn in turns)
    accepted = np.concatenate([turn.accepted for turn in turns]).astype(int)
    drafts = np.concatenate([turn.drafted for turn in turns]).astype(int)
    histogram = np.bincount(accepted[drafts > 0], minlength=1)
    at_least = histogram[::-1].cumsum()[::-1]  # steps that accepted at least so many
    speeds = [_sums(side, lambda turn: (len(turn.tokens), turn.decode_seconds)) for side in (plain, drafted)]
    costs = [_sums(side, lambda turn: (len(turn.tokens), turn.processor_seconds)) for side in (plain, drafted)]
    return Row(
        category=category,
        questions=len(pairs),
        texts=len(turns),
        identical=len(turns) - sum(len(answer.differences) for _, answer in pairs),
        new_tokens=tokens,
        looping_share=round(sum(sum(in_loops(turn.tokens)) for turn in turns) / max(tokens, 1), 4),
        mean_acceptance_length=Estimate.of(_sums(drafted, lambda turn: (len(turn.tokens), len(turn.lengths)))),
        fresh_acceptance_length=Estimate.of(_sums(drafted, _fresh)),
        draft_acceptance_rate=Estimate.of(_sums(drafted, lambda turn: (sum(turn.accepted), sum(turn.drafted)))),
        acceptance_rate_per_position=[round(float(count) / len(drafts), 4) for count in at_least[1:]],
        plain_tokens_per_second=Estimate.of(speeds[0]),
        kangaroo_tokens_per_second=Estimate.of(speeds[1]),
        speedup=Estimate.of(np.hstack(speeds[::-1])),
        processor_speedup=Estimate.of(np.hstack(costs[::-1])),
        processor_share=round(sum(each[:, 1].sum() for each in costs) / sum(each[:, 1].sum() for each in speeds), 4),
        num_spec_steps=int((drafts > 0).sum()),
        num_draft_tokens=int(drafts.sum()),
        num_draft_steps=sum(sum(turn.draft_steps) for turn in turns),
        num_accepted_draft_tokens=int(accepted.sum()),
        acceptance_histogram=histogram.tolist(),
    )


def _sums(questions: Sequence[Sequence[Turn]], of: Callable[[Turn], tuple[float, float]]) -> Counts:
    """Two numbers of each turn, summed for every question: ``[questions, 2]``."""
    return np.array([np.sum([of(turn) for turn in turns], axis=0) for turns in questions], dtype=np.float64)


def _fresh(turn: Turn) -> tuple[int, int]:
    """Tokens and steps of a turn without the steps that wrote a token of a loop."""
    looping, at, tokens, steps = in_loops(turn.tokens), 0, 0, 0
    for length in turn.lengths:
        if not any(looping[at : at + length]):
            tokens, steps = tokens + length, steps + 1
        at += length
    return tokens, steps


def way_figures(plain: Sequence[Answer], other: Sequence[Answer]) -> dict[str, float]:
    """A way of decoding beside plain decoding: its speed, prefill included, and how many texts are the same."""
    sides = [[turn for answer in side for turn in answer.turns] for side in (plain, other)]
    speeds = [
        sum(len(turn.tokens) for turn in turns) / sum(turn.prefill_seconds + turn.decode_seconds for turn in turns)
        for turns in sides
    ]
    steps = sum(len(turn.lengths) for turn in sides[1])
    return {
        "texts": len(sides[1]),
        "identical": len(sides[1]) - sum(len(answer.differences) for answer in other),
        "tokens_per_second": round(speeds[1], 3),
        "over_plain": round(speeds[1] / speeds[0], 4),
        "mean_acceptance_length": round(sum(len(turn.tokens) for turn in sides[1]) / steps, 4),
    }
