"""What every command of ``tools/`` does alike: how it ends, and how it refuses what makes no sense."""

import math
from typing import NoReturn

import typer

INCOMPLETE, USER_ERROR, INTERRUPTED = 1, 2, 130
"""Exit codes: something is missing or wrong; the command line makes no sense; Ctrl-C."""


def refuse(command: str, sentence: str) -> NoReturn:
    """Say on stderr in one line what is wrong, and end with exit code 2."""
    typer.echo(f"{command}: {' '.join(sentence.split())}", err=True)
    raise typer.Exit(USER_ERROR)


def require_time(command: str, option: str, limit: float) -> None:
    """Refuse a time limit that is none."""
    if not 0 < limit < math.inf:
        refuse(command, f"{option} is {limit:g}; it must be a finite number above 0.")
