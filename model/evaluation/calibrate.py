"""Find the draft length and the confidence threshold that make a pair fastest on this machine.

Every setting decodes the same prompts; each prompt's plain decoding is timed beside it, so the ratio of a slow minute
is that of a fast one.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import KangarooError
from ..kangaroo import Kangaroo
from ..request import Settings

Row = dict[str, float]
"""What was measured of one setting, by the names of the columns."""


@dataclass(frozen=True)
class Calibration:
    """Which settings are tried, the likeliest first.

    Attributes:
        lengths: draft lengths; every one is tried with every threshold, all lengths of a threshold in turn.
        thresholds: of the draft's confidence.
        max_new_tokens: of a decode.
        finalists: how many of the best are measured again, three times over, for their differences are small.

    Raises:
        KangarooError: a setting out of its range.
    """

    lengths: tuple[int, ...] = (4, 3, 5, 6, 2, 8)
    thresholds: tuple[float, ...] = (0.6, 0.5, 0.7, 0.3, 0.8, 0.9, 0.0)
    max_new_tokens: int = 128
    finalists: int = 8

    def __post_init__(self) -> None:
        _ = self.settings

    @property
    def settings(self) -> list[Settings]:
        """Every setting, in the order in which they are tried."""
        return [
            Settings(self.max_new_tokens, num_speculative_tokens=length, draft_confidence_threshold=threshold)
            for threshold in self.thresholds
            for length in self.lengths
        ]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a JSON list of texts.

    Raises:
        KangarooError: the file holds anything else.
    """
    try:
        texts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no UTF-8
        texts = None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise KangarooError(f"{file} must hold a JSON list of at least one text.")
    return texts


def measure(kangaroo: Kangaroo, prompts: list[str], settings: Settings) -> Row:
    """Speed of one setting over plain decoding, by the median and the mean over prompts, and its acceptance."""
    # what a setting needs for the first time (binaries, captured graphs) is not its speed
    kangaroo.generate(prompts[0], settings)
    ratios, lengths = [], []
    for prompt in prompts:
        plain = kangaroo.generate(prompt, max_new_tokens=settings.max_new_tokens, plain=True).stats
        drafted = kangaroo.generate(prompt, settings).stats
        ratios.append(drafted.tokens_per_second / plain.tokens_per_second)
        lengths.append(drafted.mean_acceptance_length)
    return {
        "speedup": round(statistics.median(ratios), 4),
        "mean_speedup": round(statistics.fmean(ratios), 4),
        "mean_acceptance_length": round(statistics.fmean(lengths), 4),
    }


def calibrate(
    kangaroo: Kangaroo,
    prompts: list[str],
    plan: Calibration,
    deadline: float = math.inf,
    report: Callable[[str, int, int, str], None] = lambda *_: None,
) -> list[Row]:
    """The settings' figures, best first, the finalists before the others.

    After ``deadline`` (as ``time.perf_counter`` counts) no more are measured: there may be none. ``report`` is told
    ``(stage, done, total, note)`` after every one.
    """

    def measured(stage: str, tried: list[Settings], texts: list[str]) -> list[tuple[Settings, Row]]:
        done: list[tuple[Settings, Row]] = []
        for settings in tried:
            if time.perf_counter() > deadline:
                break
            done.append((settings, measure(kangaroo, texts, settings)))
            report(stage, len(done), len(tried), f"{done[-1][1]['mean_acceptance_length']:.2f} tokens a step")
        return sorted(done, key=lambda one: -one[1]["mean_speedup"])

    first = measured("calibrating", plan.settings, prompts)
    finals = measured("the best again", [settings for settings, _ in first[: plan.finalists]], prompts * 3)
    again = [settings for settings, _ in finals]
    return [
        {name: getattr(settings, name) for name in ("num_speculative_tokens", "draft_confidence_threshold")} | row
        for settings, row in finals + [one for one in first if one[0] not in again]
    ]


def write_defaults(adapter: Path, table: list[Row]) -> None:
    """Make the table's first row the adapter's defaults, and keep the table they come from."""
    path = adapter / "config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in ("num_speculative_tokens", "draft_confidence_threshold"):
        values[name] = table[0][name]
    values["calibrated"] = True  # from now on they are where draft_confidence_threshold="auto" begins
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    (adapter / "calibration.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
