"""The pictures of ``experiments.py``, each of its record's rows."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kangaroo_kernels.model.evaluation.plots import BLUE, DPI, GREY, INK, ORANGE, draw_bars, new_axes
from kangaroo_kernels.model.evaluation.statistics import Estimate, Row

Records = Sequence[dict[str, Any]]
SPEEDS = {"speedup": "speed over plain decoding", "processor_speedup": "speed over plain decoding,\nby processor time"}
"""What the picture calls each of the two figures of speed in a row."""


def draw(experiment: str, records: Records, speed: str, file: Path) -> None:
    """Draw an experiment; ``speed`` names the figure of a row that tells it."""
    figure = PICTURES[experiment](records, speed)
    figure.savefig(file, dpi=DPI)


def as_rows(records: Records) -> list[Row]:
    """The figures as ``statistics`` has them."""
    rows = []
    for record in records:
        figures: dict[str, Any] = {"num_draft_steps": None}  # earlier records lack it, and no picture shows it
        figures |= {name: each for name, each in record.items() if name != "settings"}
        figures |= {name: Estimate(**each) for name, each in figures.items() if isinstance(each, dict)}
        rows.append(Row(**figures))
    return rows


def heat_maps(records: Records, speed: str) -> Any:
    """Tokens a step and speed over draft lengths and thresholds; the row of threshold 0 is fixed drafting."""
    figure, axes = new_axes(4.2, columns=2, width=9)
    lengths, thresholds = (
        sorted({record["settings"][name] for record in records})
        for name in ("num_speculative_tokens", "draft_confidence_threshold")
    )
    for panel, (name, title) in zip(
        axes, {"mean_acceptance_length": "tokens a step", **{speed: SPEEDS[speed]}}.items(), strict=True
    ):
        table = [[0.0] * len(lengths) for _ in thresholds]
        for record in records:
            length, threshold = record["settings"].values()
            table[thresholds.index(threshold)][lengths.index(length)] = record[name]["value"]
        panel.imshow(table, cmap="viridis", aspect="auto")
        best = max(map(max, table))
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                bright = value > (best + min(map(min, table))) / 2
                weight = "bold" if value == best else "normal"
                panel.text(
                    x, y, f"{value:.2f}", ha="center", va="center", color="black" if bright else "white", weight=weight
                )
        panel.set(xlabel="most drafts a step", ylabel="confidence threshold", title=title)
        panel.set_xticks(range(len(lengths)), lengths)
        panel.set_yticks(range(len(thresholds)), [f"{each:g}" for each in thresholds])
    return figure


def lines_by_position(records: Records, _: str) -> Any:
    """The share of the steps that accept a draft at each position: a line a point."""
    figure, axes = new_axes()
    for row, colour in zip(as_rows(records), (GREY, BLUE), strict=True):
        rates = row.acceptance_rate_per_position
        label = f"{row.category}: {row.mean_acceptance_length.value:.2f} tokens a step"
        axes.plot(range(1, len(rates) + 1), rates, color=colour, marker="o", label=label)
    axes.set(xlabel="position of the draft", ylabel="share of the steps that accept it", ylim=(0, 1))
    axes.grid(color="#dddddd")
    axes.legend(frameon=False)
    return figure


def lines_by_temperature(records: Records, speed: str) -> Any:
    """Tokens a step, with and without the steps in loops, and speed, for both rules of acceptance."""
    figure, axes = new_axes(columns=2, width=9)
    for rule, colour in (("coupled", BLUE), ("rejection", ORANGE)):
        chosen = [record for record in records if record["settings"]["acceptance"] == rule]
        heats = [record["settings"]["temperature"] for record in chosen]
        for panel, name, style, label in (
            (axes[0], "mean_acceptance_length", "-", rule),
            (axes[0], "fresh_acceptance_length", ":", f"{rule}, without loops"),
            (axes[1], speed, "-", rule),
        ):
            values, low, high = (
                [math.nan if record[name][end] is None else record[name][end] for record in chosen]
                for end in ("value", "low", "high")
            )
            panel.plot(heats, values, style, color=colour, marker="o", label=label)
            if style == "-":
                panel.fill_between(heats, low, high, color=colour, alpha=0.15, linewidth=0)
    axes[0].set(ylabel="tokens a step")
    axes[1].set(ylabel=SPEEDS[speed])
    for panel in axes:
        panel.set(xlabel="temperature")
        panel.grid(color="#dddddd")
        panel.legend(frameon=False)
    return figure


def bars(records: Records, speed: str) -> Any:
    """Tokens a step and speed, a bar a point; the diamonds leave the steps in loops out."""
    rows = as_rows(records)
    figure, axes = new_axes(1.6 + 0.36 * len(rows), columns=2, width=9)
    draw_bars(axes[0], rows, lambda row: row.mean_acceptance_length)
    fresh = [row.fresh_acceptance_length.value for row in rows]
    axes[0].plot(fresh, range(len(rows)), "D", color=ORANGE, markersize=5, zorder=5)  # above the labels
    draw_bars(axes[1], rows, lambda row: getattr(row, speed))
    axes[0].set(xlabel="tokens a step\n(diamonds: without the steps in loops)")
    axes[1].set(xlabel=SPEEDS[speed], yticklabels=[])
    return figure


def lines_by_exit(records: Records, speed: str) -> Any:
    """Tokens a step and speed over the exit layer, with intervals."""
    rows = as_rows(records)
    exits = [int(row.category.split()[-1]) for row in rows]
    figure, axes = new_axes(columns=2, width=9)
    for panel, name, title in ((axes[0], "mean_acceptance_length", "tokens a step"), (axes[1], speed, SPEEDS[speed])):
        estimates = [getattr(row, name) for row in rows]
        panel.plot(exits, [each.value for each in estimates], color=BLUE, marker="o")
        for place, each in zip(exits, estimates, strict=True):
            panel.plot([place, place], [each.low, each.high], color=BLUE, alpha=0.5)
        panel.set(xlabel="exit layer", ylabel=title, xticks=exits)
        panel.grid(color="#dddddd")
    axes[1].axhline(1, color=INK, linewidth=0.8, linestyle=":")
    return figure


PICTURES: dict[str, Callable[[Records, str], Any]] = {
    "drafting": heat_maps,
    "positions": lines_by_position,
    "temperature": lines_by_temperature,
    "domains": bars,
    "adapters": bars,
    "exits": lines_by_exit,
    "forms": bars,
    "ablation": bars,
}
