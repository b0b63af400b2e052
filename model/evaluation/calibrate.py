"""Find the way of drafting, the draft length and the confidence threshold that make a pair fastest on this machine.

Every setting decodes the same prompts; each prompt's plain decoding is timed beside it, so the ratio of a slow minute
is that of a fast one. Chains are tried with every length and threshold. Chains beside prompt lookup, and trees, are
then tried around the best of them.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..drafters.kangaroo import KangarooDrafter
from ..drafters.make import make_drafter
from ..drafters.ways import CHAINS, Way
from ..errors import KangarooError
from ..files import write_text
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
        trees: the most drafts of trees.
        max_new_tokens: of a decode.
        finalists: how many of the best are measured again, three times over, for their differences are small.

    Raises:
        KangarooError: a setting out of its range.
    """

    lengths: tuple[int, ...] = (4, 3, 5, 6, 2, 8)
    thresholds: tuple[float, ...] = (0.6, 0.5, 0.7, 0.3, 0.8, 0.9, 0.0)
    trees: tuple[int, ...] = (4, 8, 15)
    max_new_tokens: int = 128
    finalists: int = 8

    def __post_init__(self) -> None:
        for tried in self.chains:
            _ = tried.settings(self.max_new_tokens)

    @property
    def chains(self) -> list["Tried"]:
        """Every setting of chains, in the order in which they are tried."""
        return [Tried(CHAINS, length, threshold) for threshold in self.thresholds for length in self.lengths]

    def beside(self, best: "Tried", kangaroo: Kangaroo) -> list["Tried"]:
        """The other ways, around the best setting of chains, as far as the pair can draft so."""
        found = []
        trees = [Way(rows, prompt_lookup=lookup) for lookup in (False, True) for rows in self.trees]
        for way in (Way(prompt_lookup=True), *trees):
            lengths = sorted({best.length, max(self.lengths)}) if way.draft_tree else [best.length]
            thresholds = sorted({best.threshold, best.threshold / 2}, reverse=True)
            tries = [Tried(way, length, threshold) for threshold in thresholds for length in lengths]
            try:
                drafting(kangaroo, tries[0])
            except KangarooError:  # the loop on the device, or the adapter, cannot
                continue
            found += tries
        return found


class Tried(NamedTuple):
    """A way of drafting and its two numbers.

    Attributes:
        way: of drafting.
        length: the most drafts a step that take draft steps; of a tree, the most that follow each other.
        threshold: the confidence below which drafting stops.
    """

    way: Way
    length: int
    threshold: float

    def settings(self, max_new_tokens: int) -> Settings:
        """Of a text that is drafted so. A match may be as long as it is: beside lookup, the length is the adapter's."""
        most = MAX_SPECULATIVE_TOKENS if self.way.prompt_lookup else self.length
        return Settings(max_new_tokens, num_speculative_tokens=most, draft_confidence_threshold=self.threshold)


def drafting(kangaroo: Kangaroo, tried: Tried) -> Kangaroo:
    """The same pair, drafting that way.

    Raises:
        KangarooError: it cannot.
    """
    drafter = kangaroo.drafter
    if not isinstance(drafter, KangarooDrafter):
        raise KangarooError("no adapter is loaded; calibration is for adapters.")
    target, adapter = kangaroo.target, drafter.adapter
    made = make_drafter(target, adapter, tried.way, drafter.persistent, tried.length)
    return Kangaroo(target, made, kangaroo.tokenizer, kangaroo.graphs, name=kangaroo.name)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a JSON list of texts.

    Raises:
        KangarooError: the file holds anything else.
    """
    try:
        texts = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        texts = None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise KangarooError(f"{file} must hold a JSON list of at least one text.")
    return texts


def measure(kangaroo: Kangaroo, prompts: list[str], tried: Tried, max_new_tokens: int) -> Row:
    """Speed over plain decoding, by the median and the mean over prompts, and acceptance."""
    kangaroo, settings = drafting(kangaroo, tried), tried.settings(max_new_tokens)
    undrafted = replace(settings, plain=True)
    # what a setting needs for the first time (binaries, captured graphs) is not its speed; a graph serves some lengths
    first = sorted(prompts, key=len, reverse=True) if kangaroo.target.backend.resident else prompts[:1]
    for prompt in first:
        for each in (undrafted, settings):
            kangaroo.generate(prompt, each)
    ratios, lengths = [], []
    for prompt in prompts:
        plain = kangaroo.generate(prompt, undrafted).stats
        drafted = kangaroo.generate(prompt, settings).stats
        ratios.append(drafted.tokens_per_second / plain.tokens_per_second)
        lengths.append(drafted.mean_acceptance_length)
    return {
        "draft_tree": tried.way.draft_tree,
        "prompt_lookup": tried.way.prompt_lookup,
        "num_speculative_tokens": tried.length,
        "draft_confidence_threshold": tried.threshold,
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
    """The figures of everything that was tried, best first, the finalists before the others.

    After ``deadline`` (as ``time.perf_counter`` counts) no more are measured: there may be none. ``report`` is told
    ``(stage, done, total, note)`` after every one.
    """

    def measured(stage: str, tries: list[Tried], texts: list[str]) -> list[tuple[Tried, Row]]:
        done: list[tuple[Tried, Row]] = []
        for tried in tries:
            if time.perf_counter() > deadline:
                break
            done.append((tried, measure(kangaroo, texts, tried, plan.max_new_tokens)))
            report(stage, len(done), len(tries), f"{done[-1][1]['mean_acceptance_length']:.2f} tokens a step")
        return best_first(done)

    first = measured("calibrating", [tried for tried in plan.chains if drafts_so_many(kangaroo, tried)], prompts)
    if first:
        first += measured("other ways", plan.beside(first[0][0], kangaroo), prompts)
        first = best_first(first)
    finals = measured("the best again", [tried for tried, _ in first[: plan.finalists]], prompts * 3)
    again = [tried for tried, _ in finals]
    return [row for _, row in finals + [one for one in first if one[0] not in again]]


def drafts_so_many(kangaroo: Kangaroo, tried: Tried) -> bool:
    """Whether a chain may be as long as the setting says; a block has no more drafts than places."""
    drafter = drafting(kangaroo, tried).drafter
    return drafter is not None and drafter.rows(tried.length) == tried.length


def best_first(measured: list[tuple[Tried, Row]]) -> list[tuple[Tried, Row]]:
    """The fastest over plain decoding first."""
    return sorted(measured, key=lambda one: -one[1]["mean_speedup"])


def kind_of(row: Row) -> str:
    """A row's way of drafting, without its numbers."""
    drafts = "trees" if row["draft_tree"] else "chains"
    return f"{drafts} and lookup" if row["prompt_lookup"] else drafts


def write_defaults(adapter: Path, table: list[Row]) -> None:
    """Make the table's first row the adapter's defaults, and keep the table they come from.

    The table is written first: whoever is killed meanwhile leaves no defaults without one.
    """
    path = adapter / "config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in ("num_speculative_tokens", "draft_confidence_threshold"):
        values[name] = table[0][name]
    for name in ("draft_tree", "prompt_lookup"):  # where they are what they are anyway, they stay out
        values.pop(name, None)
        if table[0][name]:
            values[name] = table[0][name]
    values["calibrated"] = True  # from now on they are where draft_confidence_threshold="auto" begins
    write_text(adapter / "calibration.json", json.dumps(table, indent=1) + "\n")
    write_text(path, json.dumps(values, indent=2) + "\n")
