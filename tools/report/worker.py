"""One part of a report in a process of its own, started by ``runner.py``: ``python -m report.worker NAME JOB``."""

import json
import signal
import sys
from importlib import import_module
from pathlib import Path

from . import tests
from .job import Job, log_compilations
from .parts import FIRST, PAIR, PARTS


def main(name: str, told: str) -> None:
    """Run a part; ``told`` has the attributes of its ``Job`` as JSON."""
    # the runner's interrupt must arrive, also where the report was started with Ctrl-C ignored (nohup, a shell's "&")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = json.loads(told)
    paths = {key: Path(given[key]) for key in ("piece", "folder", "pair") if given[key]}
    job = Job(**given | paths)
    log_compilations()
    part = next(part for part in (FIRST if job.brief else (*PARTS, PAIR)) if part.name == name)
    if part.tests:
        tests.run(job, part)
    else:
        import_module(f"report.{name}").run(job)


if __name__ == "__main__":
    main(*sys.argv[1:])
