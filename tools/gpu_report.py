"""Everything worth knowing about this library on a GPU, from one command within a given time.

    python tools/gpu_report.py --minutes 9
    python tools/gpu_report.py --only decode,baselines --minutes 4
    python tools/gpu_report.py --pair runs/large
    python tools/gpu_report.py --smoke --out build/report

In this order: versions and the card's measured ceilings, the GPU's tests, bit-equality, microbenchmarks, decode speeds
beside transformers, one iteration kernel by kernel, and tuning with what time is left. Every part runs in a process of
its own within its share of the time; what one does not use, the next ones have. A part that fails or hangs is told of,
and the others go on.

``--pair`` measures a trained pair instead, on held-out prompts: acceptance, speed, whether the tokens are plain
decoding's, and the same prompts in transformers.

It writes ``report.json``, ``report.md`` and the plots to ``bench/results/<GPU>/``. Parts that are not run again keep
what they had there, with their own date and commit. ``--smoke`` runs everything at tiny size on the CPU; no figure of
it is about a GPU.
"""

import hashlib
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report.job import ROOT, write_json
from report.page import SMOKE_LABEL, complaints, page, state_of
from report.parts import PAIR, PARTS, Part, budgets, choose
from report.runner import GRACE, read_piece, run_part
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from kangaroo_kernels import launch_config

INCOMPLETE, USER_ERROR, INTERRUPTED = 1, 2, 130
FORMAT = 1
"""Of ``report.json``; parts of another one are not kept."""

SOURCES = ("kangaroo_kernels", "model", "tools")
PART_NAMES = ", ".join(part.name for part in (*PARTS, PAIR))
PAIR_FILES = ("target", "adapter", "prompts.json")
LEAST_SECONDS = 3.0
"""With less than this nothing is started: importing takes so long."""

RESERVE = 12.0
"""Seconds for the plots, and for a last part that has to be ended."""


def refuse(sentence: str) -> typer.Exit:
    """Say what was wrong; raise what comes back."""
    typer.echo(f"gpu_report: {' '.join(sentence.split())}", err=True)
    return typer.Exit(USER_ERROR)


def git(*arguments: str) -> str:
    """What git says about the repository; nothing where there is none."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit that is measured; where git does not know it (a copy of the files), a digest of the sources.

    Results that lie in the repository are no change of it.
    """
    name = git("rev-parse", "--short=12", "HEAD")
    if not name:
        return f"unknown, sources {digest_of_sources()}"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    return name + (" with changes" if changed else "")


def digest_of_sources(root: Path = ROOT) -> str:
    """Of all Python files in the packages and the tools, by name and content: the same for the same commit."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).glob("**/*.py"), key=lambda path: path.as_posix()):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def folder_of(gpu: str) -> Path:
    """Where a GPU's results lie."""
    return ROOT / "bench" / "results" / launch_config.file_name(gpu).removesuffix(".json")


def show_plan(console: Console, parts: list[Part], seconds: float) -> None:
    """Print what will be done, and for how long at most."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("what")
    for part, budget in zip(parts, budgets(parts, seconds), strict=True):
        table.add_row(part.name, f"{budget:.0f}", part.what)
    console.print(table)


@contextmanager
def time_bar(console: Console, limit: float) -> Iterator[Callable[[str], None]]:
    """A bar of the time that is left; call it with what is being done."""
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=limit, left="")

        def update(what: str) -> None:
            spent = time.monotonic() - started
            left = max(0, math.ceil(limit - spent))
            bar.update(
                task, description=what[:70], completed=min(limit, spent), left=f"{left // 60}:{left % 60:02} left"
            )

        yield update


def write_report(report: dict[str, Any], folder: Path) -> list[str]:
    """Write JSON, plots and Markdown; what could not be drawn, as sentences."""
    write_json(folder / "report.json", report)
    pictures, trouble = dict[str, str](), list[str]()
    try:
        from report.plots import draw  # noqa: PLC0415 (what is measured must not hang on a plotting library)

        pictures, trouble = draw(report, folder)
    except ImportError as error:
        trouble = [f"no plots: {error}; pip install -e '.[dev]' brings matplotlib."]
    (folder / "report.md").write_text(page(report, pictures), encoding="utf-8")
    return trouble


def main(
    minutes: Annotated[float, typer.Option(help="The time limit of the whole.")] = 9.0,
    only: Annotated[str | None, typer.Option(help=f"Parts to run, with commas between them: {PART_NAMES}.")] = None,
    pair: Annotated[
        Path | None, typer.Option(help="Measure a trained pair: a folder with target/, adapter/ and prompts.json.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default bench/results/<GPU>/.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every part at tiny size on the CPU; needs --out.")] = False,
) -> None:
    """Measure this library on this GPU and write a report."""
    began = time.monotonic()
    if not 0 < minutes < math.inf:
        raise refuse(f"--minutes is {minutes:g}; it must be a finite number above 0.")
    try:
        parts = choose(None if only is None else [name.strip() for name in only.split(",")], pair is not None)
    except ValueError as error:
        raise refuse(str(error)) from error
    if pair is not None and (lacking := [name for name in PAIR_FILES if not (pair / name).exists()]):
        raise refuse(
            f"--pair is {pair}, which has no {' and no '.join(lacking)}; tools/train_demo.py writes such a pair."
        )
    if smoke and out is None:
        raise refuse("--smoke needs --out, a folder to write: its figures do not belong into bench/results.")
    if not smoke and not torch.cuda.is_available():
        raise refuse("this report needs a CUDA GPU and there is none here; --smoke --out DIR runs it without one.")
    gpu = None if smoke else torch.cuda.get_device_name()
    folder = (out or folder_of(gpu or "CPU")).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").touch()
    except OSError as error:
        raise refuse(f"{folder} cannot be written: {error.strerror}.") from error

    console, limit = Console(stderr=True, highlight=False), 60 * minutes
    reserve = min(RESERVE + GRACE, 0.1 * limit)
    command = shlex.join(["python", "tools/gpu_report.py", *sys.argv[1:]])
    where = {"commit": commit(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "command": command}
    earlier = read_piece(folder / "report.json")
    about = {"format": FORMAT, "gpu": gpu, "smoke": smoke}
    kept = earlier.get("parts", {}) if about.items() <= earlier.items() else {}
    label = {"label": SMOKE_LABEL} if smoke else {}
    report: dict[str, Any] = {**label, **about, "minutes": minutes, **where, "parts": kept}
    show_plan(console, parts, limit - reserve)
    interrupted = False
    try:
        with time_bar(console, limit) as update:
            for index, part in enumerate(parts):
                left = limit - reserve - (time.monotonic() - began)
                seconds = budgets(parts[index:], left)[0]
                update(part.name)
                if left < LEAST_SECONDS:
                    report["parts"].setdefault(part.name, {"status": "skipped", "seconds": 0, "limit": 0} | where)
                    console.print(f"{part.name:12}    0.0 s  skipped, no time left")
                    continue

                def show(doing: str, name: str = part.name) -> None:
                    update(f"{name}: {doing}")

                piece = run_part(part, seconds, folder, smoke=smoke, pair=pair and pair.resolve(), update=show)
                report["parts"][part.name] = piece | where
                write_json(folder / "report.json", report)
                console.print(f"{part.name:12} {piece['seconds']:6.1f} s  {state_of(piece)}")
                if piece["status"] == "interrupted":
                    interrupted = True
                    break
    except KeyboardInterrupt:
        interrupted = True
    order = [part.name for part in (*PARTS, PAIR) if part.name in report["parts"]]
    report["parts"] = {name: report["parts"][name] for name in order}
    ran = {name: piece for name, piece in report["parts"].items() if name in {part.name for part in parts}}
    wrong = complaints(report | {"parts": ran}) + write_report(report, folder)
    for sentence in wrong:
        typer.echo(f"gpu_report: {sentence}", err=True)
    console.print(f"{time.monotonic() - began:.0f} s; wrote {folder / 'report.md'}", soft_wrap=True)
    if interrupted or wrong:
        raise typer.Exit(INTERRUPTED if interrupted else INCOMPLETE)


if __name__ == "__main__":
    # whoever ends it (``timeout``, a scheduler) gets the report of what there is, and no part goes on alone
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    typer.run(main)
