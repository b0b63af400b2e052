"""Plain decoding and Kangaroo on the same prompt, timed in turns, so that a slow minute is slow for both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import median
from typing import Any

from ..errors import KangarooError
from ..kangaroo import Kangaroo
from ..request import Settings
from ..results import DecodeStats
from .loops import looping_tokens


@dataclass(frozen=True)
class Comparison:
    """Plain decoding and Kangaroo compared on one prompt, or on several together.

    Attributes:
        name: of the prompt.
        plain_tokens_per_second: of plain decoding; prefill left out.
        kangaroo_tokens_per_second: of Kangaroo decoding; prefill left out.
        speedup: Kangaroo's speed over the plain one.
        identical: whether every run, plain and Kangaroo, gave the same tokens.
        stats: counts of one Kangaroo run.
        looping: how many of its tokens are in loops (``loops.looping_tokens``).
    """

    name: str
    plain_tokens_per_second: float
    kangaroo_tokens_per_second: float
    speedup: float
    identical: bool
    stats: DecodeStats
    looping: int

    @property
    def looping_share(self) -> float:
        """The share of the new tokens that are in loops."""
        return self.looping / self.stats.new_tokens if self.stats.new_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name, for JSON."""
        stats = self.stats
        return {
            "name": self.name,
            "plain_tokens_per_second": self.plain_tokens_per_second,
            "kangaroo_tokens_per_second": self.kangaroo_tokens_per_second,
            "speedup": self.speedup,
            "identical": self.identical,
            "new_tokens": stats.new_tokens,
            "looping_share": self.looping_share,
            "verification_steps": stats.verification_steps,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "draft_acceptance_rate": stats.draft_acceptance_rate,
            "acceptance_rate_per_position": stats.acceptance_rate_per_position,
            "steps_without_drafts": stats.steps_without_drafts,
            "draft_steps": stats.draft_steps,
        }


def compare(
    kangaroo: Kangaroo,
    prompt: str | Sequence[int],
    settings: Settings | None = None,
    /,
    *,
    name: str = "",
    rounds: int = 3,
    **keywords: Any,
) -> Comparison:
    """Decode ``prompt`` plainly and with Kangaroo, ``rounds`` times in alternation after a run of each to warm up.

    Args:
        kangaroo: a target with its adapter.
        prompt: as for ``Kangaroo.generate``.
        name: of the prompt.
        rounds: each speed is the median of this many runs.
        settings: as for ``Kangaroo.generate``; ``plain`` does not matter.
        keywords: the settings by name, instead.

    Raises:
        KangarooError: a setting or prompt that cannot be used.
    """
    if rounds < 1:
        raise KangarooError(f"rounds is {rounds!r}; it must be a whole number of at least 1.")
    drafting = replace(Settings.of(settings, keywords).with_seed(), plain=False)
    plain = replace(drafting, plain=True)
    warm_up, drafted = kangaroo.generate(prompt, plain), kangaroo.generate(prompt, drafting)
    plain_runs, kangaroo_runs = [], []
    for _ in range(rounds):
        plain_runs.append(kangaroo.generate(prompt, plain))
        kangaroo_runs.append(kangaroo.generate(prompt, drafting))
    plain_speed = median(run.stats.tokens_per_second for run in plain_runs)
    kangaroo_speed = median(run.stats.tokens_per_second for run in kangaroo_runs)
    return Comparison(
        name,
        plain_speed,
        kangaroo_speed,
        speedup=kangaroo_speed / plain_speed if plain_speed else 0.0,
        identical=all(run.tokens == warm_up.tokens for run in (drafted, *plain_runs, *kangaroo_runs)),
        stats=drafted.stats,
        looping=looping_tokens(drafted.tokens),
    )


def summarise(comparisons: Sequence[Comparison]) -> Comparison:
    """Sum up one or more comparisons: median speeds and speedup, summed counts, identical if all are."""
    return Comparison(
        "all",
        median(entry.plain_tokens_per_second for entry in comparisons),
        median(entry.kangaroo_tokens_per_second for entry in comparisons),
        speedup=median(entry.speedup for entry in comparisons),
        identical=all(entry.identical for entry in comparisons),
        stats=_add([entry.stats for entry in comparisons]),
        looping=sum(entry.looping for entry in comparisons),
    )


def report(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Each comparison and all together, for JSON."""
    return {
        "prompts": [comparison.as_dict() for comparison in comparisons],
        "total": summarise(comparisons).as_dict() if comparisons else None,
    }


def _add(parts: Sequence[DecodeStats]) -> DecodeStats:
    return DecodeStats(
        new_tokens=sum(part.new_tokens for part in parts),
        verification_steps=sum(part.verification_steps for part in parts),
        drafted=sum(part.drafted for part in parts),
        accepted=sum(part.accepted for part in parts),
        accepted_at=[sum(counts) for counts in zip_longest(*(part.accepted_at for part in parts), fillvalue=0)],
        prefill_seconds=sum(part.prefill_seconds for part in parts),
        decode_seconds=sum(part.decode_seconds for part in parts),
        cached_tokens=sum(part.cached_tokens for part in parts),
        prefilled_tokens=sum(part.prefilled_tokens for part in parts),
        processor_seconds=sum(part.processor_seconds for part in parts),
        steps_without_drafts=sum(part.steps_without_drafts for part in parts),
        draft_steps=sum(part.draft_steps for part in parts),
    )
