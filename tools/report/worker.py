"""One part of the report in a process of its own: ``python -m report.worker NAME``, run by ``runner.py``."""

import argparse
import signal
from importlib import import_module
from pathlib import Path

from .job import Job


def main() -> None:
    """Run a part; what it found is in its piece, what went wrong on stderr."""
    # the runner's interrupt must arrive, also where the report was started with Ctrl-C ignored (nohup, a shell's "&")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--piece", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--pair", type=Path)
    given = parser.parse_args()
    job = Job(given.piece, given.folder, given.seconds, given.smoke, given.pair)
    job.note()
    import_module(f"report.{given.name}").run(job)


if __name__ == "__main__":
    main()
