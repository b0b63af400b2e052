"""One part of a report in a process of its own: ``python -m report.worker NAME``, started by ``runner.py``."""

import argparse
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

from triton import knobs

from . import tests
from .job import Job
from .parts import FIRST, PAIR, PARTS


def main() -> None:
    """Run a part. What it found stands in its piece, with the kernels that Triton compiled and those that it found."""
    # the runner's interrupt must arrive, also where the report was started with Ctrl-C ignored (nohup, a shell's "&")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--piece", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--pair", type=Path)
    given = parser.parse_args()
    job = Job(given.piece, given.folder, given.seconds, given.smoke, given.pair, given.brief)
    job.note()
    compiled, found = list[str](), list[str]()

    def note(*, src: Any, cache_hit: bool, **event: Any) -> None:
        (found if cache_hit else compiled).append(src.name)

    knobs.compilation.listener = note
    part = next(part for part in (FIRST if given.brief else (*PARTS, PAIR)) if part.name == given.name)
    try:
        if part.tests:
            tests.run(job, part)
        else:
            import_module(f"report.{part.name}").run(job)
    finally:
        asked = {"compiled": len(compiled), "compiled_names": sorted(set(compiled)), "found": len(found)}
        job.note(**asked | job.values)  # a part of tests has its workers' numbers


if __name__ == "__main__":
    main()
