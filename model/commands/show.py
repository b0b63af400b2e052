"""What the ``kangaroo`` command draws in a terminal: text coloured by origin, tables and progress bars."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.bar import Bar
from rich.box import SIMPLE, SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import Progress as Bars
from rich.progress import TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from ..evaluation.compare import Comparison, summarise
from ..evaluation.report import Report
from ..results import Generation, Progress
from .facts import Environment, Footprint

PROMPT_STYLE, DRAFTED_STYLE, TARGET_STYLE = "dim", "green", "bold yellow"
PROMPT_LINES = 4
BAR_WIDTH = 40
LOG_SECONDS = 10.0
SLOWEST_STEP = 3600.0
"""Seconds over which a bar looks back for its speed; one step of a stage may take minutes."""
SHOWN_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Exit layers of a plan that are listed; its picture has all of them."""
ENDINGS = {
    "length": "the wanted length was reached",
    "stop": "the text came to its end",
    "context": "the model's context is full",
    "timeout": "the time was over",
    "interrupted": "interrupted",
}
"""What each ``finish_reason`` means."""

Item = TypeVar("Item")


def show_legend(console: Console) -> None:
    """Say what the colours of ``show_steps`` mean."""
    console.print(
        Text("   ").join(
            (
                Text("the prompt", PROMPT_STYLE),
                Text("drafted and accepted", DRAFTED_STYLE),
                Text("the target's own", TARGET_STYLE),
            )
        )
    )


def show_steps(console: Console, name: str, prompt: str, steps: Iterable[Progress]) -> None:
    """Print the last lines of a prompt and the text as it comes, each token in the colour of its origin."""
    console.rule(Text(name))
    end_of_prompt = "".join(prompt.splitlines(keepends=True)[-PROMPT_LINES:])
    console.print(Text(end_of_prompt, PROMPT_STYLE), end="", soft_wrap=True)
    for step in steps:
        show_step(console, step)
    console.print()


def show_step(console: Console, step: Progress) -> None:
    """Print what a step added, each token in the colour of its origin."""
    for index, piece in enumerate(step.pieces):
        style = DRAFTED_STYLE if index < step.commit.accepted else TARGET_STYLE
        console.print(Text(piece, style), end="", soft_wrap=True)


def summary(generation: Generation) -> str:
    """A line about one decode."""
    stats = generation.stats
    facts = [f"{stats.new_tokens} tokens in {stats.decode_seconds:.2f} s ({stats.tokens_per_second:.0f} tokens/s)"]
    if stats.drafted:
        facts.append(f"{stats.mean_acceptance_length:.2f} tokens a verification step")
        facts.append(f"{stats.draft_acceptance_rate:.0%} of the drafts accepted")
    if stats.drafted and stats.steps_without_drafts:
        facts.append(f"{stats.steps_without_drafts / stats.verification_steps:.0%} of the steps without drafts")
    return f"{', '.join(facts)}; {ENDINGS[generation.finish_reason or 'interrupted']}."


def show_comparisons(console: Console, comparisons: Sequence[Comparison]) -> None:
    """A row for each prompt and one for all, the acceptance rates as bars, and whether the tokens agree."""
    if not comparisons:
        return
    total = summarise(comparisons)
    console.print(comparison_table(comparisons, total))
    console.print(Text("\nacceptance rate per position", "bold"))
    console.print(acceptance_bars(total.stats.acceptance_rate_per_position))
    console.print(Text.assemble("\nidentical: ", ("yes", "bold green") if total.identical else ("no", "bold red")))


def comparison_table(comparisons: Sequence[Comparison], total: Comparison) -> Table:
    """A row for each comparison, and ``total`` below if there are several."""
    table = Table(box=SIMPLE_HEAD, padding=0, show_footer=len(comparisons) > 1, footer_style="bold")
    table.add_column("prompt")
    for header in (
        "plain\ntokens/s",
        "Kangaroo\ntokens/s",
        "speedup",
        "mean\nacceptance\nlength",
        "draft\nacceptance\nrate",
        "in\nloops",
        "identical",
    ):
        table.add_column(header, justify="right")
    for comparison in comparisons:
        table.add_row(*_cells(comparison))
    for column, cell in zip(table.columns, _cells(total), strict=True):
        column.footer = cell
    return table


def _cells(comparison: Comparison) -> tuple[str, ...]:
    return (
        escape(comparison.name),
        f"{comparison.plain_tokens_per_second:.0f}",
        f"{comparison.kangaroo_tokens_per_second:.0f}",
        f"{comparison.speedup:.2f}x",
        f"{comparison.stats.mean_acceptance_length:.2f}",
        f"{comparison.stats.draft_acceptance_rate:.0%}",
        f"{comparison.looping_share:.0%}",
        "yes" if comparison.identical else "no",
    )


def acceptance_bars(rates: Sequence[float]) -> Table:
    """A bar for each draft position."""
    chart = Table.grid(padding=(0, 1))
    chart.add_column(justify="right")
    for position, rate in enumerate(rates, start=1):
        chart.add_row(str(position), Bar(1, 0, rate, width=BAR_WIDTH, color=DRAFTED_STYLE), f"{rate:.0%}")
    return chart


def show_evaluation(console: Console, out: Path, report: Report) -> None:
    """The tables of an evaluation, and what must be known of them."""
    if not report.rows:
        return
    console.print(_table(*report.table(wide=console.width > 120)))
    if len(report.ways) > 2:
        console.print("every way of decoding, prefill included", style="bold")
        console.print(_table(*report.ways_table()))
    for note in report.notes:
        console.print(note)
    console.print(f"Answers, report and pictures are in {out}.", soft_wrap=True)


def _table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0)
    for index, name in enumerate(header):
        table.add_column(name.replace(" ", "\n"), justify="right" if index else "left", no_wrap=True)
    for line in cells:
        table.add_row(*map(escape, line))
    return table


def show_environment(console: Console, here: Environment) -> None:
    """Versions, devices and what is supported."""
    versions = {name: number or "not installed" for name, number in here.versions.items()}
    _show_facts(console, "here", {**versions, **here.devices})
    supported = {name.replace("_", " "): ", ".join(values) for name, values in here.supported.items()}
    _show_facts(console, "supported", {"operations": here.operations, **supported})


def show_footprint(console: Console, cost: Footprint) -> None:
    """A model's shape and costs."""
    facts = {}
    for name, value in vars(cost).items():
        if value is not None:
            text = f"{value:,}" if isinstance(value, int) else value
            facts[name.replace("_", " ")] = decimal(value, precision=2) if "bytes" in name else text
    _show_facts(console, "model", facts)


def show_plan(
    console: Console,
    facts: Mapping[str, Any],
    grid: Mapping[int, Sequence[float]],
    lengths: Sequence[int],
    assumptions: Sequence[str],
) -> None:
    """A plan's figures, the best of some draft lengths behind each exit layer, and what the figures rest on."""
    shown = {}
    for name, value in facts.items():
        text = f"{value:,.2f}" if isinstance(value, float) else str(value)
        shown[name.replace("_", " ")] = decimal(value, precision=2) if "bytes" in name else text
    _show_facts(console, "planned, not measured", shown)
    table = Table("exit layer", "best draft length", "speedup", box=SIMPLE_HEAD)
    for depth in sorted({*SHOWN_DEPTHS, facts["exit_layer"], max(grid)} & grid.keys()):
        best = max(lengths, key=lambda length: grid[depth][length - 1])
        table.add_row(str(depth), str(best), f"{grid[depth][best - 1]:.2f}x")
    console.print(table)
    for sentence in assumptions:
        console.print(Text(f"- {sentence}"))


def show_training(console: Console, out: Path, report: Mapping[str, Any]) -> None:
    """The figures of a training report."""
    shown = {
        name: f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        for name, value in report.items()
        if isinstance(value, int | float)
    }
    _show_facts(console, f"adapter in {out}", {name.replace("_", " "): value for name, value in shown.items()})


def _show_facts(console: Console, title: str, facts: Mapping[str, str]) -> None:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE, show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(value))
    console.print(table)


def track(items: Iterable[Item], name: str, total: int) -> Iterator[Item]:
    """Pass ``items`` on, with a bar on stderr that is drawn between them only.

    A thread that draws would disturb what is timed meanwhile.
    """
    console = Console(stderr=True)
    with Bars(console=console, disable=not console.is_terminal, auto_refresh=False, transient=True) as bars:
        task = bars.add_task(name, total=total)
        bars.refresh()
        for item in items:
            bars.advance(task)
            bars.refresh()
            yield item


def show_rows(console: Console, rows: Sequence[Mapping[str, float]]) -> None:
    """A table of at least one row, whose columns have the names of its figures."""
    table = Table(*rows[0], box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(f"{value:g}" for value in row.values()))
    console.print(table)


@contextmanager
def training_bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """What a long work is doing, on stderr: call it with ``(stage, done, total, note)``.

    A terminal gets a bar for each stage, with the time it has left; anything else gets a line now and then.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Log()
        return
    columns = (*Bars.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Bars(*columns, console=console, speed_estimate_period=SLOWEST_STEP) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=done, note=note)

        yield show


class Log:
    """Lines on stderr: the first and the last of each stage, and one every ten seconds between."""

    def __init__(self) -> None:
        self.began: dict[str, tuple[float, int]] = {}
        self.said_at = -math.inf

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """Take what ``training_bars`` takes."""
        now, is_new = time.perf_counter(), stage not in self.began
        began, first = self.began.setdefault(stage, (now, done))
        if not is_new and done < total and now - self.said_at < LOG_SECONDS:
            return
        self.said_at = now
        left = f"{(now - began) * (total - done) / (done - first):.0f} s left" if first < done < total else ""
        said = ", ".join(part for part in (f"{stage} {done / total:.0%}", note, left) if part)
        print(said, file=sys.stderr, flush=True)
