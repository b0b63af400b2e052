"""Run a part in a process of its own, within its time: a crash, a hang or a full memory ends that part alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from . import tests
from .job import ROOT, Job, log_compilations
from .parts import FIRST, PAIR, PARTS, VLLM, Part

WORKER = (sys.executable, "-m", "report.runner")
GRACE = 8.0
"""Seconds that a part has beyond its limit, and then again to write what it found after it was interrupted."""

UNDER_WAY = "under_way.json"
"""In the report's folder: what a part has found so far. It stays there if the report itself is killed."""

TAIL = 15
"""Last lines of a failed part's output that the report shows."""


def environment_of(smoke: bool) -> dict[str, str]:
    """Of a part: the tools importable; in a smoke run no GPU, and Triton's interpreter.

    A part that runs pytest must not take itself for a worker of the pytest that may have started the report.
    """
    paths = [str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    given = inherited | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return given | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if smoke else given


def read_json(path: Path) -> dict[str, Any]:
    """What a file has so far; nothing where there is none."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def run_part(part: Part, seconds: float, plan: Job) -> dict[str, Any]:
    """Run a part of ``plan``; it is told to end within ``seconds``, and ended some time after them.

    Returns:
        What it found, and ``status`` (``done``, ``stopped`` at its limit, ``failed``, ``interrupted`` by Ctrl-C),
        ``seconds``, ``limit``, ``compiled`` (how many kernels, and ``compiled_names``), for one that is not done what
        it was ``at``, and for one that failed its ``output``, the last lines.
    """
    with tempfile.TemporaryDirectory() as scratch:
        piece, log, compiled = plan.folder / UNDER_WAY, Path(scratch) / "log", Path(scratch) / "compiled"
        piece.unlink(missing_ok=True)
        told = json.dumps(asdict(replace(plan, piece=piece, seconds=seconds)), default=str)
        compiled.touch()
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*WORKER, part.name, told],
                cwd=ROOT,
                env=environment_of(plan.smoke) | {"COMPILED_LOG": str(compiled)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which ends together
            )
            try:
                status = _wait(process, seconds + GRACE)
            except KeyboardInterrupt:
                status = "interrupted"
            finally:
                _signal(process, signal.SIGKILL)
                process.wait()
        names, found = compiled.read_text(encoding="utf-8").split(), read_json(piece)
        piece.unlink(missing_ok=True)
        found |= {"compiled": len(names), "compiled_names": sorted(set(names))}
        found |= {"status": status, "seconds": round(time.monotonic() - began, 1), "limit": round(seconds, 1)}
        doing = found.pop("doing", None)
        if status != "done" and doing:
            found["at"] = doing
        if status == "failed":
            lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
            found |= {"exit_status": process.returncode, "output": lines[-TAIL:]}
        return found


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> str:
    try:
        return "failed" if process.wait(seconds) else "done"
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)  # pytest writes what it has
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    return "stopped"


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it is over, and so are its children
        os.killpg(process.pid, number)


def work(name: str, told: str) -> None:
    """Run a part in this process; ``told`` has the attributes of its ``Job`` as JSON."""
    # the runner's interrupt must arrive, also where the report was started with Ctrl-C ignored (nohup, a shell's "&")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = json.loads(told)
    paths = {key: Path(given[key]) for key in ("piece", "folder", "pair", "vllm") if given.get(key)}
    job = Job(**given | paths)
    log_compilations()
    part = next(part for part in (FIRST if job.brief else (*PARTS, VLLM, PAIR)) if part.name == name)
    if part.tests:
        tests.run(job, part)
    else:
        import_module(f"report.{name}").run(job)


if __name__ == "__main__":
    work(*sys.argv[1:])
