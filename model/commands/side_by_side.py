"""A race drawn in a terminal: the text of plain decoding on the left, Kangaroo's on the right, coloured by origin."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..evaluation.race import Race
from ..results import Outcome
from ..session import Writing
from .show import DRAFTED_STYLE, PROMPT_LINES, PROMPT_STYLE, TARGET_STYLE

SECONDS_A_PICTURE = 0.1


def show_race(console: Console, name: str, prompt: str, race: Race) -> None:
    """Draw a race until both texts have ended; without a terminal, only the last picture is printed.

    Pictures are drawn between steps, so they are in no step's time.

    Args:
        console: where to draw.
        name: of the prompt.
        prompt: its last lines are shown above the texts.
        race: what is drawn.
    """
    console.rule(Text(name))
    console.print(Text("".join(prompt.splitlines(keepends=True)[-PROMPT_LINES:]), PROMPT_STYLE))
    texts = {race.plain: Text(), race.drafted: Text()}
    drawn = 0.0
    with Live(_picture(race, texts), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for writing, step in race:
            for index, piece in enumerate(step.pieces):
                style = "" if writing is race.plain else TARGET_STYLE
                texts[writing].append(piece, DRAFTED_STYLE if index < step.commit.accepted else style)
            if time.perf_counter() - drawn > SECONDS_A_PICTURE and console.is_terminal:
                live.update(_picture(race, texts), refresh=True)
                drawn = time.perf_counter()
        live.update(_picture(race, texts), refresh=True)
    if not console.is_terminal:
        console.print()  # where it is one, Live ends the line


def _picture(race: Race, texts: Mapping[Writing, Text]) -> Table:
    columns = Table.grid(expand=True)
    columns.add_column(ratio=1)
    columns.add_column(ratio=1)
    columns.add_row(
        _panel("plain decoding", texts[race.plain], race.plain.outcome),
        _panel("Kangaroo", texts[race.drafted], race.drafted.outcome),
    )
    return columns


def _panel(name: str, text: Text, outcome: Outcome) -> Panel:
    stats = outcome.stats
    facts = f"{stats.new_tokens} tokens in {stats.decode_seconds:.1f} s: {stats.tokens_per_second:.0f} tokens/s"
    return Panel(text, title=Text(name, "bold"), subtitle=Text(facts), title_align="left", subtitle_align="left")
