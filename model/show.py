"""What the ``kangaroo`` command draws in a terminal: text coloured by origin, and tables."""

from collections.abc import Iterable, Mapping, Sequence

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .compare import Comparison
from .generate import Progress

DRAFTED_STYLE = "green"
TARGET_STYLE = "bold yellow"
PROMPT_STYLE = "dim"
BAR_WIDTH = 40


def show_legend(console: Console) -> None:
    """Say what the colours mean."""
    console.print(
        Text.assemble(
            ("prompt", PROMPT_STYLE),
            "  ",
            ("drafted and accepted", DRAFTED_STYLE),
            "  ",
            ("the target's own", TARGET_STYLE),
        )
    )


def show_stream(console: Console, prompt: str, steps: Iterable[Progress]) -> None:
    """Print a prompt and the text as it comes, each token in the colour of its origin."""

    def write(text: str, style: str) -> None:
        console.print(Text(text, style), end="", soft_wrap=True)

    write(prompt, PROMPT_STYLE)
    for step in steps:
        for index, piece in enumerate(step.pieces):
            write(piece, DRAFTED_STYLE if index < step.commit.accepted else TARGET_STYLE)
    console.print()


def comparison_table(comparisons: Sequence[Comparison], total: Comparison | None = None) -> Table:
    """A row for each comparison, and one below for all of them."""
    table = Table("prompt", title="plain decoding and Kangaroo", title_justify="left", show_footer=total is not None)
    for column in (
        "plain\ntokens/s",
        "Kangaroo\ntokens/s",
        "\nspeedup",
        "mean acceptance\nlength",
        "draft acceptance\nrate",
        "\nidentical",
    ):
        table.add_column(column, justify="right")
    for comparison in comparisons:
        table.add_row(*_cells(comparison))
    if total is not None:
        for column, cell in zip(table.columns, _cells(total), strict=True):
            column.footer = cell
    return table


def _cells(comparison: Comparison) -> tuple[str, ...]:
    return (
        comparison.name,
        f"{comparison.plain_tokens_per_second:.0f}",
        f"{comparison.kangaroo_tokens_per_second:.0f}",
        f"{comparison.speedup:.2f}x",
        f"{comparison.stats.mean_acceptance_length:.2f}",
        f"{comparison.stats.draft_acceptance_rate:.0%}",
        "yes" if comparison.identical else "no",
    )


def acceptance_chart(rates: Sequence[float]) -> Table:
    """A bar for each draft position: the share of verification steps that accepted it."""
    chart = Table.grid(padding=(0, 1))
    chart.title, chart.title_justify = "acceptance rate per position", "left"
    for position, rate in enumerate(rates, start=1):
        chart.add_row(str(position), Bar(1, 0, rate, width=BAR_WIDTH, color=DRAFTED_STYLE), f"{rate:.0%}")
    return chart


def facts_table(title: str, facts: Mapping[str, str]) -> Table:
    """Names and values, one pair a row."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table
