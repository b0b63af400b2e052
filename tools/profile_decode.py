"""Where the time of a decode goes, stage by stage.

    python tools/profile_decode.py [--shape Vicuna-7B] [--context N]

Prints a table of stages (time, gaps, launches, bytes, GB/s, share of the measured ceiling), and writes the profiler's
trace for chrome://tracing or ui.perfetto.dev, and a picture of one iteration. On a CPU it profiles the PyTorch
references, and says so.
"""

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from command import refuse
from gpu_measure import measure_ceiling
from iteration_profile import Profile, median_of, profile_iterations, room_for, stage_bytes, stage_rows
from random_model import random_kangaroo, random_prompt, sharing_weights
from report.page import STAGE_COLUMNS, table
from report.plots import iteration

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.model.demo import DEMO_MODEL, bundled_pair
from kangaroo_kernels.workloads import MODELS

NAME, ITERATIONS = "profile_decode", 20
SHAPES = {shape.name: shape for shape in MODELS}

EPILOG = """\
[bold]With Nsight Systems[/] (a timeline of ranges and of the kernels inside of the graphs):

nsys profile -t cuda,nvtx --cuda-graph-trace=node -c cudaProfilerApi -o kangaroo python tools/profile_decode.py --nvtx

[bold]With Nsight Compute[/] (one kernel in full; graphs off, so that kernels are launched one by one):

ncu --profile-from-start off -k regex:gate_up_kernel -c 4 --set full -o gate_up python tools/profile_decode.py \
--nvtx --no-graphs
"""


def bundled_prompt(kangaroo: Kangaroo, context: int) -> list[int]:
    """``context`` tokens of the demo's prompts, over and over."""
    tokens = kangaroo.tokenizer("".join(bundled_pair().prompts().values()))["input_ids"]
    return list(islice(cycle(tokens), context))


def show(profiled: Profile, kangaroo: Kangaroo) -> None:
    """Print the table of a decode by ``kangaroo``; for plain decoding that is one without a drafter."""
    device, rows = kangaroo.target.device, stage_rows(profiled, stage_bytes(kangaroo, profiled.length))
    if device.type == "cuda":
        ceiling = measure_ceiling(device).read
        rows = [row | {"share": (speed := row["gigabytes_per_second"]) and speed / ceiling} for row in rows]
        typer.echo(f"the memory reads {ceiling:.0f} GB/s at most, measured here")
    typer.echo(table(rows, *STAGE_COLUMNS, ("of the ceiling", "share", "%")))
    tokens = sum(len(commit.tokens) for commit in profiled.commits) / len(profiled.commits)
    typer.echo(f"{tokens:.2f} tokens an iteration; means over {len(profiled.iterations)}, context {profiled.length}")


def decode_under_ranges(kangaroo: Kangaroo, prompt: Sequence[int], plain: bool) -> None:
    """Decode once to compile and capture, then once for Nsight to see."""
    kangaroo.generate(prompt, max_new_tokens=2 * ITERATIONS, plain=plain)
    if kangaroo.target.device.type == "cuda":
        torch.cuda.profiler.start()
        with torch.autograd.profiler.emit_nvtx():
            kangaroo.generate(prompt, max_new_tokens=2 * ITERATIONS, plain=plain)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def load(shape: str | None, graphs: bool) -> Kangaroo:
    """The bundled pair, or random weights at a model's shape, which need a GPU."""
    if shape is None:
        return Kangaroo.from_pretrained(DEMO_MODEL, graphs=graphs)
    device = torch.device("cuda", torch.cuda.current_device())
    return sharing_weights(random_kangaroo(SHAPES[shape], device, torch.bfloat16), graphs=graphs)


def main(
    command: typer.Context,
    shape: Annotated[str | None, typer.Option(help=f"Random weights at a model's shape: {', '.join(SHAPES)}.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 64,
    plain: Annotated[bool, typer.Option("--plain", help="Profile plain decoding.")] = False,
    graphs: Annotated[bool, typer.Option(help="Replay CUDA graphs, or launch kernel by kernel.")] = True,
    chain: Annotated[bool, typer.Option("--chained", help="Programmatic dependent launches, from sm_90 on.")] = False,
    nvtx: Annotated[bool, typer.Option("--nvtx", help="Only decode, under NVTX ranges, for nsys and ncu.")] = False,
    out: Annotated[Path, typer.Option(help="Where trace and picture go.")] = Path("runs/profile"),
) -> None:
    """Profile a decode stage by stage."""
    if shape is not None and shape not in SHAPES:
        refuse(NAME, f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}.")
    if shape is not None and not torch.cuda.is_available():
        refuse(NAME, f"{shape} would take minutes a step on a CPU; leave --shape out to profile the bundled pair.")
    if chain:
        command.with_resource(chained())  # until the command ends
    try:
        kangaroo = load(shape, graphs)
        most = kangaroo.target.config.context_length - room_for(ITERATIONS)
        if context > most:
            refuse(NAME, f"context is {context}; this model allows at most {most} here.")
        prompt = bundled_prompt(kangaroo, context) if shape is None else random_prompt(SHAPES[shape], context)
        if nvtx:
            return decode_under_ranges(kangaroo, prompt, plain)
        profiled = profile_iterations(kangaroo, prompt, ITERATIONS, plain=plain)
    except KangarooError as error:
        refuse(NAME, str(error))
    launched = "CUDA graphs replayed" if profiled.graphs else "kernels launched one by one"
    if kangaroo.target.device.type == "cpu":
        launched = "the PyTorch references on the CPU; no figure is about a GPU"
    decoded = f"{shape}, random weights" if shape else "bundled pair"
    title = f"{'plain decoding' if plain else 'Kangaroo'}, {decoded}{', chained' * chain}; {launched}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "trace.json").write_text(json.dumps(profiled.trace), encoding="utf-8")
    iteration(median_of(profiled.iterations), out / "iteration.png", f"One iteration of {title}")
    typer.echo(title)
    show(profiled, Kangaroo(kangaroo.target) if plain else kangaroo)
    typer.echo(f"wrote {out / 'trace.json'}, {out / 'iteration.png'}")
    return None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command(epilog=EPILOG)(main)

if __name__ == "__main__":
    app()
