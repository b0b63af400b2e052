"""Where the time of a decode goes, stage by stage.

    python tools/profile_decode.py [--model DIR_OR_HUB_NAME --adapter DIR_OR_HUB_NAME | --shape Vicuna-7B] [--context N]

Prints a table of stages (time, bytes, GB/s, share of the measured ceiling, launches, gaps), and writes the profiler's
trace for chrome://tracing or ui.perfetto.dev, a picture of one iteration, and everything as JSON. On a CPU it profiles
the PyTorch references, and says so.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from command import refuse
from gpu_card import EnergyMeter, snapshot
from gpu_measure import measure_ceiling
from iteration_profile import (
    Profile,
    ProfileError,
    Row,
    median_of,
    profile_iterations,
    room_for,
    stage_bytes,
    stage_rows,
)
from random_model import exit_layer_of, random_drafter, random_prompt, random_target
from report.environment import versions
from report.job import write_json
from report.plots import iteration
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.model.demo import DEMO_MODEL, bundled_pair
from kangaroo_kernels.model.load import resolve_device, resolve_dtype
from kangaroo_kernels.model.request import Settings
from kangaroo_kernels.workloads import MODELS, TINY

NAME = "profile_decode"
SHAPES = {shape.name: shape for shape in MODELS}
SECONDS = 2.0
"""Of decoding with no profiler looking."""

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


def prompt_of(kangaroo: Kangaroo, context: int) -> list[int]:
    """``context`` tokens of the demo's prompts over and over, or random ones where there is no tokenizer."""
    if kangaroo.tokenizer is None:
        return random_prompt(TINY._replace(vocab_size=kangaroo.target.config.vocab_size), context)
    tokens: list[int] = []
    while len(tokens) < context:
        for text in bundled_pair().prompts().values():
            tokens += kangaroo.tokenizer(text)["input_ids"]
    return tokens[:context]


def host_ceiling() -> float:
    """What this machine's memory gives to a sum over 256 MiB, in 10^9 bytes a second; the best of five."""
    values, best = torch.ones(1 << 26), float("inf")
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


def show(rows: Sequence[Row], profiled: Profile, record: dict[str, Any], console: Console) -> None:
    """Print the table and what stands around it."""
    ceiling = record["ceiling_gigabytes_per_second"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage", no_wrap=True)
    kind = "operations" if record["device"] == "cpu" else "launches"
    for header in ("runs", "us", "gaps us", kind, "MB", "GB/s", "of ceiling"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        speed = row.gigabytes_per_second
        figures = [f"{value:.1f}" for value in (row.runs, row.us, row.gap_us, row.launches)]
        moved = f"{row.bytes_moved / 1e6:.1f}" if row.bytes_moved else ""
        speeds = ("", "") if speed is None else (f"{speed:.1f}", f"{speed / ceiling:.1%}")
        table.add_row(row.stage, *figures, moved, *speeds, end_section=row is rows[-2])
    tokens = sum(len(commit.tokens) for commit in profiled.commits) / len(profiled.commits)
    console.print(f"\n[bold]{record['what']}[/]")
    console.print(f"{record['how']}, context {profiled.length}; means over {len(profiled.iterations)} iterations")
    console.print(table)
    console.print(f"{tokens:.2f} tokens an iteration; the memory reads {ceiling:.0f} GB/s at most, measured here")
    speed, energy = record["timed"].values()
    if speed:
        told = "" if energy is None else f", {energy:.3f} J a token"
        console.print(f"{speed:.0f} tokens/s with no profiler looking{told}")
    if gpu := record["gpu"]:
        reasons = ", ".join(gpu.get("throttle_reasons") or []) or "none"
        console.print(
            f"GPU after it: {gpu.get('sm_mhz')} MHz, memory {gpu.get('memory_mhz')} MHz, {gpu.get('power_w')} W, "
            f"{gpu.get('temperature_c')} C, throttled by: {reasons}"
        )


def decode_under_ranges(kangaroo: Kangaroo, prompt: Sequence[int], tokens: int, settings: dict[str, Any]) -> None:
    """Decode once to compile and capture, then once for Nsight to see."""
    kangaroo.generate(prompt, max_new_tokens=tokens, **settings)
    if kangaroo.target.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        with torch.autograd.profiler.emit_nvtx():
            kangaroo.generate(prompt, max_new_tokens=tokens, **settings)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def report_of(
    profiled: Profile, kangaroo: Kangaroo, prompt: Sequence[int], settings: dict[str, Any], what: str
) -> tuple[list[Row], dict[str, Any]]:
    """The table's rows, and everything as JSON."""
    device = kangaroo.target.device
    on_gpu = device.type == "cuda"
    launched = "CUDA graphs replayed" if profiled.graphs else "kernels launched one by one"
    on_a_cpu = "on the CPU: the PyTorch references, led by the host; no figure is about a GPU"
    rows = stage_rows(profiled, stage_bytes(kangaroo, profiled.length))
    return rows, {
        "what": f"{'plain decoding' if settings['plain'] else 'Kangaroo'}, {what}",
        "how": launched if on_gpu else on_a_cpu,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "versions": versions(),
        "context": profiled.length,
        "iterations": len(profiled.iterations),
        "ceiling_gigabytes_per_second": measure_ceiling(device).read if on_gpu else host_ceiling(),
        "stages": [row._asdict() for row in rows],
        "timed": timed_decode(kangaroo, prompt, settings, SECONDS),
        "gpu": snapshot(device) if on_gpu else None,
    }


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
    if shape is not None and shape not in SHAPES:
        refuse(NAME, f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}.")
    if shape is not None and model is not None:
        refuse(NAME, "give either --model or --shape.")
    try:
        drafting: dict[str, Any] = {"num_speculative_tokens": num_speculative_tokens}
        drafting["draft_confidence_threshold"] = draft_confidence_threshold
        Settings(max_new_tokens=iterations, **drafting)  # refuses before the long work of loading
        where = resolve_device(device)
        if shape is not None and where.type == "cpu":
            refuse(NAME, f"{shape} would take minutes a step on a CPU; leave --shape out to profile the bundled pair.")
        if chain:
            command.with_resource(chained())  # until the command ends
        if shape is None:
            how: dict[str, Any] = {"device": where, "dtype": dtype, "graphs": graphs, "persistent": persistent}
            kangaroo = Kangaroo.from_pretrained(model or DEMO_MODEL, adapter, exit_layer, **how)
        else:
            target = random_target(SHAPES[shape], where, resolve_dtype(dtype, where, torch.bfloat16))
            drafter = random_drafter(target, exit_layer or exit_layer_of(SHAPES[shape]), persistent=persistent)
            kangaroo = Kangaroo(target, drafter, graphs=graphs)
        settings: dict[str, Any] = {"plain": plain or kangaroo.drafter is None}
        settings |= {} if settings["plain"] else drafting
        most = kangaroo.target.config.context_length - room_for(iterations)
        if context > most:
            refuse(NAME, f"context is {context}; with {iterations} iterations this model allows at most {most}.")
        prompt = prompt_of(kangaroo, context)
        if nvtx:
            return decode_under_ranges(kangaroo, prompt, 2 * iterations, settings)
        profiled = profile_iterations(kangaroo, prompt, iterations, **settings)
    except (KangarooError, ProfileError) as error:
        refuse(NAME, str(error))
    name = "the bundled pair" if model in (None, DEMO_MODEL) else str(model)
    what = (f"{shape} with random weights" if shape else name) + ", chained" * chain + ", in one kernel" * persistent
    rows, record = report_of(profiled, kangaroo, prompt, settings, what)
    out.mkdir(parents=True, exist_ok=True)
    (out / "trace.json").write_text(json.dumps(profiled.trace), encoding="utf-8")
    write_json(out / "profile.json", record)
    iteration(
        median_of(profiled.iterations), out / "iteration.png", f"{record['what']}: one iteration, {record['how']}"
    )
    console = Console(width=max(100, Console().width), highlight=False)
    show(rows, profiled, record, console)
    console.print(f"wrote {out / 'trace.json'}, {out / 'iteration.png'}, {out / 'profile.json'}")
    return None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command(epilog=EPILOG)(main)

if __name__ == "__main__":
    app()
