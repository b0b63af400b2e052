"""The report's pictures: kernels beside the measured ceiling, decode speeds, one iteration, a pair's acceptance."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
from iteration_profile import PREFIX, Event, StageRun

from .job import one_line
from .page import SMOKE_LABEL, kernel_rows

Values = Mapping[str, Any]
BLUES = ("#9db8cc", "#5b92bb", "#1f4e79", "#10293f", "#d9a37a", "#a05a2c")
STAGES = {"draft": BLUES[2], "draft/shallow": BLUES[1], "draft/step": BLUES[2], "verify": "#b5542b"}
OTHER, SKIPPED = "#777777", "#c4c4c4"
WIDTH, DPI, NAME_LENGTH = 9.0, 130, 34


def save(figure: Any, path: Path, title: str) -> None:
    """Say on the picture itself where and what it is, and write it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def bars(axes: Any, groups: Sequence[Any], series: Mapping[str, Mapping[Any, float]]) -> None:
    """Horizontal bars: a group a row, in it a bar a series, where that has a figure."""
    height = 0.8 / max(1, len(series))
    for index, (label, values) in enumerate(series.items()):
        places = [place + index * height for place, group in enumerate(groups) if group in values]
        drawn = axes.barh(
            places, [values[group] for group in groups if group in values], height, color=BLUES[index], label=label
        )
        axes.bar_label(drawn, fmt="{:,.3g}", fontsize=6, padding=2)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], groups, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)


def panels(count: int, rows: int) -> tuple[Any, list[Any]]:
    """A figure with panels one below the other, for so many bars in all."""
    figure, axes = plt.subplots(count, 1, figsize=(WIDTH, count + 0.16 * rows), layout="constrained", squeeze=False)
    return figure, list(axes[:, 0])


def kernels(piece: Values, path: Path, title: str) -> bool:
    """Bandwidth of every kernel at 1 and 8 rows, in percent of the measured ceiling (of a CPU: microseconds)."""
    rows = kernel_rows(piece.get("cells", ()))
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not rows:
        return False
    figure, axes = panels(len(models), 2 * len(rows))
    for panel, model in zip(axes, models, strict=True):
        series: dict[str, dict[str, float]] = {}
        for row in (row for row in rows if row["model"] == model):
            for label, cell in (("1 row", row["one"]), ("8 rows", row["eight"])):
                if cell:
                    share = cell["share_of_ceiling"]
                    value = cell["us"]["p50"] if share is None else 100 * share
                    series.setdefault(label, {})[row["op"]] = value
        bars(panel, [row["op"] for row in rows if row["model"] == model], series)
        panel.set_title(f"{model}: % of the measured read bandwidth", fontsize=9)
    save(figure, path, title + ", kernels in bfloat16")
    return True


def decode(piece: Values, path: Path, title: str) -> bool:
    """Tokens a second, a panel a model, a group a context, a bar a way."""
    cells = [cell for cell in piece.get("cells", ()) if "tokens_per_second" in cell]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    if not cells:
        return False
    figure, axes = panels(len(models), len(cells))
    for panel, model in zip(axes, models, strict=True):
        series: dict[str, dict[str, float]] = {}
        for cell in (cell for cell in cells if cell["model"] == model):
            series.setdefault(cell["way"], {})[f"context {cell['context']:,}"] = cell["tokens_per_second"]
        bars(panel, list(dict.fromkeys(group for values in series.values() for group in values)), series)
        panel.set_title(f"{model}: tokens/s", fontsize=9)
    save(figure, path, title + ", batch 1, random weights, prefill left out")
    return True


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


def timeline(piece: Values, path: Path, title: str) -> bool:
    """The iteration of median length."""
    if not piece.get("median"):
        return False
    stages = [StageRun(**stage | {"events": [Event(*each) for each in stage["events"]]}) for stage in piece["median"]]
    iteration(stages, path, f"{title}, one iteration of {piece['model']}, random weights, synthetic acceptance")
    return True


def pair(piece: Values, path: Path, title: str) -> bool:
    """Speed over plain decoding by prompt, and the acceptance of every position."""
    if "total" not in piece:
        return False
    prompts, total = piece["prompts"], piece["total"]
    names = {row["name"]: "/".join(row["name"].split("/")[-2:])[-NAME_LENGTH:] for row in prompts}
    plain = {row["name"]: row["plain_tokens_per_second"] for row in prompts}
    series = {"Kangaroo": {names[row["name"]]: row["speedup"] for row in prompts}}
    for cell in piece.get("cells", ()):
        if cell.get("tokens_per_second") and plain[cell["prompt"]]:
            speedup = cell["tokens_per_second"] / plain[cell["prompt"]]
            series.setdefault(cell["way"], {})[names[cell["prompt"]]] = speedup
    figure, axes = panels(2, len(series) * len(prompts) + len(total["acceptance_rate_per_position"]))
    bars(axes[0], list(names.values()), series)
    axes[0].set_title(f"speed over plain decoding; Kangaroo's median {total['speedup']:.2f}", fontsize=9)
    rates = {f"position {place}": 100 * rate for place, rate in enumerate(total["acceptance_rate_per_position"], 1)}
    bars(axes[1], list(rates), {"% of the steps": rates})
    axes[1].set_title(f"drafts accepted; {total['mean_acceptance_length']:.2f} tokens a step", fontsize=9)
    save(figure, path, title + ", a trained pair, held-out prompts, batch 1, greedy")
    return True


PLOTS: Mapping[str, Callable[[Values, Path, str], bool]] = {
    "kernels": kernels,
    "decode": decode,
    "timeline": timeline,
    "pair": pair,
}


def draw(report: Values, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Draw what there are figures for: the files' names by part, and a sentence for each that could not be drawn."""
    drawn, trouble = {}, []
    parts = {name: dict(piece) for name, piece in report["parts"].items()}
    if "decode" in parts and "baselines" in parts:
        parts["decode"]["cells"] = [*parts["decode"].get("cells", ()), *parts["baselines"].get("cells", ())]
    for name, plot in PLOTS.items():
        file = f"{name}.png"
        try:
            if plot(parts.get(name, {}), folder / file, SMOKE_LABEL if report["smoke"] else report["gpu"]):
                drawn[name] = file
        except Exception as error:  # a figure that no axis takes: the page and the other pictures are worth more
            trouble.append(f"{file} could not be drawn: {one_line(error)}.")
            plt.close("all")
    return drawn, trouble
