"""How often drafts are right, position by position: what ``kangaroo plan`` takes from an evaluation, or the paper's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import KangarooError


@dataclass(frozen=True)
class Profile:
    """How often drafts are right.

    Attributes:
        accepted: the share of steps that accept a draft at each position.
        blind: the share of drafts that are made all the same behind a draft that will be refused.
        source: where the figures come from.
        steps_per_draft: how many draft steps a place's draft takes, 0 to 1; less than 1 where some were looked up, or
            where a tree's rounds ended early.
        rows_per_draft: how many drafts each place has; more than 1 for trees alone.
    """

    accepted: tuple[float, ...]
    blind: float
    source: str
    steps_per_draft: float = 1.0
    rows_per_draft: float = 1.0

    @classmethod
    def of(cls, accepted: Sequence[float], drafts: float, source: str, draft_steps: float | None = None) -> "Profile":
        """From the number of drafts a step: those that are not behind an accepted one were made blindly.

        Where there are more drafts than places, as in a tree, they are shared out over the places, and so are
        ``draft_steps`` a step; None means one for each place.
        """
        before = [1.0, *accepted[:-1]]
        refused = sum(1 - share for share in before)
        blind = (drafts - sum(before)) / refused if refused else 0.0
        places = min(drafts, len(before))
        taken = 1.0 if draft_steps is None else min(draft_steps / places, 1.0)
        return cls(tuple(accepted), min(max(blind, 0.0), 1.0), source, taken, drafts / places)

    @property
    def of_chains(self) -> bool:
        """Whether each draft took a step and has a row, so that fewer drafts a step cost as much less."""
        return self.rows_per_draft == 1 and round(self.steps_per_draft, 2) == 1

    def first(self, most: int) -> tuple[list[float], list[float]]:
        """The share of steps that accept, and that make, each of ``most`` drafts.

        A draft beyond the profile's last is as likely after the one before as that last one was.
        """
        accepted = [1.0, *self.accepted]
        going_on = accepted[-1] / accepted[-2] if accepted[-1] else 0.0
        while len(accepted) <= most:
            accepted.append(accepted[-1] * going_on)
        made = [share + self.blind * (1 - share) for share in accepted[:most]]
        return accepted[1 : most + 1], made


def geometric(length: float, drafts: int, source: str) -> Profile:
    """The profile in which every draft is as likely as the one before, for a mean acceptance length."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**place for place in range(drafts + 1)) < length else (low, middle)
    return Profile(tuple(low**place for place in range(1, drafts + 1)), 0.0, source)


PAPER = geometric(
    1.93,
    6,
    "1.93 tokens a step as in the paper on Vicuna-7B; all drafts equally likely, none made behind a refused one",
)


def read_profile(report: Any, source: str) -> Profile:
    """The profile of a report of ``kangaroo eval``, ``generate --compare`` or ``demo``, all of its texts together.

    Reports of earlier versions do not count draft steps; each of their drafts counts as one.

    Raises:
        KangarooError: it has no acceptance rates, or nothing was drafted.
    """
    row = report if isinstance(report, Mapping) else {}
    try:
        row = row.get("total") or row.get("comparison") or (row.get("categories") or [row])[-1]
        if "acceptance_histogram" in row:
            histogram, steps = row["acceptance_histogram"], row["num_spec_steps"]
            accepted = [sum(histogram[place:]) / steps for place in range(1, len(histogram))]
            drafts, taken = row["num_draft_tokens"] / steps, row.get("num_draft_steps")
        else:
            accepted, steps = row["acceptance_rate_per_position"], row.get("verification_steps")
            drafts, taken = sum(accepted) / row["draft_acceptance_rate"], row.get("draft_steps")
        whose = _describe(report, accepted, source)
        shares = [float(share) for share in accepted] or [0.0]
        if not all(0 <= share <= 1 for share in shares) or not math.isfinite(drafts):
            raise ValueError("a share is no number from 0 to 1")
        return Profile.of(shares, drafts, whose, None if taken is None else taken / steps)
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise KangarooError(
            f"{source} has no acceptance rates, or impossible ones; give the JSON of kangaroo eval or of --compare."
        ) from error


def _describe(report: Any, accepted: Sequence[float], source: str) -> str:
    """Whose drafts they were, where the report says so."""
    settings = report.get("settings")
    model = (settings if isinstance(settings, Mapping) else report).get("model")
    whose = "" if model is None else f"as often right as those of {model}, "
    return f"{whose}{1 + sum(accepted):.2f} tokens a step in the steps that drafted, by {source}"
