"""The first minutes on a GPU: is it right, and how fast? ``python tools/gpu_kit/first.py --out DIR [--seconds 265]``.

Parts of ``gpu_report.py`` in an order of their own, each in a process and within its time: one that fails, hangs or
loses the GPU ends alone. ``DIR/report.json`` and ``DIR/report.md`` have what was found as soon as a part is over, the
report is printed at the end. Triton's cache (``TRITON_CACHE_DIR``) decides what must be compiled; every part counts it.
``--smoke`` runs all of them at tiny size on the CPU, the kernels in Triton's interpreter.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command import require_time
from gpu_report import measure, require_device
from report.job import Job
from report.parts import FIRST

NAME = "first"


def main(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    seconds: Annotated[float, typer.Option(help="The time limit of the whole.")] = 265.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every part at tiny size on the CPU.")] = False,
) -> None:
    """Check and measure this GPU within minutes."""
    require_time(NAME, "--seconds", seconds)
    require_device(NAME, smoke)
    out = out.resolve()
    status = measure(NAME, FIRST, Job(out / "report.json", out, seconds, smoke, brief=True))
    print((out / "report.md").read_text(encoding="utf-8"), flush=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    typer.run(main)
