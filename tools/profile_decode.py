"""Where the time of a decode goes, stage by stage.

    python tools/profile_decode.py [--model DIR_OR_HUB_NAME --adapter DIR_OR_HUB_NAME | --shape Vicuna-7B] [--context N]

Prints a table of stages (time, bytes, GB/s, share of the measured ceiling, launches, gaps), and writes the profiler's
trace for chrome://tracing or ui.perfetto.dev, a picture of one iteration, and everything as JSON. On a CPU it profiles
the PyTorch references, and says so.
"""

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
import torch
import triton
import typer
from gpu_measure import measure_ceiling, snapshot
from iteration_profile import (
    PREFIX,
    Iteration,
    Profile,
    ProfileError,
    Row,
    profile_iterations,
    room_for,
    stage_bytes,
    stage_rows,
)
from random_model import exit_layer_of, random_drafter, random_target
from report.energy import EnergyMeter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.model.demo import DEMO_MODEL, bundled_pair
from kangaroo_kernels.model.kangaroo import check_lengths, resolve_device, resolve_dtype
from kangaroo_kernels.workloads import MODELS, ModelShape

USER_ERROR = 2
SHAPES = {shape.name: shape for shape in MODELS}

EPILOG = """\
[bold]With Nsight Systems[/] (a timeline of ranges and of the kernels inside of the graphs):

nsys profile -t cuda,nvtx --cuda-graph-trace=node -c cudaProfilerApi -o kangaroo python tools/profile_decode.py --nvtx

[bold]With Nsight Compute[/] (one kernel in full; graphs off, so that kernels are launched one by one):

ncu --profile-from-start off -k regex:gate_up_kernel -c 4 --set full -o gate_up python tools/profile_decode.py \
--nvtx --no-graphs

To compare: --chained (programmatic dependent launch), --persistent (drafting in one kernel), --no-graphs.

Ranges: kangaroo/draft/shallow, kangaroo/draft/step (or kangaroo/draft), kangaroo/verify, kangaroo/accept,
kangaroo/commit.
"""

COLOURS = {
    "draft": "#1f4e79",
    "draft/shallow": "#5b92bb",
    "draft/step": "#1f4e79",
    "verify": "#b5542b",
    "accept": "#6a9f58",
    "commit": "#8c6bb1",
}


# ---- what is decoded


def prompt_of(kangaroo: Kangaroo, context: int) -> list[int]:
    """``context`` tokens of the demo's prompts over and over, or random ones where there is no tokenizer."""
    if kangaroo.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(kangaroo.target.config.vocab_size, (context,), generator=generator).tolist()
    tokens: list[int] = []
    while len(tokens) < context:
        for text in bundled_pair().prompts().values():
            tokens += kangaroo.tokenizer(text)["input_ids"]
    return tokens[:context]


def host_ceiling() -> float:
    """What this machine's memory gives to a sum over 256 MiB, in 10^9 bytes a second; the best of five."""
    values = torch.ones(1 << 26)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - began)
    return values.nbytes / best / 1e9


def timed_decode(kangaroo: Kangaroo, prompt: Sequence[int], settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Decode for so many seconds with no profiler looking: tokens a second, and energy a token from NVML's counter."""
    device = kangaroo.target.device
    meter, tokens, spent = EnergyMeter(device if device.type == "cuda" else None), 0, 0.0
    room = min(512, kangaroo.target.config.context_length - len(prompt))
    while spent < seconds:
        steps = kangaroo.progress(prompt, max_new_tokens=room, **settings)
        next(steps)  # the prefill and the first step are over
        began = time.perf_counter()
        meter.begin(0)
        added = sum(len(step.commit.tokens) for step in steps)
        meter.end(added)
        tokens, spent = tokens + added, spent + time.perf_counter() - began
        if not added:
            break
    return {"tokens_per_second": tokens / spent if tokens else None, "joules_per_token": meter.joules_per_token}


# ---- what is shown


def show(rows: Sequence[Row], profiled: Profile, ceiling: float, record: dict[str, Any], console: Console) -> None:
    """Print the table and what stands around it."""
    kind = "operations" if record["device"] == "cpu" else "launches"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for header in ("runs", "us", "gaps us", kind, "MB", "GB/s", "of ceiling"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        speed = row.gigabytes_per_second
        table.add_row(
            row.stage,
            f"{row.runs:.1f}",
            f"{row.us:.1f}",
            f"{row.gap_us:.1f}",
            f"{row.launches:.1f}",
            "" if not row.bytes_moved else f"{row.bytes_moved / 1e6:.1f}",
            "" if speed is None else f"{speed:.1f}",
            "" if speed is None else f"{speed / ceiling:.1%}",
            end_section=row is rows[-2],
        )
    console.print(f"\n[bold]{record['what']}[/]", highlight=False)
    console.print(
        f"{record['how']}, context {profiled.length}; means over {len(profiled.iterations)} iterations", highlight=False
    )
    console.print(table)
    tokens = sum(len(commit.tokens) for commit in profiled.commits) / len(profiled.commits)
    console.print(f"{tokens:.2f} tokens an iteration; the memory reads {ceiling:.0f} GB/s at most, measured here")
    timed = record["timed"]
    if timed["tokens_per_second"]:
        energy = timed["joules_per_token"]
        told = "" if energy is None else f", {energy:.3f} J a token"
        console.print(f"{timed['tokens_per_second']:.0f} tokens/s with no profiler looking{told}")
    gpu = record["gpu"]
    if gpu:
        reasons = ", ".join(gpu.get("throttle_reasons") or []) or "none"
        console.print(
            f"GPU after it: {gpu.get('sm_mhz')} MHz, memory {gpu.get('memory_mhz')} MHz, {gpu.get('power_w')} W, "
            f"{gpu.get('temperature_c')} C, throttled by: {reasons}"
        )


def draw(iteration: Iteration, title: str, path: Path) -> None:
    """One iteration as a timeline: a lane a stage, a bar an event; what is empty within a stage is gap."""
    begin = iteration[0].start
    lanes = list(dict.fromkeys(stage.name.removeprefix(PREFIX) for stage in iteration))
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.45 * len(lanes)), layout="constrained")
    for stage in iteration:
        name = stage.name.removeprefix(PREFIX)
        lane, colour = lanes.index(name), COLOURS.get(name, "#777777")
        axes.broken_barh([(stage.start - begin, stage.us)], (lane - 0.4, 0.8), color=colour, alpha=0.15, linewidth=0)
        bars = [(event.start - begin, event.us) for event in stage.events]
        axes.broken_barh(bars, (lane - 0.3, 0.6), color="#bbbbbb" if stage.skipped else colour, linewidth=0)
    axes.set(yticks=range(len(lanes)), yticklabels=lanes, xlabel="microseconds", xlim=(0, None))
    axes.set_title(title, fontsize=10, loc="left")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def middle(iterations: Sequence[Iteration]) -> Iteration:
    """The one of median length."""
    return sorted(iterations, key=lambda each: sum(stage.us for stage in each))[len(iterations) // 2]


# ---- the command


def refuse(sentence: str) -> NoReturn:
    """Say what was wrong and end."""
    typer.echo(f"profile_decode: {sentence}", err=True)
    raise typer.Exit(USER_ERROR)


def load(
    model: str,
    adapter: str | None,
    exit_layer: int | None,
    shape: ModelShape | None,
    device: torch.device,
    dtype: str | None,
    graphs: bool,
    persistent: bool,
) -> Kangaroo:
    """The pair that was asked for: from folders, from the hub, at random, or the bundled one."""
    if shape is not None:
        target = random_target(shape, device, resolve_dtype(dtype, device, torch.bfloat16))
        drafter = random_drafter(target, exit_layer or exit_layer_of(shape))
        return Kangaroo(target, drafter, graphs=graphs, persistent=persistent)
    return Kangaroo.from_pretrained(model, adapter, exit_layer, device, dtype, graphs=graphs, persistent=persistent)


def decode_under_ranges(kangaroo: Kangaroo, prompt: Sequence[int], tokens: int, settings: dict[str, Any]) -> None:
    """Decode once to compile and capture, then once for Nsight to see."""
    kangaroo.generate(prompt, max_new_tokens=tokens, **settings)
    on_gpu = kangaroo.target.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        with torch.autograd.profiler.emit_nvtx():
            kangaroo.generate(prompt, max_new_tokens=tokens, **settings)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(
    command: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="The target's folder or hub name; by default 'demo', the bundled pair.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="The adapter's folder or hub name.")] = None,
    exit_layer: Annotated[int | None, typer.Option(min=1, help="Overrides the adapter's own.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights at a model's shape: {', '.join(SHAPES)}.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 64,
    iterations: Annotated[int, typer.Option(min=1, max=200, help="How many to look at.")] = 20,
    num_speculative_tokens: Annotated[int | None, typer.Option(help="The most drafts a step, 1 to 15.")] = None,
    draft_confidence_threshold: Annotated[float | None, typer.Option(help="Drafting stops below it, 0 to 1.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Profile plain decoding.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights.")] = None,
    graphs: Annotated[bool, typer.Option(help="Replay CUDA graphs, or launch kernel by kernel.")] = True,
    chain: Annotated[
        bool, typer.Option("--chained", help="Launch kernels as programmatic dependents (sm_90 and later).")
    ] = False,
    persistent: Annotated[bool, typer.Option("--persistent", help="Draft in one persistent kernel.")] = False,
    nvtx: Annotated[bool, typer.Option("--nvtx", help="Only decode, under NVTX ranges, for nsys and ncu.")] = False,
    out: Annotated[Path, typer.Option(help="Where trace, picture and record go.")] = Path("runs/profile"),
) -> None:
    """Profile a decode stage by stage."""
    console = Console(width=max(100, Console().width))
    if shape is not None and shape not in SHAPES:
        refuse(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}.")
    if shape is not None and model is not None:
        refuse("give either --model or --shape.")
    try:
        check_lengths(iterations, num_speculative_tokens, draft_confidence_threshold)
        where = resolve_device(device)
        if shape is not None and where.type == "cpu":
            refuse(f"{shape} would take minutes a step on a CPU; leave --shape out to profile the bundled pair here.")
        if chain:
            command.with_resource(chained())  # until the command ends
        pair = model or DEMO_MODEL, adapter, exit_layer, SHAPES.get(shape or "")
        kangaroo = load(*pair, where, dtype, graphs, persistent)
        settings: dict[str, Any] = {"plain": plain or kangaroo.drafter is None}
        if not settings["plain"]:
            settings |= {
                "num_speculative_tokens": num_speculative_tokens,
                "draft_confidence_threshold": draft_confidence_threshold,
            }
        most = kangaroo.target.config.context_length - room_for(iterations)
        if context > most:
            refuse(f"context is {context}; with {iterations} iterations this model allows at most {most}.")
        prompt = prompt_of(kangaroo, context)
        if nvtx:
            decode_under_ranges(kangaroo, prompt, 2 * iterations, settings)
            return
        profiled = profile_iterations(kangaroo, prompt, iterations, **settings)
    except (KangarooError, ProfileError) as error:
        refuse(str(error))
    on_gpu = where.type == "cuda"
    ceiling = measure_ceiling(where).read if on_gpu else host_ceiling()
    rows = stage_rows(profiled, stage_bytes(kangaroo, profiled.length))
    timed = timed_decode(kangaroo, prompt, settings, 2.0)
    way = "plain decoding" if settings["plain"] else "Kangaroo"
    name = "the bundled pair" if model in (None, DEMO_MODEL) else model
    how = (
        ("CUDA graphs replayed" if profiled.graphs else "kernels launched one by one") + ", chained" * chain
        if on_gpu
        else ("on the CPU: the PyTorch references, led by the host; no figure is about a GPU")
    )
    record = {
        "what": f"{way}, {shape + ' with random weights' if shape else name}",
        "how": how,
        "device": torch.cuda.get_device_name(where) if on_gpu else "cpu",
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "context": profiled.length,
        "iterations": len(profiled.iterations),
        "ceiling_gigabytes_per_second": ceiling,
        "stages": [row._asdict() for row in rows],
        "timed": timed,
        "gpu": snapshot(where) if on_gpu else None,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "trace.json").write_text(json.dumps(profiled.trace), encoding="utf-8")
    (out / "profile.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(middle(profiled.iterations), f"{record['what']}: one iteration, {how}", out / "iteration.png")
    show(rows, profiled, ceiling, record, console)
    console.print(f"wrote {out / 'trace.json'}, {out / 'iteration.png'}, {out / 'profile.json'}", highlight=False)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command(epilog=EPILOG)(main)

if __name__ == "__main__":
    app()
