"""The picture of one iteration."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
from iteration_profile import PREFIX, StageRun

STAGES = {"draft": "#1f4e79", "draft/shallow": "#5b92bb", "draft/step": "#1f4e79", "verify": "#b5542b"}
OTHER = "#777777"
WIDTH, DPI = 9.0, 130


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
        axes.broken_barh(events, (lane - 0.3, 0.6), color=colour, linewidth=0)
    axes.set(yticks=range(len(lanes)), yticklabels=lanes, xlabel="microseconds", xlim=(0, None))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)  # the picture itself says where and what it is
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
