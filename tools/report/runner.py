"""Run a part in a process of its own, within its time: a crash, a hang or a full memory ends that part alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .job import ROOT
from .parts import Part

GRACE = 8.0
"""Seconds that a part has to write what it found after it was interrupted at its limit."""

TAIL = 15
"""Last lines of a failed part's output that the report shows."""

POLL = 0.2


def environment_of(smoke: bool) -> dict[str, str]:
    """Of a part: the tools importable; in a smoke run no GPU, and Triton's interpreter.

    A part that runs pytest must not take itself for a worker of the pytest that may have started the report.
    """
    paths = [str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    given = inherited | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return given | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if smoke else given


def read_piece(path: Path) -> dict[str, Any]:
    """What a part has left so far."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def run_part(
    part: Part,
    seconds: float,
    folder: Path,
    *,
    smoke: bool = False,
    brief: bool = False,
    pair: Path | None = None,
    update: Callable[[str], None] = lambda doing: None,
    command: tuple[str, ...] = (sys.executable, "-m", "report.worker"),
) -> dict[str, Any]:
    """What a part found, with how it ended.

    Args:
        part: which.
        seconds: it is told to end within these; after ``GRACE`` more it is ended.
        folder: where its further files go.
        smoke: tiny sizes, on the CPU.
        brief: the first model alone.
        pair: folder of a trained pair.
        update: called now and then with what is being done.
        command: what runs a part.

    Returns:
        Its piece, and ``status`` (``done``, ``stopped`` at its limit, ``failed``, ``interrupted`` by Ctrl-C),
        ``seconds``, ``limit``, for one that is not done what it was ``at``, and for one that failed its ``output``, the
        last lines.
    """
    with tempfile.TemporaryDirectory() as scratch:
        piece, log = Path(scratch) / "piece.json", Path(scratch) / "log"
        arguments = [part.name, "--piece", str(piece), "--folder", str(folder), "--seconds", f"{seconds:.1f}"]
        arguments += ["--smoke"] * smoke + ["--brief"] * brief
        arguments += ["--pair", str(pair)] if pair is not None else []
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=environment_of(smoke),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which ends together
            )
            try:
                status = _wait(process, began + seconds, lambda: update(str(read_piece(piece).get("doing", ""))))
            except KeyboardInterrupt:
                status = "interrupted"
            finally:
                _signal(process, signal.SIGKILL)
                process.wait()
        found = read_piece(piece)
        doing = found.pop("doing", None)
        if status != "done" and doing:
            found["at"] = doing
        found |= {"status": status, "seconds": round(time.monotonic() - began, 1), "limit": round(seconds, 1)}
        if status == "failed":
            lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
            found |= {"exit_status": process.returncode, "output": lines[-TAIL:]}
        return found


def _wait(process: "subprocess.Popen[bytes]", deadline: float, update: Callable[[], None]) -> str:
    interrupted = False
    while process.poll() is None:
        now = time.monotonic()
        if now > deadline + 2 * GRACE:
            return "stopped"
        if now > deadline + GRACE and not interrupted:
            interrupted = True
            _signal(process, signal.SIGINT)  # pytest writes what it has
        update()
        time.sleep(POLL)
    if interrupted:
        return "stopped"
    return "done" if process.returncode == 0 else "failed"


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it is over, and so are its children
        os.killpg(process.pid, number)
