"""Whether another commit's kernels compile to the same machine code as those that lie here.

    python tools/compare_binaries.py COMMIT [--model NAME] [--arch 80|90] [--dtype bfloat16] [--step NAME]

What a change of the kernels' source that means to change no arithmetic is held to: every launch of every step, its
variants too, compiled by the Triton that Python imports (``PYTHONPATH=.venv/triton-3.6`` for the older one). Names of
kernels and files and line numbers do not count; instructions with their encodings, registers and shared memory do.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from command import INCOMPLETE, refuse
from compiled import listing_of
from kernel_report import Archs, Dtypes, Models, StepNames, select
from sass import RESOURCES

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("machine_code.py")
NAME = Path(__file__).stem

ENCODED = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/.*$|^\s*/\* 0x[0-9a-f]{16} \*/\s*$", re.MULTILINE)
"""Lines of a listing that hold an instruction or the second half of its encoding; no name of a kernel or file."""


def read(cubin: str, dynamic_shared: int, warps: int) -> tuple[str, ...]:
    """What counts of what ``machine_code.py`` printed: instructions, registers, stack, shared memory, warps."""
    listing = listing_of(bytes.fromhex(cubin))
    return (*map(str.strip, ENCODED.findall(listing)), *RESOURCES.findall(listing)[0], str(dynamic_shared), str(warps))


def binaries_of(tree: Path, wanted: dict[str, Any]) -> dict[str, set[tuple[str, ...]]]:
    """The different binaries of each case in the commit that lies in ``tree``, compiled in a process of its own.

    Raises:
        subprocess.CalledProcessError: they do not compile; its ``stderr`` says why.
    """
    paths = (tree / "tools", tree, Path(triton.__file__).parent.parent)  # the Triton of this process
    command = [sys.executable, "-c", SCRIPT.read_text(encoding="utf-8"), json.dumps(wanted)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    return {case: {read(*each) for each in some} for case, some in json.loads(done.stdout).items()}


def export(commit: str, folder: Path) -> None:
    """Put the kernels and tools of ``commit`` into ``folder``.

    Raises:
        subprocess.CalledProcessError: there is no such commit, or it has neither.
    """
    archive = ["git", "archive", "-o", f"{folder}/tree.tar", commit, "kangaroo_kernels", "tools"]
    subprocess.run(archive, cwd=ROOT, capture_output=True, check=True)
    shutil.unpack_archive(folder / "tree.tar", folder, filter="data")


def main(
    commit: Annotated[str, typer.Argument(help="What to compare with: a commit, branch or tag.")],
    model: Models = None,
    arch: Archs = None,
    dtype: Dtypes = None,
    step: StepNames = None,
) -> None:
    """Say which kernels become the same machine code here and at another commit; ends with 1 where one does not."""
    shapes, architectures, dtypes, steps = select(NAME, model, arch, dtype, step)
    wanted: dict[str, Any] = {"architectures": architectures, "dtypes": dtypes}
    wanted |= {"models": [each.name for each in shapes], "steps": [each.name for each in steps]}
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(commit, Path(folder))
        except subprocess.CalledProcessError:
            refuse(NAME, f"{commit} is no commit that has kangaroo_kernels/ and tools/.")
        try:
            theirs, ours = binaries_of(Path(folder), wanted), binaries_of(ROOT, wanted)
        except subprocess.CalledProcessError as error:
            refuse(NAME, f"the kernels do not compile: {error.stderr.strip().splitlines()[-1]}")
    cases, same = ours | theirs, 0
    for case in cases:
        here, there = ours.get(case), theirs.get(case)
        same += here == there
        otherwise = "only here" if not there else "only there" if not here else "different"
        typer.echo(f"{case}: {'identical' if here == there else otherwise}")
    typer.echo(f"Triton {triton.__version__}: {len(cases)} cases, {same} identical, {len(cases) - same} not")
    raise typer.Exit(INCOMPLETE if same < len(cases) else 0)


if __name__ == "__main__":
    typer.run(main)
