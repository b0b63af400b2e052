"""Find the draft length and the confidence threshold that make a pair fastest on this machine.

    python tools/calibrate.py --model DIR --adapter DIR --prompts FILE [--write]

Every setting decodes the same prompts; each prompt's plain decoding is timed beside it, so the ratio of a slow minute
is that of a fast one. ``--write`` puts the best setting into the adapter's ``config.json`` as its default, the whole
table into ``calibration.json`` beside it. Use prompts that the pair is not judged by.
"""

import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kangaroo_kernels import Kangaroo

DRAFT_LENGTHS = (2, 3, 4, 5, 6, 8)
THRESHOLDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)

FINALISTS = 8


def measure(kangaroo: Kangaroo, prompts: list[str], length: int, threshold: float, new_tokens: int) -> dict[str, float]:
    """Speed of one setting over plain decoding (median over prompts), and its mean acceptance length."""
    ratios, lengths = [], []
    for prompt in prompts:
        plain = kangaroo.generate(prompt, max_new_tokens=new_tokens, plain=True).stats
        drafted = kangaroo.generate(
            prompt,
            max_new_tokens=new_tokens,
            num_speculative_tokens=length,
            draft_confidence_threshold=threshold,
        ).stats
        ratios.append(drafted.tokens_per_second / plain.tokens_per_second)
        lengths.append(drafted.mean_acceptance_length)
    return {
        "num_speculative_tokens": length,
        "draft_confidence_threshold": threshold,
        "speedup": round(statistics.median(ratios), 4),
        "mean_speedup": round(statistics.fmean(ratios), 4),
        "mean_acceptance_length": round(statistics.fmean(lengths), 4),
    }


def calibrate(kangaroo: Kangaroo, prompts: list[str], new_tokens: int) -> list[dict[str, float]]:
    """Every setting's figures, best first; the best few are measured again, for their differences are small."""
    kangaroo.generate(prompts[0], max_new_tokens=new_tokens)  # warms up
    settings = [(length, threshold) for length in DRAFT_LENGTHS for threshold in THRESHOLDS]
    rows = [measure(kangaroo, prompts, *setting, new_tokens) for setting in track(settings, "calibrating")]
    rows.sort(key=lambda row: -row["mean_speedup"])
    again = [(int(row["num_speculative_tokens"]), row["draft_confidence_threshold"]) for row in rows[:FINALISTS]]
    finals = [measure(kangaroo, prompts * 3, *setting, new_tokens) for setting in track(again, "the best again")]
    return sorted(finals, key=lambda row: -row["mean_speedup"]) + rows[FINALISTS:]


def calibrate_until(
    deadline: float, kangaroo: Kangaroo, prompts: list[str], new_tokens: int, settings: Sequence[tuple[int, float]]
) -> Iterator[dict[str, float]]:
    """As many settings' figures as there is time for, each measured once, in the order given: the likeliest first.

    ``deadline`` is on ``time.perf_counter``'s scale.
    """
    for length, threshold in settings:
        if time.perf_counter() > deadline:
            return
        # what a setting needs for the first time (binaries, captured graphs) is not its speed
        kangaroo.generate(
            prompts[0],
            max_new_tokens=new_tokens,
            num_speculative_tokens=length,
            draft_confidence_threshold=threshold,
        )
        yield measure(kangaroo, prompts, length, threshold, new_tokens)


def show(rows: list[dict[str, float]]) -> None:
    """Print the table."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:g}" for value in row.values()))
    Console().print(table)


def write_defaults(adapter: Path, best: dict[str, float], table: list[dict[str, float]]) -> None:
    """Set the adapter's defaults and keep the table they come from."""
    path = adapter / "config.json"
    values: dict[str, Any] = json.loads(path.read_text())
    for name in ("num_speculative_tokens", "draft_confidence_threshold"):
        values[name] = best[name]
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
        rows = calibrate(Kangaroo.from_pretrained(model, adapter), texts, new_tokens)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    show(rows)
    if write:
        write_defaults(adapter, rows[0], rows)


if __name__ == "__main__":
    typer.run(main)
