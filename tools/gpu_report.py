"""Everything worth knowing about this library on a GPU, from one command within a given time.

    python tools/gpu_report.py --minutes 9
    python tools/gpu_report.py --smoke --out build/report

Every part (``report/parts.py``) runs in a process of its own within its share of the time; what one does not use, the
next ones have. A part that fails or hangs is told of, and the others go on. ``report.json``, ``report.md`` and a
picture of the timeline are written to ``bench/results/<GPU>/``. Parts that are not run again keep what they had there,
with their own date and commit.
"""

import hashlib
import importlib.util
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from command import INCOMPLETE, INTERRUPTED, refuse, require_time
from report.job import ROOT, Job, write_json
from report.page import complaints, page, state_of
from report.parts import ENVIRONMENT, FIRST, PAIR, PARTS, VLLM, Part, choose
from report.runner import GRACE, read_json, run_part

from kangaroo_kernels import KangarooError, launch_config
from kangaroo_kernels.model.demo import DemoPair

NAME = "gpu_report"
SOURCES = ("kangaroo_kernels", "model", "tools", "tests")
LEAST_SECONDS, RESERVE = 3.0, 12.0
"""With less nothing is started, for importing takes so long; for the page, and a last part that has to be ended."""


def commit() -> str:
    """The commit that is measured; where git does not know it (a copy of the files), a digest of the sources.

    Beside carried kernels (``gpu_kit``) the digest's commit is known.
    """
    git = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty= with changes"]
    done = subprocess.run(git, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode == 0:
        return done.stdout.strip()
    digest, carried = digest_of_sources(), read_json(ROOT / ".dev" / "key.json")
    return str(carried["commit"]) if carried.get("sources") == digest else f"unknown, sources {digest}"


def digest_of_sources(root: Path = ROOT) -> str:
    """Of all Python and JSON files of the library, its tools and tests, by name and content."""
    digest = hashlib.sha256()
    files = [file for folder in SOURCES for file in (root / folder).glob("**/*") if file.suffix in (".py", ".json")]
    for file in sorted(files):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def measure(parts: Sequence[Part], plan: Job) -> int:
    """Run the parts one after the other and write the report: an exit code. What there is stays written.

    A folder that cannot be written is refused.
    """
    began, file = time.monotonic(), plan.piece
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        refuse(NAME, f"{plan.folder} cannot be written: {error.strerror}.")
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    where = {"commit": commit(), "date": date, "command": shlex.join(["python", *sys.argv])}
    about = {"gpu": None if plan.smoke else torch.cuda.get_device_name(), "smoke": plan.smoke}
    earlier = read_json(file)
    found: dict[str, Any] = earlier.get("parts", {}) if about.items() <= earlier.items() else {}
    report, end = {**about, **where, "parts": found}, began + plan.seconds - min(RESERVE + GRACE, 0.1 * plan.seconds)
    interrupted, ran = False, dict[str, Any]()
    try:
        for index, part in enumerate(parts):
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                found.setdefault(part.name, {"status": "skipped", "seconds": 0} | where)
                typer.echo(f"{part.name}: skipped, no time left", err=True)
                continue
            seconds = left * part.share / sum(each.share for each in parts[index:])
            typer.echo(f"{part.name}: {part.what}, {seconds:.0f} s at most", err=True)
            piece = found[part.name] = ran[part.name] = run_part(part, seconds, plan) | where
            write_json(file, report)
            typer.echo(f"{part.name}: {state_of(piece)} after {piece['seconds']:.0f} s", err=True)
            if piece["status"] == "interrupted":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        interrupted = True
    write_json(file, report)
    (plan.folder / "report.md").write_text(page(report), encoding="utf-8")
    wrong = list(complaints(ran))
    for sentence in wrong:
        typer.echo(f"{NAME}: {sentence}", err=True)
    typer.echo(f"{time.monotonic() - began:.0f} s; wrote {plan.folder / 'report.md'}", err=True)
    return INTERRUPTED if interrupted else INCOMPLETE if wrong else 0


def main(
    minutes: Annotated[float, typer.Option(help="The time limit of the whole.")] = 9.0,
    only: Annotated[
        str | None,
        typer.Option(
            help=f"Parts to run, with commas between them: {', '.join(p.name for p in (*PARTS, VLLM, PAIR))}."
        ),
    ] = None,
    pair: Annotated[
        Path | None, typer.Option(help="Measure a trained pair: a folder with target/, adapter/ and prompts.json.")
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(help="Measure vLLM, too: the Python of an environment that has it; by default this one's, if so."),
    ] = None,
    first: Annotated[
        bool, typer.Option("--first", help="For a card's first minutes: is it right, how fast is one model's shape?")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default bench/results/<GPU>/.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every part at tiny size on the CPU; needs --out.")] = False,
) -> None:
    """Measure this library on this GPU and write a report."""
    require_time(NAME, "--minutes", minutes)
    parts = choose(only)
    if first and (only is not None or pair is not None):
        refuse(NAME, "--first has parts of its own; leave --only and --pair out.")
    if vllm is None and importlib.util.find_spec("vllm"):
        vllm = Path(sys.executable)
    if only is None:
        parts = list(FIRST if first else PARTS) if pair is None else [ENVIRONMENT, PAIR]
        parts += [VLLM] if vllm and not first and pair is None else []
    elif VLLM in parts and vllm is None:
        refuse(NAME, "the part vllm needs --vllm PYTHON, the Python of an environment that has vLLM.")
    if vllm and not vllm.is_file():
        refuse(NAME, f"{vllm} does not exist; give the Python of an environment that has vLLM.")
    if (PAIR in parts) != (pair is not None):
        refuse(NAME, "the part pair needs --pair DIR, and --pair DIR the part pair; --only has one without the other.")
    try:
        pair = pair and DemoPair(pair.resolve()).folder
    except KangarooError as error:
        refuse(NAME, f"{error} tools/train_demo.py writes such a pair.")
    if smoke and out is None:
        refuse(NAME, "--smoke needs --out, a folder to write: its figures do not belong into bench/results.")
    if not smoke and not torch.cuda.is_available():
        refuse(NAME, "this needs a CUDA GPU and there is none here; --smoke --out DIR runs it without one.")
    if out is None:
        out = ROOT / "bench/results" / launch_config.file_name(torch.cuda.get_device_name()).removesuffix(".json")
    out = out.resolve()
    status = measure(
        parts, Job(out / "report.json", out, 60 * minutes, smoke, brief=first, pair=pair, vllm=vllm and vllm.absolute())
    )
    if first:
        typer.echo((out / "report.md").read_text(encoding="utf-8"))
    raise typer.Exit(status)


if __name__ == "__main__":
    # whoever ends it (``timeout``, a scheduler) gets the report of what there is, and no part goes on alone
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    typer.run(main)
