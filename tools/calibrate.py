"""Find the draft length and the confidence threshold that make a pair fastest on this machine.

    python tools/calibrate.py --model DIR --adapter DIR --prompts FILE [--write]

Every setting decodes the same prompts; each prompt's plain decoding is timed beside it, so the ratio of a slow minute
is that of a fast one. ``--write`` puts the best setting into the adapter's ``config.json`` as its default, the whole
table into ``calibration.json`` beside it. Use prompts that the pair is not judged by.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.commands.show import training_bars

Row = dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """Which settings are tried, the likeliest first.

    Attributes:
        lengths: draft lengths; every one is tried with every threshold, all lengths of a threshold in turn.
        new_tokens: of a decode.
        finalists: how many of the best are measured again, three times over, for their differences are small.
    """

    lengths: tuple[int, ...] = (4, 3, 5, 6, 2, 8)
    thresholds: tuple[float, ...] = (0.6, 0.5, 0.7, 0.3, 0.8, 0.9, 0.0)
    new_tokens: int = 128
    finalists: int = 8


def measure(kangaroo: Kangaroo, prompts: list[str], length: int, threshold: float, new_tokens: int) -> Row:
    """Speed of one setting over plain decoding (median over prompts), and its mean acceptance length."""
    drafting: dict[str, Any] = {"num_speculative_tokens": length, "draft_confidence_threshold": threshold}
    # what a setting needs for the first time (binaries, captured graphs) is not its speed
    kangaroo.generate(prompts[0], max_new_tokens=new_tokens, **drafting)
    ratios, lengths = [], []
    for prompt in prompts:
        plain = kangaroo.generate(prompt, max_new_tokens=new_tokens, plain=True).stats
        drafted = kangaroo.generate(prompt, max_new_tokens=new_tokens, **drafting).stats
        ratios.append(drafted.tokens_per_second / plain.tokens_per_second)
        lengths.append(drafted.mean_acceptance_length)
    return {
        **drafting,
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
    """The settings' figures, best first, the finalists before the others.

    After ``deadline`` (as ``time.perf_counter`` counts) no more are measured: there may be none. ``report`` is told
    ``(stage, done, total, note)`` after every one.
    """

    def rows(stage: str, settings: list[tuple[int, float]], texts: list[str]) -> list[Row]:
        done: list[Row] = []
        for setting in settings:
            if time.perf_counter() > deadline:
                break
            done.append(measure(kangaroo, texts, *setting, plan.new_tokens))
            report(stage, len(done), len(settings), f"{done[-1]['mean_acceptance_length']:.2f} tokens a step")
        return sorted(done, key=lambda row: -row["mean_speedup"])

    first = rows("calibrating", [(length, bar) for bar in plan.thresholds for length in plan.lengths], prompts)
    best = [(int(row["num_speculative_tokens"]), row["draft_confidence_threshold"]) for row in first[: plan.finalists]]
    finals = rows("the best again", best, prompts * 3)
    return finals + [row for row in first if setting_of(row) not in map(setting_of, finals)]


def setting_of(row: Row) -> tuple[float, float]:
    """Draft length and threshold."""
    return row["num_speculative_tokens"], row["draft_confidence_threshold"]


def write_defaults(adapter: Path, table: list[Row]) -> None:
    """Make the table's first row the adapter's defaults, and keep the table they come from."""
    path = adapter / "config.json"
    values: dict[str, Any] = json.loads(path.read_text())
    values["num_speculative_tokens"], values["draft_confidence_threshold"] = setting_of(table[0])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)
    (adapter / "calibration.json").write_text(json.dumps(table, indent=1) + "\n")


def main(
    model: Annotated[str, typer.Option(help="The target's folder or hub name.")],
    adapter: Annotated[Path, typer.Option(help="The adapter's folder.")],
    prompts: Annotated[Path, typer.Option(help="A JSON list of prompts.")],
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a decode.")] = 128,
    write: Annotated[bool, typer.Option(help="Make the best setting the adapter's default.")] = False,
) -> None:
    """Print the table of settings, best first."""
    try:
        try:
            texts = json.loads(prompts.read_text(encoding="utf-8"))
        except ValueError:  # no JSON, or no UTF-8
            texts = None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{prompts} must hold a JSON list of at least one text.")
        with training_bars() as report:
            plan = Calibration(new_tokens=new_tokens)
            rows = calibrate(Kangaroo.from_pretrained(model, adapter), texts, plan, report=report)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:g}" for value in row.values()))
    Console().print(table)
    if write:
        write_defaults(adapter, rows)


if __name__ == "__main__":
    typer.run(main)
