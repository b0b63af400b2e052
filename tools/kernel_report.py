"""What every kernel compiles to at the shapes of real models, for GPUs that need not be here.

    python tools/kernel_report.py [--model NAME] [--arch 80|90] [--dtype bfloat16] [--variants] [--json]

A line for each kernel: ``--help`` says what its columns mean. Every launch is one that a launcher made, compiled with
the Triton that Python imports (``PYTHONPATH=.venv/triton-3.6`` for the older one). Nothing is measured.
"""

import json
import subprocess
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from command import refuse
from compiled import CompiledLaunch, compile_only, layouts_of_sums
from kernel_calls import META, STEPS, Call, Step
from occupancy import programs_under_way, resident_programs, waves
from rich.console import Console
from rich.progress import track
from triton import knobs

from kangaroo_kernels.cards import ARCHITECTURES, cards_of
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.shared.attend import TILE_BYTES
from kangaroo_kernels.shared.tiles import K_STEP_BYTES
from kangaroo_kernels.workloads import MODELS, ModelShape, Settings

NAME = Path(__file__).stem
DTYPES = ("bfloat16", "float16", "float32")
LENGTH = 4096
"""Tokens of the text, those in flight included."""


# ---- what it compiles to

Row = dict[str, Any]
"""A kernel of a step, as it is launched for a model on an architecture: facts by the names that ``row_of`` gives."""


def tile_of(launch: CompiledLaunch) -> int:
    """Bytes of the weight (of the cache in attention) that a program loads an iteration; 0 if it streams none."""
    size = launch.constants
    if launch.kernel == "attention_kernel":
        return int(2 * TILE_BYTES.value * size["HEAD_DIM"])
    matrices = 2 if launch.kernel == "gate_up_kernel" else 1
    rows = size.get("HEAD_N", size.get("BLOCK_N", 0))  # a persistent kernel reads the head's tile most
    return int(matrices * rows * K_STEP_BYTES.value)


def row_of(step: Step, of: Call, launch: CompiledLaunch, launches: int, shape: ModelShape, settings: Settings) -> Row:
    """What is known about a launch that a step makes ``launches`` times."""
    cards, code, tile = cards_of(launch.architecture), launch.code, tile_of(launch)
    depth = max((loop.depth for loop in code.loops), default=0.0)
    moved = of.bytes_moved if launch.kernel == f"{of.op}_kernel" else None  # merging kernels read what the L2 holds
    return {
        "step": step.name,
        "kernel": launch.kernel,
        "matrix": of.role,
        "launches": launches,  # of this kernel in the step
        "model": shape.name,
        "architecture": f"sm_{launch.architecture}",
        "dtype": str(settings.dtype).removeprefix("torch."),
        "triton": triton.__version__,
        "rows": settings.rows,  # tokens in flight
        "grid": launch.grid,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,  # that the pipeliner was given
        "registers": code.registers,  # a thread
        "spills": code.spills,  # instructions
        "stack_bytes": code.stack_bytes,  # a thread
        "shared_bytes": code.static_shared + launch.dynamic_shared,  # a program; sm_90 adds the system's kilobyte
        "tensor_cores": code.tensor_cores,  # the instruction that drives them, or None
        "loops": [loop._asdict() for loop in code.loops],  # those that stream; a persistent kernel has several
        "tile_bytes": tile or None,
        "resident_programs": resident_programs(cards[0], launch),  # on the busiest SM
        "waves": round(waves(cards[0], launch), 3),  # programs over what the card holds at once
        "bytes_in_flight": round(depth * tile * programs_under_way(cards[0], launch)) if tile else None,  # an SM
        "bytes_needed": round(max(card.bytes_needed for card in cards)),  # an SM, to keep the memory busy
        "bytes_moved": moved,
        "floor_us": {card.name: round(1e6 * moved / card.bandwidth, 2) for card in cards} if moved else {},
        "binary": launch.binary,  # equal for launches that run the same machine code
        "sums": layouts_of_sums(launch.ttgir),  # the order of their addends follows from it
    }


def rows_of(step: Step, shape: ModelShape, settings: Settings, launches: list[CompiledLaunch]) -> list[Row]:
    """Launch a step, within ``compile_only`` that fills ``launches``; a row for each different launch."""
    counts: dict[tuple[Any, ...], list[Any]] = {}
    for each in step.calls(shape, settings):
        before = len(launches)
        each.launch()
        for launch in launches[before:]:
            counts.setdefault((each.op, each.role, launch.binary, launch.grid), [each, launch, 0])[2] += 1
    return [row_of(step, of, launch, count, shape, settings) for of, launch, count in counts.values()]


# ---- what is shown

LINE = "{:<27} {:>6} {:>4} {:>6} {:>5} {:>5} {:>8} {:>6} {:>11}  {}"
HEADER = ("launches, kernel, matrix", "grid", "regs", "spills", "KB", "waves", "in flight", "MB", "floor us", "copies")


def cells(row: Row) -> tuple[Any, ...]:
    """What stands under ``HEADER`` of a kernel."""

    def loads(kind: str) -> str:
        """``12x16`` for twelve loads of 16 bytes; the loops that stream are parted by a stroke."""
        loops = (" ".join(f"{count}x{width}" for width, count in loop[kind].items()) for loop in row["loops"])
        return " / ".join(dict.fromkeys(filter(None, loops)))

    streams, moved, plain = row["tile_bytes"], row["bytes_moved"], loads("loads")
    return (
        f" {row['launches']} x {row['kernel'].removesuffix('_kernel')} {row['matrix']}",
        "x".join(str(count) for count in row["grid"] if count != 1) or "1",
        row["registers"],
        f"{row['spills']}+{row['stack_bytes']}",
        f"{row['shared_bytes'] / 1024:.1f}",
        f"{row['waves']:.2f}",
        f"{row['bytes_in_flight'] / 1024:.1f}/{row['bytes_needed'] / 1024:.0f}" if streams else "",
        f"{moved / 1e6:.1f}" if moved else "",
        "/".join(f"{time:.1f}" for time in row["floor_us"].values()),
        f"{loads('copies')}{plain and f' plain {plain}'}".lstrip(),
    )


def show(rows: list[Row]) -> None:
    """Print a table for each model, architecture and dtype."""
    for title, table in groupby(rows, itemgetter("model", "architecture", "dtype")):
        typer.secho(f"\n{', '.join(title)}, Triton {triton.__version__}\n{LINE.format(*HEADER)}", bold=True)
        for (step, count), kernels in groupby(table, itemgetter("step", "rows")):
            its = list(kernels)
            typer.echo(f"{step}, M = {count}, launches: {sum(row['launches'] for row in its)}")
            for row in its:
                typer.echo(LINE.format(*cells(row)).rstrip())


# ---- the command

Models = Annotated[list[str] | None, typer.Option(help="A part of a model's name; may be repeated. Default: all.")]
Archs = Annotated[list[int] | None, typer.Option(help="80 or 90; may be repeated. Default: both.")]
Dtypes = Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; may be repeated. Default: the first.")]
StepNames = Annotated[list[str] | None, typer.Option(help="A step's name, and only that one; may be repeated.")]


def select(
    command: str, model: Models, arch: Archs, dtype: Dtypes, step: StepNames, rows: list[int] | None = None
) -> tuple[list[ModelShape], list[int], list[str], list[Step]]:
    """The models, architectures, dtypes and steps that options name, all where they name none; refuses nonsense."""
    shapes = [shape for shape in MODELS if not model or any(part.lower() in shape.name.lower() for part in model)]
    if not shapes:
        known = ", ".join(each.name for each in MODELS)
        refuse(command, f"no model is called {' or '.join(model or ())}; there are {known}.")
    steps = {each.name: each for each in STEPS}
    counts = range(1, MAX_ROWS + 1)
    given = (("arch", arch, ARCHITECTURES), ("dtype", dtype, DTYPES), ("step", step, steps), ("rows", rows, counts))
    for option, values, allowed in given:
        for value in values or ():
            if value not in allowed:
                refuse(command, f"--{option} is {value}; it must be one of {', '.join(map(str, allowed))}.")
    if knobs.runtime.interpret:
        refuse(command, "TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
    return shapes, arch or list(ARCHITECTURES), dtype or ["bfloat16"], [steps[name] for name in step or steps]


def main(
    model: Models = None,
    arch: Archs = None,
    dtype: Dtypes = None,
    rows: Annotated[list[int] | None, typer.Option(help="Tokens in flight, 1 to 16; may be repeated.")] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Also drafting, short texts, paged caches.")] = False,
    step: StepNames = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead.")] = False,
) -> None:
    """Compile every kernel at the shapes of real models and show what it became; no GPU is needed.

    regs: registers a thread. spills: instructions that spill + bytes of a
    thread's stack. KB: shared memory a program. waves: programs over those
    that the card holds at once. in flight: KB that an SM waits for at once /
    KB that keep the fastest card's memory busy. MB: bytes that must move.
    floor us: these bytes over a bandwidth that others measured on the card
    (A100, or H100 and H200); no measurement of this code. copies: those to
    shared memory in an iteration of a streaming loop, count x bytes, and
    plain loads, which nothing hides.
    """
    shapes, architectures, dtypes, steps = select(NAME, model, arch, dtype, step, rows)
    jobs = [
        (each, shape, Settings(count, each.length or LENGTH, getattr(torch, name), META))
        for shape in shapes
        for name in dtypes
        for each in steps
        if step or variants or not each.variant
        for count in ((1,) if each.drafting else rows or [8])
    ]
    found = list[Row]()
    try:
        for architecture in architectures:
            with compile_only(architecture) as launches:
                for job in track(jobs, f"sm_{architecture}", console=Console(stderr=True), transient=True):
                    found += rows_of(*job, launches)
    except (OSError, subprocess.CalledProcessError) as error:
        refuse(NAME, f"Triton's cuobjdump does not run here: {error}.")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    typer.run(main)
