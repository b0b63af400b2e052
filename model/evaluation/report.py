"""An evaluation's report: its figures by name for JSON, and as tables for a terminal and for Markdown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .evaluate import KANGAROO, PLAIN, Run
from .race import BUSY
from .statistics import Estimate, Row, rows, way_figures

COLUMNS = (
    "category",
    "questions",
    "tokens a step",
    "without loops",
    "in loops",
    "drafts accepted",
    "plain tokens/s",
    "Kangaroo tokens/s",
    "speedup",
    "by processor time",
    "identical texts",
)
WIDE = {"questions", "by processor time"}
"""Columns that a terminal of 80 characters has no room for, nor for intervals."""
WAYS = ("way of decoding", "tokens/s", "over plain", "tokens a step", "identical texts")
NOTES = """\
Tokens a step are the mean acceptance length; brackets hold 95 % intervals (bootstrap over questions). "Without loops"
leaves out the steps that wrote a token of a stretch that says the same three times. These speeds leave prefill out.
Plain decoding and Kangaroo took turns: step by step on a CPU, text by text on a GPU.
"""
DISTURBED = (
    "The process had a processor for {:.0%} of the time of its steps, so other work disturbed the tokens/s and the "
    "speedup; the speedup by processor time says more."
)
TOO_LONG = "Questions left out, since the model's context cannot hold them"
WAYS_NOTE = "\nEvery way of decoding on the same prompts, prefill included:\n\n"


class Report:
    """The figures of the questions that a run has answered.

    Args:
        run: the folder of the evaluation.
        extra: what else the record shall say, such as the machine.

    Attributes:
        rows: the figures by category.
        ways: those of each way of decoding, by its name.
        differences: every text that is not plain decoding's, as ``Difference`` has it.
        record: all of it, for JSON.
    """

    def __init__(self, run: Run, extra: Mapping[str, Any]) -> None:
        answers = run.answers()
        self.settings, self.left_out = run.settings, run.left_out
        self.rows = rows(answers[PLAIN], answers[KANGAROO])
        self.ways = {way: way_figures(answers[PLAIN], each) for way, each in answers.items()} if self.rows else {}
        self.differences = [
            {"way": way, "question_id": answer.question.question_id, **vars(difference)}
            for way, each in answers.items()
            for answer in each
            for difference in answer.differences
        ]
        self.record = {
            **extra,
            "settings": run.settings,
            "questions": len(run.questions),
            "answered": len(run.done),
            "too_long_for_the_context": run.left_out,
            "categories": [asdict(row) for row in self.rows],
            "ways": self.ways,
            "differences": self.differences,
        }

    @property
    def identical(self) -> bool:
        """Whether Kangaroo wrote plain decoding's tokens everywhere."""
        return all(row.identical == row.texts for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """What a reader of the tables must know."""
        notes = [describe(each) for each in self.differences]
        if self.left_out:
            notes.append(f"{TOO_LONG}: {self.left_out}.")
        if self.rows and self.rows[-1].processor_share < BUSY:
            notes.append(DISTURBED.format(self.rows[-1].processor_share))
        return notes

    def table(self, wide: bool = True) -> tuple[list[str], list[list[str]]]:
        """Header and cells, a line a row; a table that is not wide has no intervals and fewer columns."""
        kept = [index for index, name in enumerate(COLUMNS) if wide or name not in WIDE]
        return [COLUMNS[index] for index in kept], [[_cells(row, wide)[index] for index in kept] for row in self.rows]

    def ways_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells, a line a way of decoding."""
        return list(WAYS), [
            [
                way,
                f"{found['tokens_per_second']:.1f}",
                f"{found['over_plain']:.2f}",
                f"{found['mean_acceptance_length']:.2f}",
                f"{found['identical']} of {found['texts']}",
            ]
            for way, found in self.ways.items()
        ]

    def markdown(self, pictures: Sequence[Path]) -> str:
        """The report as a page; pictures lie beside it."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        page = f"# {self.settings['model']}, evaluated\n\n{settings}.\n\n{_markdown_table(*self.table())}\n{NOTES}"
        if len(self.ways) > 2:
            page += WAYS_NOTE + _markdown_table(*self.ways_table())
        page += "".join(f"\n{note}\n" for note in self.notes)
        return page + "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)

    def write(self, out: Path, pictures: Sequence[Path]) -> None:
        """Write ``report.json`` and ``report.md`` into a folder."""
        (out / "report.json").write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        (out / "report.md").write_text(self.markdown(pictures), encoding="utf-8")


def _cells(row: Row, intervals: bool) -> list[str]:
    return [
        row.category,
        str(row.questions),
        show(row.mean_acceptance_length, interval=intervals),
        show(row.fresh_acceptance_length, interval=intervals),
        f"{row.looping_share:.0%}",
        show(row.draft_acceptance_rate, ".0%"),
        show(row.plain_tokens_per_second, ".1f"),
        show(row.kangaroo_tokens_per_second, ".1f"),
        show(row.speedup, interval=intervals),
        show(row.processor_speedup),
        f"{row.identical} of {row.texts}",
    ]


def show(estimate: Estimate, form: str = ".2f", interval: bool = False) -> str:
    """An estimate as text, its interval in brackets where it is wanted."""
    if estimate.value is None:
        return "-"
    bounds = f" ({estimate.low:{form}}-{estimate.high:{form}})" if interval and estimate.low is not None else ""
    return f"{estimate.value:{form}}{bounds}"


def describe(difference: Mapping[str, Any]) -> str:
    """A sentence about a text that is not plain decoding's."""
    gap = difference["logit_gap"]
    close = "" if gap is None else f"; the target's logits of the two differ by {gap:.3g}"
    return (
        f"Question {difference['question_id']}, turn {difference['turn'] + 1}: {difference['way']} differs from plain "
        f"decoding from token {difference['position'] + 1} on{close}."
    )


def _markdown_table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *cells))
