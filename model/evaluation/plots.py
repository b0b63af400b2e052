"""An evaluation's pictures: tokens a step, speedup, and acceptance by position. matplotlib is an optional package."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import KangarooError
from .questions import ALL
from .statistics import Estimate, Row

BLUE, GREY, ORANGE, INK = "#2a78d6", "#9aa5b1", "#c4622d", "#333333"
DPI = 150
FORMS = (".png", ".svg", ".pdf")


def check_picture(file: Path) -> None:
    """Raise unless a picture can be written there; its name says in which form."""
    if file.suffix.lower() not in FORMS:
        raise KangarooError(f"the picture {file} must end in {', '.join(FORMS[:-1])} or {FORMS[-1]}.")
    if not file.parent.is_dir():
        raise KangarooError(f"there is no folder {file.parent} for the picture.")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def new_axes(height: float = 3.5, columns: int = 1, width: float = 7.0) -> tuple[Any, Any]:
    """A figure of a size in inches and its axes, in every picture's style."""
    from matplotlib.figure import Figure  # pyplot would look for a screen

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for each in [axes] if columns == 1 else axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw the pictures of at least one row into a folder; none without matplotlib."""
    if not can_draw():
        return []
    files = [out / f"{name}.png" for name in ("acceptance", "speedup", "positions")]
    figure, axes = new_axes(1.4 + 0.32 * len(rows))
    draw_bars(axes, rows, lambda row: row.mean_acceptance_length)
    places = [place for place, row in enumerate(rows) if row.fresh_acceptance_length.value is not None]
    fresh = [rows[place].fresh_acceptance_length.value for place in places]
    axes.plot(fresh, places, "D", color=ORANGE, markersize=5, label="without the steps in loops")
    axes.set(xlabel="tokens a step")
    figure.legend(loc="outside lower right", frameon=False)
    figure.savefig(files[0], dpi=DPI)
    figure, axes = new_axes(1.2 + 0.32 * len(rows))
    draw_bars(axes, rows, lambda row: row.speedup)
    axes.set(xlabel="speed over plain decoding")
    figure.savefig(files[1], dpi=DPI)
    figure, axes = new_axes()
    draw_positions(axes, rows)
    figure.savefig(files[2], dpi=DPI)
    return files


def draw_bars(axes: Any, rows: Sequence[Row], of: Callable[[Row], Estimate]) -> None:
    """A bar and its interval for each row; the dotted line is plain decoding's 1."""
    names, estimates = [row.category for row in rows], [of(row) for row in rows]
    axes.barh(names, [each.value or 0 for each in estimates], color=[GREY if name == ALL else BLUE for name in names])
    for place, each in enumerate(estimates):
        if each.low is not None:
            axes.plot([each.low, each.high], [place, place], color=INK, linewidth=1.5)
        end = max(each.value or 0, each.high or 0)
        style = {"textcoords": "offset points", "va": "center", "bbox": {"fc": "white", "ec": "none", "pad": 1}}
        axes.annotate(f"{each.value or 0:.2f}", (end, place), (5, 0), **style)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlim(left=0)


def draw_positions(axes: Any, rows: Sequence[Row]) -> None:
    """The share of all steps that accepted a draft at each position: a line a category, the last row's in blue."""
    for row in rows:
        rates = row.acceptance_rate_per_position
        is_last, name = row is rows[-1], "each category" if row is rows[0] else None
        style = {"color": BLUE, "label": row.category, "zorder": 3} if is_last else {"color": GREY, "label": name}
        axes.plot(range(1, len(rates) + 1), rates, marker="o", markersize=3, **style)
    axes.set(xlabel="position of the draft", ylabel="share of the steps that accept it", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#dddddd")
    axes.legend(frameon=False)
