"""The picture of a plan; matplotlib, an optional package, draws it."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import KangarooError
from .plan import Plan


def plot_plan(plan: Plan, grid: Mapping[int, Sequence[float]], path: Path) -> None:
    """Draw the speedup over plain decoding by exit layer and draft length.

    Raises:
        KangarooError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise KangarooError("a picture needs matplotlib; pip install matplotlib, or leave --picture out.")
    from matplotlib.figure import Figure  # pyplot would look for a screen

    depths, lengths = list(grid), range(1, len(next(iter(grid.values()))) + 1)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(lengths, depths, list(grid.values()), cmap="viridis", shading="nearest")
    lines = axes.contour(lengths, depths, list(grid.values()), colors="white") if len(depths) > 1 else None
    if lines is not None:
        axes.clabel(lines, fmt="%.2f")
    axes.set_xlabel("most drafts a step")
    axes.set_ylabel("exit layer")
    cards = f"{plan.cards} x {plan.machine.name}" if plan.cards > 1 else plan.machine.name
    axes.set_title(f"{plan.shape.name} on {cards}: speedup planned, not measured", fontsize=10)
    figure.colorbar(image, label="speedup over plain decoding")
    figure.savefig(path, dpi=120)
