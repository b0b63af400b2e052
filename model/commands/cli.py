"""The ``kangaroo`` command: each of its commands has a module beside this one.

PyTorch takes seconds to import, so each command imports what it needs when it runs.
"""

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from kangaroo_kernels import __version__

from ..errors import KangarooError, is_out_of_memory, reason
from . import (
    calibrate,
    chat,
    compile,
    demo,
    draft_vocabulary,
    evaluate,
    export,
    generate,
    generate_data,
    info,
    plan,
    serve,
    train,
)
from .options import USER_ERROR, examples

app = typer.Typer(
    help="Llama models decode faster without changing a token: the model's first layers and a small adapter draft, "
    "the remaining layers verify.",
    epilog=examples("demo", "generate --model demo --prompt 'class Stack:'", "generate --help"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command; a user's mistake becomes one sentence and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers heeds it, too
    warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks must not end the text
    try:
        app()
    except (KangarooError, OSError) as error:
        refuse(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        refuse(f"there is not enough memory for this ({reason(error)}).")


def refuse(sentence: str) -> None:
    """Say what was wrong and end."""
    typer.echo(f"kangaroo: {' '.join(sentence.split())}", err=True)
    sys.exit(USER_ERROR)


def show_version(wanted: bool) -> None:
    """Answer ``--version``."""
    if wanted:
        typer.echo(f"kangaroo-kernels {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that go before a command."""


app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=chat.EXAMPLES)(chat.chat)
app.command(epilog=serve.EXAMPLES)(serve.serve)
app.command(cls=train.FileLists, epilog=generate_data.EXAMPLES)(generate_data.generate_data)
app.command(cls=train.FileLists, epilog=train.EXAMPLES)(train.train)
app.command(cls=train.FileLists, epilog=draft_vocabulary.EXAMPLES)(draft_vocabulary.draft_vocabulary)
app.command(epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command(name="eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command("compile", epilog=compile.EXAMPLES)(compile.compile_kernels)
app.command(epilog=info.EXAMPLES)(info.info)
