"""Whether another commit's kernels compile to the same machine code as those that lie here.

    python tools/compare_binaries.py COMMIT [--model NAME] [--arch 80|90] [--dtype bfloat16] [--step NAME]

What a change of the kernels' source that means to change no arithmetic is held to: every launch of every step, its
variants too, compiled by the Triton that Python imports (``PYTHONPATH=.venv/triton-3.6`` for the older one). Names of
kernels and files and line numbers do not count; instructions with their encodings, registers and shared memory do.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import triton
import typer
from cards import ARCHITECTURES
from rich.console import Console
from steps import STEPS
from triton import knobs

from kangaroo_kernels.workloads import MODELS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("machine_code.py")
DIFFERENT, USER_ERROR = 1, 2
ROWS, LENGTH = 8, 4096
"""Tokens in flight, of which no binary depends on the number, and of the text."""

Binaries = dict[str, list[dict[str, Any]]]
"""The different binaries of each case, as ``machine_code.py`` prints them."""


class Verdict(NamedTuple):
    """What came of a case.

    Attributes:
        case: model, architecture, dtype, step, operation and kernel.
        same: whether both commits have it and its binaries are the same.
        detail: what differs, in words.
    """

    case: str
    same: bool
    detail: str


def refuse(sentence: str) -> NoReturn:
    """Say what was wrong and end."""
    typer.echo(f"compare_binaries: {sentence}", err=True)
    raise typer.Exit(USER_ERROR)


def binaries_of(tree: Path, wanted: dict[str, Any]) -> Binaries:
    """Compile the steps of the commit that lies in ``tree``, by its own launchers, in a process of its own.

    Raises:
        subprocess.CalledProcessError: they do not compile; its ``stderr`` says why.
    """
    paths = (tree / "tools", tree, Path(triton.__file__).parent.parent)  # the Triton of this process
    command = [sys.executable, "-c", SCRIPT.read_text(encoding="utf-8"), json.dumps(wanted)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    found: Binaries = json.loads(done.stdout)
    return found


def export(commit: str, folder: Path) -> None:
    """Put the kernels and tools of ``commit`` into ``folder``.

    Raises:
        subprocess.CalledProcessError: there is no such commit, or it has neither.
    """
    archive = ["git", "archive", "--format=tar", commit, "kangaroo_kernels", "tools"]
    files = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=files, check=True)


def judge(theirs: Binaries, ours: Binaries) -> list[Verdict]:
    """Compare case by case, in the order of ``ours``; cases that only the other commit has come last."""
    found = []
    for case in {**ours, **theirs}:
        if case not in theirs or case not in ours:
            found.append(Verdict(case, False, "only here" if case in ours else "only there"))
            continue
        before, after = theirs[case], ours[case]
        facts = [key for key in after[0] if key not in ("instructions", "arithmetic")]
        changed = [
            f"{key} {' '.join(str(code[key]) for code in before)} -> {' '.join(str(code[key]) for code in after)}"
            for key in facts
            if [code[key] for code in before] != [code[key] for code in after]
        ]
        same_sums = [code["arithmetic"] for code in before] == [code["arithmetic"] for code in after]
        order = f"floating-point instructions {'in the same' if same_sums else 'in another'} order"
        found.append(Verdict(case, before == after, "" if before == after else ", ".join([order, *changed])))
    return found


def main(
    commit: Annotated[str, typer.Argument(help="What to compare with: a commit, branch or tag.")],
    model: Annotated[
        list[str] | None, typer.Option(help="A model's name or a part of it; may be repeated. By default all.")
    ] = None,
    arch: Annotated[list[int] | None, typer.Option(help="80 or 90; may be repeated. By default both.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    step: Annotated[list[str] | None, typer.Option(help="A step's name, and only that one; may be repeated.")] = None,
) -> None:
    """Compile every kernel here and at another commit and say which became the same machine code.

    Ends with 1 where one differs. No GPU is needed.
    """
    shapes = [shape.name for shape in MODELS if not model or any(part.lower() in shape.name.lower() for part in model)]
    names = [known.name for known in STEPS]
    if not shapes:
        refuse(f"no model is called {' or '.join(model or ())}; there are {', '.join(each.name for each in MODELS)}.")
    if unknown := [str(each) for each in arch or () if each not in ARCHITECTURES]:
        refuse(f"architecture {unknown[0]} is not supported; give {' or '.join(map(str, ARCHITECTURES))}.")
    if dtype not in ("bfloat16", "float16", "float32"):
        refuse(f"dtype {dtype} is not supported; give bfloat16, float16 or float32.")
    if unknown := [each for each in step or () if each not in names]:
        refuse(f"no step is called {unknown[0]}; there are {', '.join(names)}.")
    if knobs.runtime.interpret:
        refuse("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
    wanted = {"steps": step or names, "models": shapes, "dtype": dtype, "rows": ROWS, "length": LENGTH}
    wanted["architectures"] = arch or list(ARCHITECTURES)
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(commit, Path(folder))
        except subprocess.CalledProcessError:
            refuse(f"{commit} is no commit that has kangaroo_kernels/ and tools/.")
        try:
            verdicts = judge(binaries_of(Path(folder), wanted), binaries_of(ROOT, wanted))
        except subprocess.CalledProcessError as error:
            refuse(f"the kernels do not compile: {error.stderr.strip().splitlines()[-1]}")
    show(verdicts)
    if any(not each.same for each in verdicts):
        raise typer.Exit(DIFFERENT)


def show(verdicts: list[Verdict]) -> None:
    """Print a line a case, and the count."""
    console = Console(soft_wrap=True, highlight=False)
    for each in verdicts:
        console.print(f"{each.case}: " + ("identical" if each.same else f"[bold]different[/], {each.detail}"))
    same = sum(each.same for each in verdicts)
    console.print(f"Triton {triton.__version__}: {len(verdicts)} cases, {same} identical, {len(verdicts) - same} not")


if __name__ == "__main__":
    typer.run(main)
