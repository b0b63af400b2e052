"""Draw a prompt continued by the demo pair, as ``kangaroo demo`` shows it in a terminal: the README's picture.

python tools/draw_demo.py --out docs/img/demo.svg
"""

import io
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.commands.show import show_legend, show_steps
from kangaroo_kernels.model.demo import DEMO_MODEL, bundled_pair

PROMPT, NEW_TOKENS = "unittest/suite.py", 160


def main(out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/img/demo.svg")) -> None:
    """Decode with Kangaroo and save what the terminal would show."""
    prompt = bundled_pair().prompts()[PROMPT]
    console = Console(record=True, width=96, file=io.StringIO(), force_terminal=True)
    show_legend(console)
    show_steps(
        console, PROMPT, prompt, Kangaroo.from_pretrained(DEMO_MODEL).progress(prompt, max_new_tokens=NEW_TOKENS)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(out), title="kangaroo demo")


if __name__ == "__main__":
    typer.run(main)
