"""What an iteration is made of: every kernel (every operation on a CPU) with its stage, its time and the gap before it.

The runtime marks its stages as ranges (``model/spans.py``). On a CPU, and where a GPU is launched kernel by kernel, an
event belongs to the range in which it was launched. The kernels of a replayed CUDA graph are launched in no range: they
come in the order in which a launched iteration had them, and take their stages from there.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.results import Commit
from kangaroo_kernels.model.target.config import LlamaConfig

PREFIX = "kangaroo/"
DRAFT_STAGES = (PREFIX + "draft/shallow", PREFIX + "draft/step")
GPU_EVENTS = ("kernel",)
LAUNCHES = ("cuda_runtime", "cuda_driver")


class ProfileError(RuntimeError):
    """A trace that does not hold what it should."""


class Event(NamedTuple):
    """A kernel, or an operation on a CPU.

    Attributes:
        start: microseconds from the trace's zero.
        us: how long it ran.
    """

    name: str
    start: float
    us: float

    @property
    def end(self) -> float:
        """Microseconds from the trace's zero."""
        return self.start + self.us


@dataclass(frozen=True)
class StageRun:
    """A stage of one iteration.

    Attributes:
        name: of the range.
        start: microseconds from the trace's zero: the end of the stage before.
        us: from there to the end of its last event.
        skipped: a draft that was not made: its kernels returned at once.
        events: in order.
    """

    name: str
    start: float
    us: float
    skipped: bool = False
    events: list[Event] = field(default_factory=list)

    @property
    def busy_us(self) -> float:
        """Of its events."""
        return sum(event.us for event in self.events)


Iteration = list[StageRun]


# ---- reading a trace


def events_of(trace: dict[str, Any], categories: Sequence[str]) -> list[dict[str, Any]]:
    """A trace's complete events of some categories, by their start."""
    found = [each for each in trace["traceEvents"] if each.get("ph") == "X" and each.get("cat") in categories]
    return sorted(found, key=lambda each: (each["ts"], -each["dur"]))


def outermost(operations: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Operations that no other one of their thread called."""
    ends: dict[Any, float] = {}
    for each in operations:
        if each["ts"] >= ends.get(each["tid"], float("-inf")):
            ends[each["tid"]] = each["ts"] + each["dur"]
            yield each


def launched_events(trace: dict[str, Any], on_gpu: bool) -> list[tuple[Event, float]]:
    """Every event with the time at which the host launched it, in the order of running."""
    if not on_gpu:
        return [
            (Event(each["name"], each["ts"], each["dur"]), each["ts"])
            for each in outermost(events_of(trace, ("cpu_op",)))
        ]
    launches = {each["args"].get("correlation"): each["ts"] for each in events_of(trace, LAUNCHES)}
    return [
        (Event(each["name"], each["ts"], each["dur"]), launches.get(each["args"]["correlation"], float("-inf")))
        for each in events_of(trace, GPU_EVENTS)
    ]


def by_ranges(trace: dict[str, Any], on_gpu: bool, last_stage: str) -> list[Iteration]:
    """The whole iterations of a trace whose every event was launched within a range.

    Raises:
        ProfileError: there is none.
    """
    launched, found, current = launched_events(trace, on_gpu), list[Iteration](), Iteration()
    for each in events_of(trace, ("user_annotation",)):
        if each["name"].startswith(PREFIX):
            first, last = each["ts"], each["ts"] + each["dur"]
            events = [event for event, launch in launched if first <= launch <= last]
            current.append(StageRun(each["name"], first, each["dur"], events=events))
            if each["name"] == last_stage:
                found.append(joined(current, on_gpu))
                current = []
    if not found:
        raise ProfileError(f"the trace shows no whole iteration: no range {last_stage}.")
    return found


def joined(iteration: Iteration, on_gpu: bool) -> Iteration:
    """The same without seams: a stage begins where the one before it ended, so a gap counts to the stage behind it.

    On a GPU the times are those of the kernels, on a CPU those of the ranges.
    """
    first_event = next((event.start for stage in iteration for event in stage.events), iteration[0].start)
    stages, end = [], first_event if on_gpu else iteration[0].start
    for stage in iteration:
        last = stage.start + stage.us
        if on_gpu:
            last = stage.events[-1].end if stage.events else end
        stages.append(replace(stage, start=end, us=last - end))
        end = last
    return stages


def by_order(trace: dict[str, Any], like: Iteration) -> list[Iteration]:
    """The iterations of a trace of replayed graphs, each with the kernels of ``like`` in their order.

    Raises:
        ProfileError: other kernels than those.
    """
    kernels = [event for event, _ in launched_events(trace, on_gpu=True)]
    names = [event.name for stage in like for event in stage.events]
    if not names or len(kernels) % len(names):
        raise ProfileError(f"{len(kernels)} kernels ran; they must be a multiple of an iteration's {len(names)}.")
    found = []
    for first in range(0, len(kernels), len(names)):
        chunk = iter(kernels[first : first + len(names)])
        iteration = [replace(stage, events=[next(chunk) for _ in stage.events]) for stage in like]
        if [event.name for stage in iteration for event in stage.events] != names:
            raise ProfileError("the replayed graph ran other kernels than a launched iteration.")
        found.append(joined(iteration, on_gpu=True))
    return found


# ---- making one


@dataclass(frozen=True)
class Profile:
    """Some iterations of a decode.

    Attributes:
        iterations: their stages.
        commits: what each of them committed.
        length: of the text in the middle of them.
        trace: Chrome's format, as the profiler wrote it.
        graphs: how they were launched.
    """

    iterations: list[Iteration]
    commits: list[Commit]
    length: int
    trace: dict[str, Any]
    graphs: bool


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
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:  # torch 2.11 warns of what is not kept without
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
        ProfileError: a profiler that may not see this device, or a text that ended too soon.
    """
    on_gpu = kangaroo.target.device.type == "cuda"
    resident = kangaroo.target.backend.resident
    last_stage = PREFIX + ("commit" if resident or not settings.get("plain") else "verify")
    try:
        kangaroo.generate(prompt, max_new_tokens=64, **settings)  # compiles; captures
        trace, commits, length = traced(kangaroo, prompt, count, settings)
    except StopIteration:
        raise ProfileError("the text ended before enough iterations ran; give another prompt.") from None
    graphs = on_gpu and kangaroo.graphs
    if graphs:
        launcher = Kangaroo(kangaroo.target, kangaroo.drafter, kangaroo.tokenizer, graphs=False)
        like = by_ranges(traced(launcher, prompt, 2, settings)[0], on_gpu, last_stage)[-1]
        iterations = by_order(trace, like)
    else:
        iterations = by_ranges(trace, on_gpu, last_stage)
    if len(iterations) != len(commits):
        raise ProfileError(f"{len(iterations)} iterations were seen, {len(commits)} committed.")
    pairs = zip(iterations, commits, strict=True)
    marked = [mark_skipped(iteration, commit.drafted) for iteration, commit in pairs] if resident else iterations
    return Profile(marked, commits, length, trace, graphs)


def mark_skipped(iteration: Iteration, drafted: int) -> Iteration:
    """The same with the stages of drafts that were not made marked as skipped."""
    seen = dict.fromkeys(DRAFT_STAGES, 0)
    marked = []
    for stage in iteration:
        skipped = False
        if stage.name in seen:
            place = seen[stage.name]
            seen[stage.name] += 1
            # the shallow layers run on the newest token and on every draft
            skipped = place > drafted if stage.name == DRAFT_STAGES[0] else place >= drafted
        marked.append(replace(stage, skipped=skipped))
    return marked


# ---- what it comes to


def stage_bytes(kangaroo: Kangaroo, length: int) -> dict[str, int]:
    """Bytes that a run of each stage must read: every weight once, and the KV cache of a text of ``length`` tokens."""
    target = kangaroo.target
    size = target.weights.embedding.element_size()

    def attention(weights: Any, config: LlamaConfig) -> int:
        cache: int = 2 * config.num_key_value_heads * config.head_dim * length * size
        return int(weights.qkv.nbytes + weights.output.nbytes + cache)

    layers = [
        attention(layer.attention, target.config) + layer.gate_up.nbytes + layer.down.nbytes
        for layer in target.weights.layers
    ]
    head, exit_layer = target.weights.head.nbytes, 0
    found = {}
    if isinstance(kangaroo.drafter, KangarooDrafter):
        adapter, exit_layer = kangaroo.drafter.adapter, kangaroo.drafter.first_layer
        found[DRAFT_STAGES[0]] = sum(layers[:exit_layer])
        found[DRAFT_STAGES[1]] = attention(adapter.block.weights, adapter.config.llama) + head
    found[PREFIX + "verify"] = sum(layers[exit_layer:]) + head
    return found


class Row(NamedTuple):
    """A stage, over all iterations that were looked at; times and counts are an iteration's mean.

    Attributes:
        stage: its name.
        runs: an iteration.
        us: with the gaps.
        gap_us: between its events and before them.
        launches: kernels, or operations on a CPU.
        bytes_moved: that it must read; None for the small ones and what was skipped.
        gigabytes_per_second: those bytes over its time.
    """

    stage: str
    runs: float
    us: float
    gap_us: float
    launches: float
    bytes_moved: float | None
    gigabytes_per_second: float | None


def stage_rows(profiled: Profile, bytes_of: dict[str, int]) -> list[Row]:
    """The table: a row a stage in the order of the decode, then one for the whole iteration."""
    count = len(profiled.iterations)
    if DRAFT_STAGES[0] in bytes_of:  # all of a step's drafts may be one stage
        drafted = sum(commit.drafted for commit in profiled.commits) / count
        shallow, step = (bytes_of[name] for name in DRAFT_STAGES)
        bytes_of = {**bytes_of, PREFIX + "draft": round(shallow + drafted * (shallow + step))}
    runs: dict[tuple[str, bool], list[StageRun]] = {}
    for iteration in profiled.iterations:
        for stage in iteration:
            runs.setdefault((stage.name, stage.skipped), []).append(stage)
    rows = []
    for (name, skipped), stages in runs.items():
        moved = None if skipped or name not in bytes_of else bytes_of[name] * len(stages) / count
        rows.append(_row(name.removeprefix(PREFIX) + ", skipped" * skipped, stages, count, moved))
    known = [row.bytes_moved for row in rows if row.bytes_moved is not None]
    return [*rows, _row("iteration", [stage for each in profiled.iterations for stage in each], count, sum(known))]


def _row(name: str, stages: Sequence[StageRun], count: int, moved: float | None) -> Row:
    us = sum(stage.us for stage in stages) / count
    gaps = us - sum(stage.busy_us for stage in stages) / count
    launches = sum(len(stage.events) for stage in stages) / count
    speed = moved / us / 1e3 if moved and us else None
    return Row(name, 1.0 if name == "iteration" else len(stages) / count, us, gaps, launches, moved, speed)
