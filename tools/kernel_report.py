"""What every kernel compiles to at the shapes of real models, for GPUs that need not be here.

    python tools/kernel_report.py [--model NAME] [--arch 80|90] [--dtype bfloat16] [--variants] [--json]

A row a kernel, model and architecture: registers, spills, stack, shared memory, how the weight is loaded, bytes, and
how the work fills the card. Every row is what a launcher launched, compiled with the Triton that Python imports
(``PYTHONPATH=.venv/triton-3.6`` for the older one). Nothing is measured: the floor is bytes over a bandwidth that
others measured on the card.
"""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import triton
import typer
from cards import ARCHITECTURES, cards_of
from command import refuse
from compiled import CompiledLaunch, compile_only, layouts_of_sums
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from steps import META, STEPS, Call, Step
from triton import knobs

from kangaroo_kernels.attention import TILE_BYTES
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.shared.tiles import K_STEP_BYTES
from kangaroo_kernels.workloads import MODELS, ModelShape, Settings

NAME = Path(__file__).stem
TABLE_WIDTH = 200
"""Columns that the table may take; a narrower terminal breaks its lines rather than losing figures."""

DTYPES = ("bfloat16", "float16", "float32")
PERSISTENT = "draft_loop_kernel"
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
    rows = size["HEAD_N"] if launch.kernel == PERSISTENT else size.get("BLOCK_N", 0)  # the head's tile is read most
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
        "spills": code.spill_stores + code.spill_loads,  # instructions
        "stack_bytes": code.stack_bytes,  # a thread
        "shared_bytes": code.static_shared + launch.dynamic_shared,  # a program; sm_90 adds the system's kilobyte
        "tensor_cores": code.tensor_cores,  # the instruction that drives them, or None
        "loops": [loop._asdict() for loop in code.loops],  # those that stream; a persistent kernel has several
        "tile_bytes": tile or None,
        "resident_programs": cards[0].resident_programs(launch),  # on the busiest SM
        "waves": round(cards[0].waves(launch), 3),  # programs over what the card holds at once
        "bytes_in_flight": round(depth * tile * cards[0].programs_under_way(launch)) if tile else None,  # an SM
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


def counted(widths: Mapping[int, int]) -> str:
    """``12x16`` for twelve loads of 16 bytes, the widest first."""
    return " ".join(f"{count}x{width}" for width, count in sorted(widths.items(), reverse=True))


def in_loops(row: Row, kind: str) -> str:
    """The copies or loads of the loops that stream."""
    return " / ".join(dict.fromkeys(filter(None, (counted(loop[kind]) for loop in row["loops"]))))


def kilobytes(count: int | None) -> str:
    """Empty for None."""
    return "" if count is None else f"{count / 1024:.1f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "rows": lambda row: str(row["rows"]),
    "grid": lambda row: " x ".join(str(count) for count in row["grid"] if count != 1) or "1",
    "warps,\nstages": lambda row: f"{row['num_warps']}, {row['num_stages']}",
    "regis-\nters": lambda row: str(row["registers"]),
    "spills,\nstack": lambda row: f"{row['spills']}, {row['stack_bytes']}",
    "shared\nKB": lambda row: kilobytes(row["shared_bytes"]),
    "copies in\nthe loop": lambda row: in_loops(row, "copies"),
    "loads in\nthe loop": lambda row: in_loops(row, "loads"),
    "tensor\ncores": lambda row: row["tensor_cores"] or "",
    "waves": lambda row: f"{row['waves']:.2f}",
    "KB under\nway": lambda row: kilobytes(row["bytes_in_flight"]),
    "of": lambda row: kilobytes(row["bytes_needed"]),
    "MB": lambda row: f"{row['bytes_moved'] / 1e6:.1f}" if row["bytes_moved"] else "",
    "floor us": lambda row: ", ".join(f"{card} {time:.1f}" for card, time in row["floor_us"].items()),
}


def show(rows: Sequence[Row]) -> None:
    """Print a table for each model, architecture and dtype."""
    console = Console(width=max(Console().width, TABLE_WIDTH))
    facts = ("model", "architecture", "dtype")
    for title in dict.fromkeys(tuple(row[fact] for fact in facts) for row in rows):
        mine = [row for row in rows if tuple(row[fact] for fact in facts) == title]
        console.print(f"\n[bold]{', '.join(title)}, Triton {triton.__version__}[/]", highlight=False)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("kernel", no_wrap=True)
        for header in COLUMNS:
            table.add_column(header, justify="right", no_wrap=True)
        for step in dict.fromkeys(row["step"] for row in mine):
            its = [row for row in mine if row["step"] == step]
            launches = sum(row["launches"] for row in its if row["rows"] == its[0]["rows"])
            table.add_row(f"[bold]{step}[/], {launches} launch{'es' * (launches > 1)}")
            for row in its:
                name = f"  {row['launches']} x {row['kernel'].removesuffix('_kernel')} {row['matrix']}"
                table.add_row(name, *(cell(row) for cell in COLUMNS.values()))
        console.print(table)


# ---- the command

Models = Annotated[
    list[str] | None, typer.Option(help="A model's name or a part of it; may be repeated. Default: all.")
]
Archs = Annotated[list[int] | None, typer.Option(help="80 or 90; may be repeated. Default: both.")]
Dtypes = Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; may be repeated. Default: the first.")]
StepNames = Annotated[list[str] | None, typer.Option(help="A step's name, and only that one; may be repeated.")]


class Selection(NamedTuple):
    """What a command compiles."""

    shapes: list[ModelShape]
    architectures: list[int]
    dtypes: list[str]
    steps: list[Step]


def select(command: str, model: Models, arch: Archs, dtype: Dtypes, step: StepNames) -> Selection:
    """What the options name, all where they name nothing; nonsense is refused."""
    shapes = [shape for shape in MODELS if not model or any(part.lower() in shape.name.lower() for part in model)]
    if not shapes:
        known = ", ".join(shape.name for shape in MODELS)
        refuse(command, f"no model is called {' or '.join(model or ())}; there are {known}.")
    steps = {each.name: each for each in STEPS}
    given = (("arch", arch, ARCHITECTURES), ("dtype", dtype, DTYPES), ("step", step, steps))
    for option, values, allowed in given:
        for value in values or ():
            if value not in allowed:
                refuse(command, f"--{option} is {value}; it must be one of {', '.join(map(str, allowed))}.")
    if knobs.runtime.interpret:
        refuse(command, "TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
    return Selection(
        shapes, arch or list(ARCHITECTURES), dtype or ["bfloat16"], [steps[name] for name in step or steps]
    )


def main(
    model: Models = None,
    arch: Archs = None,
    dtype: Dtypes = None,
    rows: Annotated[list[int] | None, typer.Option(help="Tokens in flight, 1 to 16; may be repeated.")] = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="Also drafting steps, short texts and paged caches.")
    ] = False,
    step: StepNames = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead.")] = False,
) -> None:
    """Compile every kernel at the shapes of real models and show what it became; no GPU is needed.

    Floor: bytes that must move over a bandwidth that others measured on the
    card; no measurement of this code. Waves: programs over those that the card
    holds at once. KB under way: tiles that an SM waits for at once, and how
    many keep the fastest card's memory busy.
    """
    counts = rows or [8]
    if not all(1 <= count <= MAX_ROWS for count in counts):
        refuse(NAME, f"rows are {', '.join(map(str, counts))}; they must be 1 to {MAX_ROWS}.")
    chosen = select(NAME, model, arch, dtype, step)
    jobs = [
        (each, shape, Settings(count, each.length or LENGTH, getattr(torch, name), META))
        for shape in chosen.shapes
        for name in chosen.dtypes
        for each in chosen.steps
        if step or variants or not each.variant
        for count in ((1,) if each.drafting else counts)
    ]
    console, found = Console(stderr=True), list[Row]()
    try:
        for architecture in chosen.architectures:
            with compile_only(architecture) as launches:
                quiet = not console.is_terminal
                for job in track(jobs, f"sm_{architecture}", console=console, transient=True, disable=quiet):
                    found += rows_of(*job, launches)
    except (OSError, subprocess.CalledProcessError) as error:
        refuse(NAME, f"Triton's cuobjdump does not run here: {error}.")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    typer.run(main)
