"""The picture of a calibration; matplotlib, an optional package, draws it."""

from pathlib import Path

from .calibrate import Row, kind_of
from .plots import BLUE, DPI, INK, ORANGE, can_draw, new_axes

KINDS = (
    ("chains", BLUE, "o"),
    ("chains and lookup", ORANGE, "D"),
    ("trees", BLUE, "^"),
    ("trees and lookup", ORANGE, "v"),
)
"""The ways of drafting: orange stands for lookup, and triangles for trees."""


def draw_frontier(file: Path, table: list[Row]) -> bool:
    """Draw tokens a step over what a step costs, in plain steps; False without matplotlib, an optional package.

    What lies above the dotted line is faster than plain decoding.
    """
    if not can_draw():
        return False
    figure, axes = new_axes(4.5)
    for kind, color, marker in KINDS:
        rows = [row for row in table if kind_of(row) == kind]
        points = [(row["mean_acceptance_length"] / row["mean_speedup"], row["mean_acceptance_length"]) for row in rows]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=22, label=kind)
    cost, tokens = table[0]["mean_acceptance_length"] / table[0]["mean_speedup"], table[0]["mean_acceptance_length"]
    note = f"{table[0]['mean_speedup']:.2f}x plain"
    # nothing is cheaper with more tokens, so there is room to the left above it
    axes.annotate(note, (cost, tokens), (-6, 4), textcoords="offset points", ha="right", fontweight="bold")
    low, high = (of(*axes.get_xlim(), *axes.get_ylim()) for of in (min, max))
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=":", label="as fast as plain decoding")
    axes.set(xlabel="what a step costs, in steps of plain decoding", ylabel="tokens a step")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=DPI)
    return True
