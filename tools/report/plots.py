"""The report's pictures: a roofline with the measured ceilings, decode speeds, one iteration, a pair's acceptance."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
import numpy as np

from .job import one_line
from .page import SMOKE_LABEL, name_of

Values = Mapping[str, Any]

COLOURS = {
    "qkv_rope": "#2f6f9f",
    "attention": "#b5542b",
    "linear_residual": "#6a9f58",
    "gate_up": "#8c6bb1",
    "top1_head": "#c9a227",
    "sample_head": "#7f7f7f",
}
OTHER, SKIPPED = "#444444", "#c4c4c4"
MARKERS = {1: "o", 4: "D", 8: "s", 16: "^"}
WAY_COLOURS = ("#9db8cc", "#5b92bb", "#1f4e79", "#d9c3b0", "#c99a74", "#a05a2c", "#6b4a33")
WIDTH = 9.0
DPI = 130
NAME_LENGTH = 34


def _finish(figure: Any, path: Path, report: Values, what: str) -> None:
    """Say on the picture itself where and what it is, and write it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if report["smoke"]:
        figure.suptitle(SMOKE_LABEL, fontsize=9, color="#a03020")
    else:
        figure.suptitle(f"{report['gpu']}: {what}", fontsize=9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def roofline(report: Values, path: Path) -> bool:
    """Speed over arithmetic intensity, a point a kernel and number of rows, below what the card was measured to do."""
    parts = report["parts"]
    cells = [cell for cell in parts.get("kernels", {}).get("cells", ()) if cell["way"] in ("kernel", "reference")]
    ceilings = parts.get("environment", {}).get("ceilings") or {}
    if not cells or "product_flops" not in ceilings:
        return False
    read, product = ceilings["read_gigabytes_per_second"] * 1e9, ceilings["product_flops"]
    intensities = [cell["flops"] / cell["bytes"] for cell in cells]
    figure, axes = plt.subplots(figsize=(WIDTH, 5.2), layout="constrained")
    reach = np.geomspace(min(intensities) / 2, 4 * max(*intensities, product / read), 200)
    roof = np.minimum(reach * read, product) / 1e12
    axes.plot(
        reach,
        roof,
        color=OTHER,
        linewidth=1.5,
        label=f"measured: {read / 1e9:,.0f} GB/s, {product / 1e12:,.3g} TFLOP/s",
    )
    for cell in cells:
        axes.scatter(
            cell["flops"] / cell["bytes"],
            cell["flops"] / cell["us"] / 1e6,
            s=26,
            color=COLOURS.get(cell["op"], OTHER),
            marker=MARKERS.get(cell["rows"], "x"),
            alpha=0.8,
            zorder=3,
        )
    for op in dict.fromkeys(cell["op"] for cell in cells):
        axes.scatter([], [], s=26, color=COLOURS.get(op, OTHER), label=op)
    for rows in sorted({cell["rows"] for cell in cells}):
        axes.scatter([], [], s=26, color=OTHER, marker=MARKERS.get(rows, "x"), label=f"{rows} row{'s' * (rows > 1)}")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte that must move", ylabel="TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    _finish(figure, path, report, "kernels at real models' shapes, bfloat16")
    return True


def decode(report: Values, path: Path) -> bool:
    """Tokens a second, a panel a model, a group a context, a bar a way."""
    parts = report["parts"]
    pieces = [parts.get(name, {}) for name in ("decode", "baselines")]
    cells = [cell for piece in pieces for cell in piece.get("cells", ()) if "tokens_per_second" in cell]
    if not cells:
        return False
    ways = [*pieces[0].get("ways", ()), *pieces[1].get("ways", ())]
    labels = [name_of(way) for way in pieces[0].get("ways", ())]
    labels += [f"transformers, {way}" for way in pieces[1].get("ways", ())]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    figure, panels = plt.subplots(
        len(models), 1, figsize=(WIDTH, 2.6 * len(models) + 0.8), layout="constrained", squeeze=False
    )
    width = 0.8 / len(ways)
    for axes, model in zip(panels[:, 0], models, strict=True):
        contexts = sorted({cell["context"] for cell in cells if cell["model"] == model})
        for index, (way, label) in enumerate(zip(ways, labels, strict=True)):
            speeds = {cell["context"]: cell for cell in cells if (cell["model"], cell["way"]) == (model, way)}
            places = [group + (index - (len(ways) - 1) / 2) * width for group, c in enumerate(contexts) if c in speeds]
            some = [speeds[context] for context in contexts if context in speeds]
            heights = [cell["tokens_per_second"] for cell in some]
            spread = [
                [h - c["slowest"] for h, c in zip(heights, some, strict=True)],
                [c["fastest"] - h for h, c in zip(heights, some, strict=True)],
            ]
            bars = axes.bar(
                places,
                heights,
                width * 0.92,
                yerr=spread,
                color=WAY_COLOURS[index],
                label=label,
                error_kw={"linewidth": 0.8},
            )
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=2)
        axes.set_xticks(range(len(contexts)), [f"context {context:,}" for context in contexts])
        axes.set_xlim(-0.5, len(contexts) - 0.5)
        axes.set(title=model, ylabel="tokens/s")
        axes.margins(y=0.15)
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, ncols=3, loc="outside lower center")
    _finish(figure, path, report, "batch 1, random weights, prefill left out")
    return True


def timeline(report: Values, path: Path) -> bool:
    """One iteration: a bar an event, coloured by operation, a lane a draft or stage."""
    piece = report["parts"].get("timeline", {})
    events = piece.get("events", ())
    if not events:
        return False
    lanes = list(dict.fromkeys(event["lane"] for event in events))
    figure, axes = plt.subplots(figsize=(WIDTH, 0.36 * len(lanes) + 1.6), layout="constrained")
    bars: dict[str, list[tuple[int, Values]]] = {}
    for event in events:
        op = next((op for op in COLOURS if event["name"].startswith(op)), "other")
        bars.setdefault("skipped" if event["skipped"] else op, []).append((lanes.index(event["lane"]), event))
    for op, some in bars.items():
        axes.barh(
            [lane for lane, _ in some],
            [event["us"] for _, event in some],
            left=[event["start"] for _, event in some],
            height=0.7,
            color={"other": OTHER, "skipped": SKIPPED}.get(op) or COLOURS[op],
            label=op,
        )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    busy = f"{piece['us']:,.0f} us, {piece['busy_us']:,.0f} us of them busy"
    axes.set(xlabel="us", xlim=(0, None), title=f"{piece['model']}, context {piece['context']:,}: {busy}")
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    figure.legend(fontsize=8, ncols=len(bars), loc="outside lower center")
    _finish(figure, path, report, "one iteration, random weights, synthetic acceptance")
    return True


def pair(report: Values, path: Path) -> bool:
    """Speed over plain decoding by prompt, and the acceptance of every position."""
    piece = report["parts"].get("pair", {})
    if "total" not in piece:
        return False
    prompts, total = piece["prompts"], piece["total"]
    plain = {row["name"]: row["plain_tokens_per_second"] for row in prompts}
    ways = {"Kangaroo": {row["name"]: row["speedup"] for row in prompts}}
    for cell in piece.get("cells", ()):
        if cell.get("tokens_per_second") and plain[cell["prompt"]]:
            speeds = ways.setdefault(f"transformers, {cell['way']}", {})
            speeds[cell["prompt"]] = cell["tokens_per_second"] / plain[cell["prompt"]]
    height = max(3.4, 0.17 * len(ways) * len(prompts) + 1.2)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained")
    thickness = 0.8 / len(ways)
    colours = {"Kangaroo": WAY_COLOURS[1], "eager": WAY_COLOURS[3], "static, compiled": WAY_COLOURS[5]}
    for index, (way, speeds) in enumerate(ways.items()):
        left.barh(
            [place + (index - (len(ways) - 1) / 2) * thickness for place, name in enumerate(plain) if name in speeds],
            [speeds[name] for name in plain if name in speeds],
            0.92 * thickness,
            color=colours.get(way.removeprefix("transformers, "), OTHER),
            label=way,
        )
    left.set_yticks(range(len(plain)), ["/".join(name.split("/")[-2:])[-NAME_LENGTH:] for name in plain])
    left.axvline(1, color=OTHER, linewidth=1)
    left.invert_yaxis()
    left.set_title(f"speed over plain decoding; Kangaroo's median {total['speedup']:.2f}", fontsize=10)
    if len(ways) > 1:
        figure.legend(fontsize=8, ncols=len(ways), loc="outside lower left")
    rates = total["acceptance_rate_per_position"]
    right.bar(range(1, len(rates) + 1), [100 * rate for rate in rates], color=WAY_COLOURS[2])
    right.set(
        xlabel="position",
        ylabel="% of the steps",
        ylim=(0, 100),
    )
    right.set_title(f"drafts accepted; {total['mean_acceptance_length']:.2f} tokens a step", fontsize=10)
    right.set_xticks(range(1, len(rates) + 1))
    _finish(figure, path, report, "a trained pair, held-out prompts, batch 1, greedy")
    return True


PLOTS: Mapping[str, tuple[str, Callable[[Values, Path], bool]]] = {
    "kernels": ("roofline.png", roofline),
    "decode": ("decode.png", decode),
    "timeline": ("timeline.png", timeline),
    "pair": ("pair.png", pair),
}


def draw(report: Values, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Draw what there are figures for: the files' names by part, and a sentence for each that could not be drawn."""
    drawn, trouble = {}, []
    for part, (name, plot) in PLOTS.items():
        try:
            if plot(report, folder / name):
                drawn[part] = name
        except Exception as error:  # a figure that no axis takes: the page and the other pictures are worth more
            trouble.append(f"{name} could not be drawn: {one_line(error)}.")
            plt.close("all")
    return drawn, trouble
