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
from ..drafters.kangaroo_with_lookup import KangarooWithLookup
from ..drafters.make import make_drafter
from ..drafters.ways import CHAINS, Way
from ..errors import KangarooError
from ..files import write_text
from ..kangaroo import Kangaroo
from ..request import Settings
from .plots import BLUE, DPI, INK, ORANGE, can_draw, new_axes

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
        _ = self.settings

    @property
    def settings(self) -> list[Settings]:
        """Every setting of chains, in the order in which they are tried."""
        return [self.setting(length, threshold) for threshold in self.thresholds for length in self.lengths]

    def setting(self, length: int, threshold: float) -> Settings:
        """A text's settings with a draft length and a threshold."""
        return Settings(self.max_new_tokens, num_speculative_tokens=length, draft_confidence_threshold=threshold)

    def beside(self, best: Settings, kangaroo: Kangaroo) -> list["Tried"]:
        """The other ways, around the best setting of chains, as far as the pair can draft so."""
        length, threshold = best.num_speculative_tokens or 1, best.draft_confidence_threshold
        assert isinstance(threshold, float | int)
        ways = [Way(prompt_lookup=True), *(Way(rows) for rows in self.trees)]
        found = []
        for way in ways:
            try:
                drafting(kangaroo, Tried(way, best))
            except KangarooError:  # the loop on the device, or the adapter, cannot
                continue
            lengths = (length,) if way.prompt_lookup else sorted({length, max(self.lengths)})
            found += [
                Tried(way, self.setting(each, lower))
                for lower in sorted({threshold, threshold / 2}, reverse=True)
                for each in lengths
            ]
        return found


class Tried(NamedTuple):
    """A way of drafting and a text's settings."""

    way: Way
    settings: Settings


def drafting(kangaroo: Kangaroo, tried: Tried) -> Kangaroo:
    """The same pair, drafting that way.

    Raises:
        KangarooError: it cannot.
    """
    drafter = kangaroo.drafter
    if not isinstance(drafter, KangarooDrafter):
        raise KangarooError("no adapter is loaded; calibration is for adapters.")
    made = make_drafter(kangaroo.target, drafter.adapter, tried.way, drafter.persistent)
    if isinstance(made, KangarooWithLookup):
        made.num_draft_steps = tried.settings.num_speculative_tokens or made.num_draft_steps
    return Kangaroo(kangaroo.target, made, kangaroo.tokenizer, kangaroo.graphs, name=kangaroo.name)


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


def measure(kangaroo: Kangaroo, prompts: list[str], tried: Tried) -> Row:
    """Speed over plain decoding, by the median and the mean over prompts, and acceptance."""
    way, settings = tried
    kangaroo = drafting(kangaroo, tried)
    if way.prompt_lookup:  # the number is the adapter's then; a match may be as long as it is
        settings = replace(settings, num_speculative_tokens=MAX_SPECULATIVE_TOKENS)
    # what a setting needs for the first time (binaries, captured graphs) is not its speed; a graph serves some lengths
    first = sorted(prompts, key=len, reverse=True) if kangaroo.target.backend.resident else prompts[:1]
    for prompt in first:
        for each in (replace(settings, plain=True), settings):
            kangaroo.generate(prompt, each)
    ratios, lengths = [], []
    for prompt in prompts:
        plain = kangaroo.generate(prompt, max_new_tokens=settings.max_new_tokens, plain=True).stats
        drafted = kangaroo.generate(prompt, settings).stats
        ratios.append(drafted.tokens_per_second / plain.tokens_per_second)
        lengths.append(drafted.mean_acceptance_length)
    return {
        "draft_tree": way.draft_tree,
        "prompt_lookup": way.prompt_lookup,
        "num_speculative_tokens": tried.settings.num_speculative_tokens or 0,
        "draft_confidence_threshold": float(tried.settings.draft_confidence_threshold or 0),
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
            done.append((tried, measure(kangaroo, texts, tried)))
            report(stage, len(done), len(tries), f"{done[-1][1]['mean_acceptance_length']:.2f} tokens a step")
        return best_first(done)

    first = measured("calibrating", [Tried(CHAINS, settings) for settings in plan.settings], prompts)
    if first:
        first += measured("other ways", plan.beside(first[0][0].settings, kangaroo), prompts)
        first = best_first(first)
    finals = measured("the best again", [tried for tried, _ in first[: plan.finalists]], prompts * 3)
    again = [tried for tried, _ in finals]
    return [row for _, row in finals + [one for one in first if one[0] not in again]]


def best_first(measured: list[tuple[Tried, Row]]) -> list[tuple[Tried, Row]]:
    """The fastest over plain decoding first."""
    return sorted(measured, key=lambda one: -one[1]["mean_speedup"])


def kind_of(row: Row) -> str:
    """A row's way of drafting, without its numbers."""
    return "trees" if row["draft_tree"] else str(Way(prompt_lookup=bool(row["prompt_lookup"])))


def draw_frontier(file: Path, table: list[Row]) -> bool:
    """Draw tokens a step over what a step costs, in plain steps; False without matplotlib, an optional package.

    What lies above the dotted line is faster than plain decoding.
    """
    if not can_draw():
        return False
    figure, axes = new_axes(4.5)
    for kind, color, marker in (("chains", BLUE, "o"), ("chains and lookup", ORANGE, "D"), ("trees", INK, "^")):
        rows = [row for row in table if kind_of(row) == kind]
        points = [(row["mean_acceptance_length"] / row["mean_speedup"], row["mean_acceptance_length"]) for row in rows]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=22, label=kind)
    cost, tokens = table[0]["mean_acceptance_length"] / table[0]["mean_speedup"], table[0]["mean_acceptance_length"]
    note = f"{table[0]['mean_speedup']:.2f}x plain"
    axes.annotate(note, (cost, tokens), (8, -4), textcoords="offset points", fontweight="bold")
    low, high = (of(*axes.get_xlim(), *axes.get_ylim()) for of in (min, max))
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=":", label="as fast as plain decoding")
    axes.set(xlabel="what a step costs, in steps of plain decoding", ylabel="tokens a step")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=DPI)
    return True


def check_folder(adapter: str | Path) -> Path:
    """The folder of an adapter whose defaults can be written.

    Raises:
        KangarooError: anything else, as the name of a hub's repository.
    """
    if not (Path(adapter) / "config.json").is_file():
        raise KangarooError(f"--write changes an adapter's folder, and {str(adapter)!r} is none; give a local folder.")
    return Path(adapter)


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
