"""What every kernel compiles to at the shapes of real models, for GPUs that need not be here.

    python tools/kernel_report.py [--model NAME] [--arch 80|90] [--dtype bfloat16] [--variants] [--json]

A row a kernel, model and architecture: registers, spills, stack, shared memory, how the weight is loaded, bytes, and
how the work fills the card. Every row is what a launcher launched, compiled with the Triton that Python imports
(``PYTHONPATH=.venv/triton-3.6`` for the older one). Nothing is measured: the floor is bytes over a bandwidth that
others measured on the card.
"""

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NoReturn

import torch
import triton
import typer
from cards import ARCHITECTURES, cards_of
from compiled import CompiledLaunch, compile_only
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sass import Pipeline
from steps import META, STEPS, Call, Step
from triton import knobs

from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.workloads import MODELS, ModelShape, Settings

USER_ERROR = 2
TABLE_WIDTH = 200
"""Columns that the table may take; a narrower terminal breaks its lines rather than losing figures."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PERSISTENT = "draft_loop_kernel"


# ---- what it compiles to


@dataclass(frozen=True)
class Row:
    """A kernel of a step, as it is launched for a model on an architecture.

    Attributes:
        step: that launches it.
        kernel: its name.
        operation: whose launcher launched it.
        matrix: the role of the matrix that the operation reads.
        launches: of this kernel in the step.
        model: whose shapes it has.
        architecture: ``sm_80`` or ``sm_90``.
        dtype: of weights and hidden states.
        triton: the version that compiled it.
        rows: tokens in flight.
        length: of the text.
        grid: programs.
        num_warps: of a program.
        num_stages: that the pipeliner was given.
        registers: a thread.
        spill_stores: instructions.
        spill_loads: instructions.
        stack_bytes: a thread.
        static_shared_bytes: a program; on sm_90 they include the system's kilobyte.
        dynamic_shared_bytes: a program.
        shared_limit_bytes: that a program may have.
        widest_load_bytes: of a thread from global memory, asynchronous or not; None if it loads nothing.
        cp_async: whether there are asynchronous copies to shared memory.
        tma: whether there are copies by the tensor memory accelerator.
        tensor_cores: the instruction that drives them, or None.
        loop_copies: asynchronous copies an iteration of the streaming loop, by width in bytes.
        loop_loads: loads into registers an iteration, by width: nothing hides them.
        weight_load_bytes: the width with which the loop loads its tile of the weight (of the KV cache in attention).
        tile_bytes: of the weight (of the cache) that a program takes an iteration; None if it streams none.
        tiles_under_way: of a program, while it waits for the oldest.
        loop_depths: the same for every loop that copies asynchronously; a persistent kernel has several.
        resident_programs: that the busiest SM holds.
        waves: programs over what the card holds at once.
        fill: the share of the card's places that are taken, over all waves.
        bytes_in_flight: an SM, on the average of the card; None if the kernel streams nothing.
        sustained: the share of that card's bandwidth which they allow, the emptier last wave included.
        bytes_needed: an SM, to keep the memory of the fastest card of the architecture busy.
        bytes_moved: that must move; None for kernels that merge what the one before left in the L2.
        floor_us: those bytes over the bandwidth of each card.
        binary: equal for launches that run the same machine code.
    """

    step: str
    kernel: str
    operation: str
    matrix: str
    launches: int
    model: str
    architecture: str
    dtype: str
    triton: str
    rows: int
    length: int
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    shared_limit_bytes: int
    widest_load_bytes: int | None
    cp_async: bool
    tma: bool
    tensor_cores: str | None
    loop_copies: dict[int, int]
    loop_loads: dict[int, int]
    weight_load_bytes: int | None
    tile_bytes: int | None
    tiles_under_way: float
    loop_depths: tuple[float, ...]
    resident_programs: int
    waves: float
    fill: float
    bytes_in_flight: int | None
    sustained: float | None
    bytes_needed: int
    bytes_moved: int | None
    floor_us: dict[str, float]
    binary: str


def tiles_of(launch: CompiledLaunch, itemsize: int) -> tuple[int, int]:
    """Bytes that a program loads an iteration: of the weight or cache, and of the rows beside it; 0 if none."""
    size = launch.constants
    if launch.kernel == "attention_kernel":
        return 2 * size["BLOCK_T"] * size["HEAD_DIM"] * itemsize, 0
    if "BLOCK_K" not in size:
        return 0, 0
    if launch.kernel == PERSISTENT:  # its tiles are of several sizes; this one is read most
        return size["HEAD_N"] * size["BLOCK_K"] * itemsize, size["BLOCK_M"] * size["BLOCK_K"] * itemsize
    weight_rows = size["BLOCK_N"] * (2 if launch.kernel == "gate_up_kernel" else 1)
    return weight_rows * size["BLOCK_K"] * itemsize, size["BLOCK_M"] * size["BLOCK_K"] * itemsize


def widest_of(pipeline: Pipeline) -> int:
    """The width of the copies that bring the most bytes of an iteration; 0 where as much is loaded into registers."""
    most = max(pipeline.copies, key=lambda width: width * pipeline.copies[width])
    loaded = sum(width * count for width, count in pipeline.loads.items())
    return most if most * pipeline.copies[most] > loaded else 0


def streams_of(launch: CompiledLaunch) -> Pipeline | None:
    """The loop that streams; of a persistent kernel its worst: every load, and the depth of the most patient."""
    code = launch.code
    if launch.kernel != PERSISTENT or not code.pipelines:
        return code.pipeline
    loads: dict[int, int] = {}
    for each in code.pipelines:
        for width, count in each.loads.items():
            loads[width] = loads.get(width, 0) + count
    deepest = max(code.pipelines, key=lambda each: each.depth)
    return deepest._replace(loads=loads)


def weight_load(launch: CompiledLaunch, wanted: int) -> int:
    """The narrowest width that an iteration needs to load ``wanted`` bytes a program, the widest ones first; 0 if none.

    A weight that is loaded narrowly shows even where something else in the loop is loaded widely.
    """
    if launch.kernel == PERSISTENT:
        return min((widest_of(each) for each in launch.code.pipelines), default=0)
    pipeline = launch.code.pipeline
    if pipeline is None:
        return 0
    narrowest = 0
    for width in sorted({*pipeline.copies, *pipeline.loads}, reverse=True):
        if wanted <= 0:
            break
        narrowest = width
        wanted -= width * (pipeline.copies.get(width, 0) + pipeline.loads.get(width, 0)) * launch.threads
    return narrowest if wanted <= 0 else 0


def make_row(step: Step, of: Call, launch: CompiledLaunch, launches: int, shape: ModelShape, settings: Settings) -> Row:
    """What is known about a launch that a step makes ``launches`` times."""
    architecture = launch.architecture
    cards, code = cards_of(architecture), launch.code
    card, fastest, pipeline = cards[0], max(cards, key=lambda each: each.bandwidth), streams_of(launch)
    weight_tile, rows_tile = tiles_of(launch, settings.dtype.itemsize)
    streams, depth = weight_tile > 0, pipeline.depth if pipeline else 0.0
    waves = card.waves(launch)
    moved = of.bytes_moved if launch.kernel == f"{of.op}_kernel" else None
    return Row(
        step=step.name,
        kernel=launch.kernel,
        operation=of.op,
        matrix=of.role,
        launches=launches,
        model=shape.name,
        architecture=f"sm_{architecture}",
        dtype=str(settings.dtype).removeprefix("torch."),
        triton=triton.__version__,
        rows=settings.rows,
        length=settings.length,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=code.registers,
        spill_stores=code.spill_stores,
        spill_loads=code.spill_loads,
        stack_bytes=code.stack_bytes,
        static_shared_bytes=code.static_shared,
        dynamic_shared_bytes=launch.dynamic_shared,
        shared_limit_bytes=card.program_shared,
        widest_load_bytes=max((*code.copy_widths, *code.load_widths), default=None),
        cp_async=bool(code.copy_widths),
        tma=bool(code.bulk_copies),
        tensor_cores=code.tensor_cores,
        loop_copies=pipeline.copies if pipeline else {},
        loop_loads=pipeline.loads if pipeline else {},
        weight_load_bytes=weight_load(launch, weight_tile + rows_tile) if streams else None,
        tile_bytes=weight_tile if streams else None,
        tiles_under_way=depth,
        loop_depths=tuple(each.depth for each in code.pipelines),
        resident_programs=card.resident_programs(launch),
        waves=round(waves, 3),
        fill=round(waves / math.ceil(waves), 3),
        bytes_in_flight=round(depth * weight_tile * card.programs_under_way(launch)) if streams else None,
        sustained=round(fastest.sustained(launch, depth * weight_tile), 3) if streams and depth else None,
        bytes_needed=round(fastest.bytes_needed),
        bytes_moved=moved,
        floor_us={each.name: round(1e6 * moved / each.bandwidth, 2) for each in cards} if moved else {},
        binary=launch.binary,
    )


def rows_of(step: Step, shape: ModelShape, settings: Settings, launches: list[CompiledLaunch]) -> list[Row]:
    """Launch a step, within ``compile_only`` that fills ``launches``; a row for each different launch."""
    counts: dict[tuple[str, str, str, tuple[int, int, int]], list[Any]] = {}
    for each in step.calls(shape, settings):
        before = len(launches)
        each.launch()
        for launch in launches[before:]:
            counts.setdefault((each.op, each.role, launch.binary, launch.grid), [each, launch, 0])[2] += 1
    return [make_row(step, of, launch, count, shape, settings) for of, launch, count in counts.values()]


def report(
    architectures: Sequence[int],
    shapes: Sequence[ModelShape],
    dtypes: Sequence[torch.dtype],
    rows: Sequence[int],
    length: int,
    steps: Sequence[Step],
) -> list[Row]:
    """Compile everything and say what came of it, with a bar on stderr."""
    found = []
    console = Console(stderr=True)
    for architecture in architectures:
        jobs = [
            (step, shape, Settings(count, step.length or length, dtype, META))
            for shape in shapes
            for dtype in dtypes
            for step in steps
            for count in ((1,) if step.drafting else rows)
        ]
        with compile_only(architecture) as launches:
            for job in track(
                jobs,
                f"compiling for sm_{architecture}",
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ):
                found += rows_of(*job, launches)
    return found


# ---- what is shown


HEADERS = (
    "rows",
    "grid",
    "warps,\nstages",
    "regis-\nters",
    "spills,\nstack",
    "shared KB\nstatic + dyn.",
    "widest\nload",
    "copies in\nthe loop",
    "loads in\nthe loop",
    "tensor\ncores",
    "MB",
    "floor us\n{cards}",
    "waves",
    "fill",
    "KB under\nway (of {needed})",
    "sus-\ntained",
)


def counted(widths: dict[int, int]) -> str:
    """``12x16`` for twelve loads of 16 bytes, the widest first."""
    return " ".join(f"{count}x{width}" for width, count in sorted(widths.items(), reverse=True))


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table: a kernel, and a cell for each of the headers."""
    return (
        f"  {row.launches} x {row.kernel.removesuffix('_kernel')}" + (f" ({row.matrix})" if row.matrix else ""),
        str(row.rows),
        " x ".join(str(count) for count in row.grid if count != 1) or "1",
        f"{row.num_warps}, {row.num_stages}",
        str(row.registers),
        f"{row.spill_stores + row.spill_loads}, {row.stack_bytes}",
        f"{row.static_shared_bytes / 1024:.0f} + {row.dynamic_shared_bytes / 1024:.1f}",
        "" if row.widest_load_bytes is None else str(row.widest_load_bytes),
        "TMA" if row.tma else counted(row.loop_copies),
        counted(row.loop_loads),
        row.tensor_cores or "",
        "" if row.bytes_moved is None else f"{row.bytes_moved / 1e6:.1f}",
        " / ".join(f"{microseconds:.1f}" for microseconds in row.floor_us.values()),
        f"{row.waves:.2f}",
        f"{row.fill:.0%}",
        "" if row.bytes_in_flight is None else f"{row.bytes_in_flight / 1024:.0f}",
        "" if row.sustained is None else f"{row.sustained:.0%}",
    )


def show(rows: Sequence[Row]) -> None:
    """Print a table for each model, architecture and dtype."""
    console = Console(width=max(Console().width, TABLE_WIDTH))
    titles = dict.fromkeys((row.model, row.architecture, row.dtype) for row in rows)
    for title in titles:
        mine = [row for row in rows if (row.model, row.architecture, row.dtype) == title]
        cards = cards_of(int(mine[0].architecture.removeprefix("sm_")))
        names, needed = " / ".join(card.name for card in cards), mine[0].bytes_needed // 1024
        console.print(f"\n[bold]{', '.join(title)}, Triton {triton.__version__}[/]", highlight=False)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("kernel", no_wrap=True)
        for header in HEADERS:
            table.add_column(header.format(cards=names, needed=needed), justify="right", no_wrap=True)
        for step in dict.fromkeys(row.step for row in mine):
            its = [row for row in mine if row.step == step]
            launches = sum(row.launches for row in its if row.rows == its[0].rows)
            table.add_row(f"[bold]{step}[/], {launches} launch{'es' * (launches > 1)}")
            for row in its:
                table.add_row(*cells(row))
        console.print(table)


# ---- the command


def refuse(sentence: str) -> NoReturn:
    """Say what was wrong and end."""
    typer.echo(f"kernel_report: {sentence}", err=True)
    raise typer.Exit(USER_ERROR)


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="A model's name or a part of it; may be repeated. By default all.")
    ] = None,
    arch: Annotated[list[int] | None, typer.Option(help="80 or 90; may be repeated. By default both.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16 (the default), float16 or float32; may be repeated.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Tokens in flight, 1 to 16; may be repeated.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the text, those in flight included.")] = 4096,
    variants: Annotated[
        bool, typer.Option("--variants", help="Also drafting steps, short texts and paged caches.")
    ] = False,
    step: Annotated[list[str] | None, typer.Option(help="A step's name, and only that one; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead.")] = False,
) -> None:
    """Compile every kernel at the shapes of real models and show what it became; no GPU is needed.

    Floor: the bytes that must move over a bandwidth that others measured on
    the card (A100 1.7, H100 3.0, H200 4.3 TB/s). It is no measurement of this
    code.

    Waves: programs over those that the card holds at once. Fill: the share of
    its places that they take.

    KB under way: tiles of the weight (of the KV cache in attention) that an SM
    waits for at once. Sustained: the share of the bandwidth that they allow,
    the emptier last wave included.
    """
    wanted, counts = dtype or ["bfloat16"], rows or [8]
    shapes = [shape for shape in MODELS if not model or any(part.lower() in shape.name.lower() for part in model)]
    if not shapes:
        refuse(f"no model is called {' or '.join(model or ())}; there are {', '.join(shape.name for shape in MODELS)}.")
    if unknown := [str(each) for each in arch or () if each not in ARCHITECTURES]:
        refuse(f"architecture {unknown[0]} is not supported; give {' or '.join(map(str, ARCHITECTURES))}.")
    if unknown := [each for each in wanted if each not in DTYPES]:
        refuse(f"dtype {unknown[0]} is not supported; give {', '.join(DTYPES)}.")
    if not all(1 <= count <= MAX_ROWS for count in counts):
        refuse(f"rows are {', '.join(map(str, counts))}; they must be 1 to {MAX_ROWS}.")
    if length < max(counts):
        refuse(f"the length is {length}; it must hold the rows, {max(counts)}.")
    if unknown := [each for each in step or () if each not in {known.name for known in STEPS}]:
        refuse(f"no step is called {unknown[0]}; there are {', '.join(known.name for known in STEPS)}.")
    steps = [each for each in STEPS if (each.name in step if step else variants or not each.variant)]
    if knobs.runtime.interpret:
        refuse("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
    try:
        found = report(arch or ARCHITECTURES, shapes, [DTYPES[each] for each in wanted], counts, length, steps)
    except (OSError, subprocess.CalledProcessError) as error:
        refuse(f"Triton's cuobjdump does not run here: {error}.")
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found], indent=1))
    else:
        show(found)


if __name__ == "__main__":
    typer.run(main)
