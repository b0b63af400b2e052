"""Whether another commit's kernels compile to the same machine code as those that lie here.

    python tools/compare_binaries.py COMMIT [--model NAME] [--arch 80|90] [--dtype bfloat16] [--step NAME]

What a change of the kernels' source that means to change no arithmetic is held to: every launch of every step, its
variants too, compiled by the Triton that Python imports (``PYTHONPATH=.venv/triton-3.6`` for the older one). Names of
kernels and files and line numbers do not count; instructions with their encodings, registers and shared memory do.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import triton
import typer
from command import INCOMPLETE, refuse
from compiled import listing_of
from kernel_report import Archs, Dtypes, Models, StepNames, select
from sass import read_machine_code

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("machine_code.py")
NAME = Path(__file__).stem

ENCODED = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/.*$|^\s*/\* 0x[0-9a-f]{16} \*/\s*$", re.MULTILINE)
"""Lines of a listing that hold an instruction or the second half of its encoding; no name of a kernel or file."""


class Binary(NamedTuple):
    """What counts of a binary; shared memory and stack in bytes."""

    instructions: tuple[str, ...]
    registers: int
    spills: int
    stack: int
    static_shared: int
    dynamic_shared: int
    warps: int


Binaries = dict[str, list[Binary]]
"""The different binaries of each case: a model, architecture, dtype, step, operation and kernel."""


def read(cubin: str, dynamic_shared: int, warps: int) -> Binary:
    """What counts of a binary that ``machine_code.py`` printed."""
    listing = listing_of(bytes.fromhex(cubin))
    code, lines = read_machine_code(listing), [line.strip() for line in ENCODED.findall(listing)]
    spills = code.spill_stores + code.spill_loads
    return Binary(tuple(lines), code.registers, spills, code.stack_bytes, code.static_shared, dynamic_shared, warps)


def binaries_of(tree: Path, wanted: dict[str, Any]) -> Binaries:
    """Compile the steps of the commit that lies in ``tree``, by its own launchers, in a process of its own.

    Raises:
        subprocess.CalledProcessError: they do not compile; its ``stderr`` says why.
    """
    paths = (tree / "tools", tree, Path(triton.__file__).parent.parent)  # the Triton of this process
    command = [sys.executable, "-c", SCRIPT.read_text(encoding="utf-8"), json.dumps(wanted)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    return {case: list(dict.fromkeys(read(*each) for each in some)) for case, some in json.loads(done.stdout).items()}


def export(commit: str, folder: Path) -> None:
    """Put the kernels and tools of ``commit`` into ``folder``.

    Raises:
        subprocess.CalledProcessError: there is no such commit, or it has neither.
    """
    archive = ["git", "archive", "--format=tar", commit, "kangaroo_kernels", "tools"]
    files = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=files, check=True)


def differences(theirs: Binaries, ours: Binaries) -> dict[str, str]:
    """What differs in each case, empty where nothing does; cases that only the other commit has come last."""
    found = {}
    for case in {**ours, **theirs}:
        before, after = theirs.get(case, []), ours.get(case, [])
        if not before or not after:
            found[case] = "only here" if after else "only there"
            continue
        facts = zip(Binary._fields, zip(*before, strict=True), zip(*after, strict=True), strict=True)
        words = [
            name if name == "instructions" else f"{name} {' '.join(map(str, old))} -> {' '.join(map(str, new))}"
            for name, old, new in facts
            if old != new
        ]
        found[case] = ", ".join(words)
    return found


def main(
    commit: Annotated[str, typer.Argument(help="What to compare with: a commit, branch or tag.")],
    model: Models = None,
    arch: Archs = None,
    dtype: Dtypes = None,
    step: StepNames = None,
) -> None:
    """Compile every kernel here and at another commit and say which became the same machine code.

    Ends with 1 where one differs. No GPU is needed.
    """
    chosen = select(NAME, model, arch, dtype, step)
    wanted: dict[str, Any] = {
        "models": [each.name for each in chosen.shapes],
        "steps": [each.name for each in chosen.steps],
    }
    wanted |= {"architectures": chosen.architectures, "dtypes": chosen.dtypes}
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(commit, Path(folder))
        except subprocess.CalledProcessError:
            refuse(NAME, f"{commit} is no commit that has kangaroo_kernels/ and tools/.")
        try:
            found = differences(binaries_of(Path(folder), wanted), binaries_of(ROOT, wanted))
        except subprocess.CalledProcessError as error:
            refuse(NAME, f"the kernels do not compile: {error.stderr.strip().splitlines()[-1]}")
    for case, words in found.items():
        typer.echo(f"{case}: " + (f"different, {words}" if words else "identical"))
    different = sum(map(bool, found.values()))
    count = f"{len(found)} cases, {len(found) - different} identical, {different} not"
    typer.echo(f"Triton {triton.__version__}: {count}")
    raise typer.Exit(INCOMPLETE if different else 0)


if __name__ == "__main__":
    typer.run(main)
