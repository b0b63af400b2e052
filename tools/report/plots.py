"""The report's pictures: decode speeds, and one iteration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
from iteration_profile import PREFIX, Event, StageRun

from .page import SMOKE_LABEL, Values, decode_cells

BLUES = ("#9db8cc", "#5b92bb", "#1f4e79", "#10293f", "#d9a37a", "#a05a2c")
STAGES = {"draft": BLUES[2], "draft/shallow": BLUES[1], "draft/step": BLUES[2], "verify": "#b5542b"}
OTHER, SKIPPED = "#777777", "#c4c4c4"
WIDTH, DPI = 9.0, 130


def save(figure: Any, path: Path, title: str) -> None:
    """Say on the picture itself where and what it is, and write it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def decode(cells: Sequence[Values], path: Path, title: str) -> None:
    """Tokens a second: a panel a model, a group a context, a bar a way."""
    models, ways = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("model", "way"))
    size = (WIDTH, len(models) + 0.16 * len(cells))
    figure, axes = plt.subplots(len(models), 1, figsize=size, layout="constrained", squeeze=False)
    height = 0.8 / len(ways)
    for panel, model in zip(axes[:, 0], models, strict=True):
        contexts = list(dict.fromkeys(cell["context"] for cell in cells if cell["model"] == model))
        for index, way in enumerate(ways):
            some = [cell for cell in cells if (cell["model"], cell["way"]) == (model, way)]
            places = [contexts.index(cell["context"]) + index * height for cell in some]
            speeds = [cell["tokens_per_second"] for cell in some]
            bars = panel.barh(places, speeds, height, color=BLUES[index], label=way)
            panel.bar_label(bars, fmt="{:,.3g}", fontsize=6, padding=2)
        panel.set_yticks([place + 0.4 for place in range(len(contexts))], [f"context {each:,}" for each in contexts])
        panel.invert_yaxis()
        panel.legend(fontsize=7)
        panel.set_title(f"{model}: tokens/s", fontsize=9)
    save(figure, path, title + ", batch 1, random weights, prefill left out")


def iteration(stages: Sequence[StageRun], path: Path, title: str) -> None:
    """One iteration as a timeline: a lane a stage, a bar an event; what is empty within a stage is gap."""
    begin = stages[0].start
    lanes = list(dict.fromkeys(stage.name.removeprefix(PREFIX) for stage in stages))
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.45 * len(lanes)), layout="constrained")
    for stage in stages:
        name = stage.name.removeprefix(PREFIX)
        lane, colour = lanes.index(name), STAGES.get(name, OTHER)
        axes.broken_barh([(stage.start - begin, stage.us)], (lane - 0.4, 0.8), color=colour, alpha=0.15, linewidth=0)
        events = [(event.start - begin, event.us) for event in stage.events]
        axes.broken_barh(events, (lane - 0.3, 0.6), color=SKIPPED if stage.skipped else colour, linewidth=0)
    axes.set(yticks=range(len(lanes)), yticklabels=lanes, xlabel="microseconds", xlim=(0, None))
    axes.invert_yaxis()
    save(figure, path, title)


def draw(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw what there are figures for: the names of the parts that have a picture, ``<part>.png``."""
    title, drawn = SMOKE_LABEL if report["smoke"] else report["gpu"], []
    if cells := [cell for cell in decode_cells(report["parts"]) if cell.get("tokens_per_second")]:
        decode(cells, folder / "decode.png", title)
        drawn.append("decode")
    line = report["parts"].get("timeline", {})
    if line.get("median"):
        stages = [
            StageRun(**stage | {"events": [Event(*each) for each in stage["events"]]}) for stage in line["median"]
        ]
        about = f"{title}, one iteration of {line['model']}, random weights, synthetic acceptance"
        iteration(stages, folder / "timeline.png", about)
        drawn.append("timeline")
    return drawn
