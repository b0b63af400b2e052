"""Everything worth knowing about this library on a GPU, from one command within a given time.

    python tools/gpu_report.py --minutes 9
    python tools/gpu_report.py --only decode,baselines --minutes 4
    python tools/gpu_report.py --pair runs/large
    python tools/gpu_report.py --smoke --out build/report

In this order: versions and the card's measured bandwidth, the GPU's tests, bit-equality at real shapes,
microbenchmarks, decode speeds beside transformers, and one iteration kernel by kernel. Every part runs in a process of
its own within its share of the time; what one does not use, the next ones have. A part that fails or hangs is told of,
and the others go on.

``--pair`` measures a trained pair instead, on held-out prompts: acceptance, speed, whether the tokens are plain
decoding's, and the same prompts in transformers.

It writes ``report.json``, ``report.md`` and the plots to ``bench/results/<GPU>/``. Parts that are not run again keep
what they had there, with their own date and commit. ``--smoke`` runs everything at tiny size on the CPU; no figure of
it is about a GPU.
"""

import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from command import INCOMPLETE, INTERRUPTED, refuse, require_time
from report.job import ROOT, write_json
from report.page import SMOKE_LABEL, complaints, page, state_of
from report.parts import ENVIRONMENT, PAIR, PARTS, Part, budgets, choose
from report.runner import GRACE, read_piece, run_part
from rich.console import Console

from kangaroo_kernels import launch_config

NAME = "gpu_report"
FORMAT = 2
"""Of ``report.json``; parts of another one are not kept."""

SOURCES = ("kangaroo_kernels", "model", "tools")
PAIR_FILES = ("target", "adapter", "prompts.json")
LEAST_SECONDS = 3.0
"""With less than this nothing is started: importing takes so long."""

RESERVE = 12.0
"""Seconds for the plots, and for a last part that has to be ended."""


class Plan(NamedTuple):
    """What to measure.

    Attributes:
        parts: in their order.
        minutes: for all of them.
        folder: where the report goes; parts that lie there already are kept.
        smoke: tiny sizes, on the CPU.
        brief: the first model alone, at its shortest context.
        pair: folder of a trained pair.
    """

    parts: Sequence[Part]
    minutes: float
    folder: Path
    smoke: bool = False
    brief: bool = False
    pair: Path | None = None


# ---- what is measured


def git(*arguments: str) -> str:
    """What git says about the repository; nothing where there is none."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit that is measured; where git does not know it (a copy of the files), a digest of the sources.

    Results that lie in the repository are no change of it. Beside carried kernels (``gpu_kit``) the digest's commit is
    known.
    """
    name = git("rev-parse", "--short=12", "HEAD")
    if name:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
        return name + (" with changes" if changed else "")
    digest, key = digest_of_sources(), ROOT / ".dev" / "key.json"
    carried = json.loads(key.read_text(encoding="utf-8")) if key.is_file() else {}
    return str(carried["commit"]) if carried.get("sources") == digest else f"unknown, sources {digest}"


def digest_of_sources(root: Path = ROOT) -> str:
    """Of all Python files in the packages and the tools, by name and content: the same for the same commit."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).glob("**/*.py"), key=lambda path: path.as_posix()):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


# ---- measuring


def measure(plan: Plan) -> int:
    """Run the parts one after the other and write the report: an exit code. What there is stays written.

    A folder that cannot be written is refused.
    """
    began, console, limit = time.monotonic(), Console(stderr=True, highlight=False), 60 * plan.minutes
    file = plan.folder / "report.json"
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        refuse(NAME, f"{plan.folder} cannot be written: {error.strerror}.")
    reserve = min(RESERVE + GRACE, 0.1 * limit)
    command = shlex.join(["python", *map(str, sys.argv)])
    where = {"commit": commit(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "command": command}
    about = {"format": FORMAT, "gpu": None if plan.smoke else torch.cuda.get_device_name(), "smoke": plan.smoke}
    earlier, label = read_piece(file), {"label": SMOKE_LABEL} if plan.smoke else {}
    parts: dict[str, Any] = earlier.get("parts", {}) if about.items() <= earlier.items() else {}
    report = {**label, **about, "minutes": plan.minutes, **where, "parts": parts}
    for part, seconds in zip(plan.parts, budgets(plan.parts, limit - reserve), strict=True):
        console.print(f"{part.name:12} {seconds:6.0f} s  {part.what}")
    interrupted, ran = False, list[str]()
    try:
        for index, part in enumerate(plan.parts):
            left = limit - reserve - (time.monotonic() - began)
            if left < LEAST_SECONDS:
                parts.setdefault(part.name, {"status": "skipped", "seconds": 0, "limit": 0} | where)
                console.print(f"{part.name:12}    0.0 s  skipped, no time left")
                continue
            seconds = budgets(plan.parts[index:], left)[0]
            with console.status(part.name) as status:  # nothing where there is no terminal

                def show(doing: str, name: str = part.name, status: Any = status) -> None:
                    status.update(f"{name}: {doing[:70]}")

                piece = run_part(
                    part, seconds, plan.folder, smoke=plan.smoke, brief=plan.brief, pair=plan.pair, update=show
                )
            parts[part.name] = piece | where
            ran.append(part.name)
            write_json(file, report)
            console.print(f"{part.name:12} {piece['seconds']:6.1f} s  {state_of(piece)}")
            if piece["status"] == "interrupted":
                interrupted = True
                break
    except KeyboardInterrupt:
        interrupted = True
    wrong = [*complaints({"parts": {name: parts[name] for name in ran}}), *write_report(report, plan.folder)]
    for sentence in wrong:
        typer.echo(f"{NAME}: {sentence}", err=True)
    console.print(f"{time.monotonic() - began:.0f} s; wrote {plan.folder / 'report.md'}", soft_wrap=True)
    return INTERRUPTED if interrupted else INCOMPLETE if wrong else 0


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


# ---- the command


def require_device(command: str, smoke: bool) -> None:
    """Refuse where there is no GPU to measure."""
    if not smoke and not torch.cuda.is_available():
        refuse(command, "this needs a CUDA GPU and there is none here; --smoke --out DIR runs it without one.")


def main(
    minutes: Annotated[float, typer.Option(help="The time limit of the whole.")] = 9.0,
    only: Annotated[
        str | None,
        typer.Option(help=f"Parts to run, with commas between them: {', '.join(p.name for p in (*PARTS, PAIR))}."),
    ] = None,
    pair: Annotated[
        Path | None, typer.Option(help="Measure a trained pair: a folder with target/, adapter/ and prompts.json.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default bench/results/<GPU>/.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every part at tiny size on the CPU; needs --out.")] = False,
) -> None:
    """Measure this library on this GPU and write a report."""
    require_time(NAME, "--minutes", minutes)
    try:
        parts = choose((*PARTS, PAIR), only)
    except ValueError as error:
        refuse(NAME, str(error))
    if only is None:
        parts = list(PARTS) if pair is None else [ENVIRONMENT, PAIR]
    if PAIR in parts and pair is None:
        refuse(NAME, "the part pair needs --pair DIR, a folder with target/, adapter/ and prompts.json.")
    if pair is not None and PAIR not in parts:
        refuse(NAME, "--pair is given, but --only leaves the part pair out; name it too.")
    if pair is not None and (lacking := [name for name in PAIR_FILES if not (pair / name).exists()]):
        refuse(
            NAME, f"--pair is {pair}, which has no {' and no '.join(lacking)}; tools/train_demo.py writes such a pair."
        )
    if smoke and out is None:
        refuse(NAME, "--smoke needs --out, a folder to write: its figures do not belong into bench/results.")
    require_device(NAME, smoke)
    if out is None:
        name = launch_config.file_name(torch.cuda.get_device_name()).removesuffix(".json")
        out = ROOT / "bench" / "results" / name
    raise typer.Exit(measure(Plan(parts, minutes, out.resolve(), smoke, pair=pair and pair.resolve())))


if __name__ == "__main__":
    # whoever ends it (``timeout``, a scheduler) gets the report of what there is, and no part goes on alone
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    typer.run(main)
