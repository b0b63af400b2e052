"""Draw two of the answers that ``kangaroo demo`` shows in a terminal: the README's picture.

python docs/img/draw_demo.py --out docs/img/demo.svg
"""

import io
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kangaroo_kernels import Kangaroo, Settings
from kangaroo_kernels.model.commands.show import show_legend
from kangaroo_kernels.model.commands.side_by_side import show_race
from kangaroo_kernels.model.demo import QUESTIONS
from kangaroo_kernels.model.evaluation.race import Race

SHOWN = ("code", "correct")  # new text, and text that repeats most of its question


def main(out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/img/demo.svg")) -> None:
    """Let SmolLM2 answer, plainly and with Kangaroo, and save what the terminal would show."""
    kangaroo, settings = Kangaroo.from_pretrained("smollm2"), Settings(max_new_tokens=160)
    Race(kangaroo, settings, [0]).finish(steps=8)
    console = Console(record=True, width=110, file=io.StringIO())  # no terminal: each race is drawn once
    show_legend(console)
    for name in SHOWN:
        race = Race(kangaroo, settings, messages=[{"role": "user", "content": QUESTIONS[name]}])
        show_race(console, name, QUESTIONS[name], race)
    out.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(out), title="kangaroo demo")


if __name__ == "__main__":
    typer.run(main)
