"""What an iteration is made of: every kernel (every operation on a CPU) with its stage, its time and the gap before it.

The runtime marks its stages as ranges (``model/spans.py``). On a CPU, and where a GPU is launched kernel by kernel, an
event belongs to the range in which it was launched. The kernels of a replayed CUDA graph are launched in no range: they
come in the order in which a launched iteration had them, and take their stages from there.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import profile

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.model.drafters.adapter import Adapter
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.results import Commit
from kangaroo_kernels.model.target.config import LlamaConfig
from kangaroo_kernels.model.target.llama import DecoderLayer

PREFIX = "kangaroo/"
SHALLOW, STEP, BLOCK = (PREFIX + "draft/" + name for name in ("shallow", "step", "block"))


class Event(NamedTuple):
    """A kernel, or an operation on a CPU; times are microseconds, from the trace's zero."""

    name: str
    start: float
    us: float


class StageRun(NamedTuple):
    """A stage of one iteration, from the end of the stage before to the end of its own last event."""

    name: str
    start: float
    events: Sequence[Event] = ()

    @property
    def us(self) -> float:
        """How long it took, with the gaps; nothing without events."""
        return self.events[-1].start + self.events[-1].us - self.start if self.events else 0.0


Iteration = list[StageRun]

# ---- reading a trace


def events_of(trace: dict[str, Any], *categories: str) -> list[dict[str, Any]]:
    """A trace's complete events of some categories, by their start."""
    found = [each for each in trace["traceEvents"] if each.get("ph") == "X" and each.get("cat") in categories]
    return sorted(found, key=lambda each: (each["ts"], -each["dur"]))


def launched_events(trace: dict[str, Any], on_gpu: bool) -> list[tuple[Event, float]]:
    """Every event with the time at which the host launched it, in the order of running.

    An operation that another one called is a part of that, and no event of its own.
    """
    found, end = list[tuple[Event, float]](), -math.inf
    launches = events_of(trace, "cuda_runtime", "cuda_driver")
    launched = {each["args"].get("correlation"): each["ts"] for each in launches}
    for each in events_of(trace, "kernel" if on_gpu else "cpu_op"):
        event = Event(each["name"], each["ts"], each["dur"])
        if on_gpu:
            found.append((event, launched.get(each["args"]["correlation"], -math.inf)))
        elif event.start >= end:
            found.append((event, event.start))
            end = event.start + event.us
    return found


def by_ranges(trace: dict[str, Any], on_gpu: bool, last_stage: str) -> list[Iteration]:
    """The whole iterations of a trace whose every event was launched within a range.

    Raises:
        KangarooError: there is none.
    """
    launched, found, current = launched_events(trace, on_gpu), list[Iteration](), Iteration()
    for each in events_of(trace, "user_annotation"):
        if each["name"].startswith(PREFIX):
            first, last = each["ts"], each["ts"] + each["dur"]
            events = [event for event, launch in launched if first <= launch <= last]
            current.append(StageRun(each["name"], first, events))
            if each["name"] == last_stage:
                found.append(joined(current))
                current = []
    if not found:
        raise KangarooError(f"the trace shows no whole iteration: no range {last_stage}.")
    return found


def joined(iteration: Iteration) -> Iteration:
    """The same without seams: a stage begins where the one before it ended, so a gap counts to the stage behind it."""
    stages, end = [], next((event.start for stage in iteration for event in stage.events), iteration[0].start)
    for stage in iteration:
        stages.append(stage._replace(start=end))
        end += stages[-1].us
    return stages


def by_order(trace: dict[str, Any], like: Iteration) -> list[Iteration]:
    """The iterations of a trace of replayed graphs, each with the kernels of ``like`` in their order.

    Raises:
        KangarooError: other kernels than those.
    """
    kernels = [event for event, _ in launched_events(trace, on_gpu=True)]
    names = [event.name for stage in like for event in stage.events]
    if not names or [event.name for event in kernels] != names * (len(kernels) // len(names)):
        raise KangarooError(f"the replayed graph's {len(kernels)} kernels are not a launched iteration's {len(names)}.")
    following, found = iter(kernels), []
    for _ in range(len(kernels) // len(names)):
        found.append(joined([stage._replace(events=[next(following) for _ in stage.events]) for stage in like]))
    return found


# ---- making one


class Profile(NamedTuple):
    """Some iterations of a decode."""

    iterations: list[Iteration]
    commits: list[Commit]  # one an iteration
    length: int  # of the text in the middle of them
    trace: dict[str, Any]  # Chrome's format, as the profiler wrote it
    graphs: bool  # whether graphs were replayed


def median_of(iterations: Sequence[Iteration]) -> Iteration:
    """The one of median length."""
    return sorted(iterations, key=lambda each: sum(stage.us for stage in each))[len(iterations) // 2]


def room_for(iterations: int) -> int:
    """Tokens that so many iterations and those around them may add."""
    return (iterations + 4) * MAX_ROWS


def traced(kangaroo: Kangaroo, prompt: Sequence[int], count: int, settings: dict[str, Any]) -> Any:
    """Iterations behind the first two: ``(trace, commits, length)``; what the device still does before is not in it."""
    on_gpu = kangaroo.target.device.type == "cuda"
    steps = kangaroo.progress(prompt, max_new_tokens=room_for(count), **settings)
    commits = [next(steps).commit, next(steps).commit]  # compiled, captured, and the prefill done
    if on_gpu:
        torch.cuda.synchronize()
    with profile(acc_events=True) as profiler:  # torch 2.11 warns of what is not kept without
        commits += [next(steps).commit for _ in range(count)]
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:  # the host reads a step late: the last one profiled is still unread
        commits = [*commits[1:], next(steps).commit]
    length = len(prompt) + sum(len(commit.tokens) for commit in commits[: 2 + count // 2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8")), commits[2:], length


def profile_iterations(kangaroo: Kangaroo, prompt: Sequence[int], count: int, **settings: Any) -> Profile:
    """Decode behind ``prompt`` and look at ``count`` iterations; ``settings`` are those of ``Kangaroo.generate``.

    On a GPU the iterations are looked at as they run in production, as replayed graphs, unless the instance has none.

    Raises:
        KangarooError: a profiler that may not see this device, or a text that ended too soon.
    """
    on_gpu, resident = kangaroo.target.device.type == "cuda", kangaroo.target.backend.resident
    last_stage = PREFIX + ("commit" if resident or not settings.get("plain") else "verify")
    graphs = on_gpu and kangaroo.graphs
    try:
        kangaroo.generate(prompt, max_new_tokens=64, **settings)  # compiles; captures
        trace, commits, length = traced(kangaroo, prompt, count, settings)
    except StopIteration:
        raise KangarooError("the text ended before enough iterations ran; give another prompt.") from None
    if graphs:
        launcher = Kangaroo(kangaroo.target, kangaroo.drafter, kangaroo.tokenizer, graphs=False)
        like = by_ranges(traced(launcher, prompt, 2, settings)[0], on_gpu, last_stage)[-1]
        iterations = by_order(trace, like)
    else:
        iterations = by_ranges(trace, on_gpu, last_stage)
    if len(iterations) != len(commits):
        raise KangarooError(f"{len(iterations)} iterations were seen, {len(commits)} committed.")
    return Profile(iterations, commits, length, trace, graphs)


# ---- what it comes to


def stage_bytes(kangaroo: Kangaroo, length: int) -> dict[str, int]:
    """Bytes that a run of each stage must read: every weight once, and the KV cache of a text of ``length`` tokens.

    Of a block, those of the adapter's layer and, as a step, what each draft takes besides.
    """
    target = kangaroo.target
    size = target.weights.embedding.element_size()

    def layer_bytes(layer: DecoderLayer, config: LlamaConfig) -> int:
        cache = 2 * config.num_key_value_heads * config.head_dim * length * size
        attention, mlp = layer.weights.attention, layer.weights.mlp
        inner = mlp.gate_up.nbytes + mlp.down.nbytes if mlp else 0
        return attention.qkv.nbytes + attention.output.nbytes + cache + inner

    layers = [layer_bytes(layer, target.config) for layer in target.layers]
    head, exit_layer, found = target.weights.head.nbytes, 0, {}
    if isinstance(kangaroo.drafter, KangarooDrafter):
        adapter, exit_layer = kangaroo.drafter.adapter, kangaroo.drafter.first_layer
        assert isinstance(adapter, Adapter)
        found[SHALLOW] = sum(layers[:exit_layer])
        own, down, block = layer_bytes(adapter.layer, adapter.config.llama), adapter.head.down, adapter.block
        choice = adapter.head.weight.nbytes + (down.nbytes if down else 0)
        found |= {STEP: own + choice} if block is None else {BLOCK: own, STEP: choice + block.correction.nbytes}
    return found | {PREFIX + "verify": sum(layers[exit_layer:]) + head}


def stage_rows(profiled: Profile, bytes_of: dict[str, int]) -> list[dict[str, Any]]:
    """The table: a row a stage in the order of the decode, then one for the whole iteration.

    Times, counts and bytes are an iteration's mean. ``runs`` has those too whose kernels returned at once, since the
    draft was not to be made; ``us`` the gaps, and ``gap_us`` those between its events and before them; ``launches``
    kernels, or operations on a CPU; ``bytes_moved`` what it must read (None for small stages), and
    ``gigabytes_per_second`` that over its time.
    """
    count = len(profiled.iterations)
    drafted = sum(commit.drafted for commit in profiled.commits) / count
    made = {SHALLOW: drafted + 1, STEP: drafted}  # the shallow layers run on the newest token and on every draft
    if BLOCK in bytes_of:
        made[SHALLOW] = 2.0  # on the newest token, and on all drafts at once
    moved = {name: size * made.get(name, 1.0) for name, size in bytes_of.items()}
    if BLOCK in bytes_of:
        moved[BLOCK] += moved.pop(STEP)
    elif SHALLOW in moved:
        moved[PREFIX + "draft"] = moved[SHALLOW] + moved[STEP]  # all of a step's drafts may be one stage
    everything = [stage for iteration in profiled.iterations for stage in iteration]
    stages: dict[str, list[StageRun]] = {}
    for stage in everything:
        stages.setdefault(stage.name, []).append(stage)

    def row(name: str, stages: Sequence[StageRun], runs: float, moved: float | None) -> dict[str, Any]:
        events = [event for stage in stages for event in stage.events]
        us, busy = (sum(each.us for each in some) / count for some in (stages, events))
        speed = moved / us / 1e3 if moved and us else None
        found = {"stage": name, "runs": runs, "us": us, "gap_us": us - busy, "launches": len(events) / count}
        return found | {"bytes_moved": moved, "gigabytes_per_second": speed}

    rows = [row(name.removeprefix(PREFIX), some, len(some) / count, moved.get(name)) for name, some in stages.items()]
    return [*rows, row("iteration", everything, 1.0, sum(each["bytes_moved"] or 0 for each in rows))]
