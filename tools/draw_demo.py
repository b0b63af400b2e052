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


def main(
    name: Annotated[str, typer.Option(help="The prompt's name.")] = "unittest/suite.py",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 160,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/img/demo.svg"),
) -> None:
    """Decode with Kangaroo and save what the terminal would show."""
    prompts = bundled_pair().prompts()
    if name not in prompts:
        raise typer.BadParameter(f"no prompt is called {name}; there are {', '.join(prompts)}.")
    console = Console(record=True, width=96, file=io.StringIO(), force_terminal=True)
    show_legend(console)
    steps = Kangaroo.from_pretrained(DEMO_MODEL).progress(prompts[name], max_new_tokens=new_tokens)
    show_steps(console, name, prompts[name], steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(out), title="kangaroo demo")


if __name__ == "__main__":
    typer.run(main)
