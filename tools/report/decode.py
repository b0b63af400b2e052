"""Decode speeds at real models' shapes with random weights: plain, Kangaroo, and Kangaroo with synthetic acceptance.

With random weights no draft is sure and next to none is accepted: unforced, Kangaroo is at its worst, a draft a step
for nothing. ``synthetic.py`` says what the forced run assumes. Tokens a second are of the steps, prefill left out.
Steps with a fixed number of drafts are timed besides. Those in one kernel come behind all others: what that kernel does
wrong may end the process. A smoke run takes the same loop over the references.
"""

import gc
import statistics
from functools import partial
from typing import Any

from gpu_card import EnergyMeter
from random_model import random_kangaroo, random_prompt, sharing_weights
from synthetic import ASSUMPTION, MAX_DRAFTS, paper_trace

from kangaroo_kernels import Generation, Kangaroo
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.workloads import ModelShape, workloads

from .job import Job

CONTEXTS = (128, 2048, 8192)
NEW_TOKENS, LEAST_TOKENS, WARM_UP_TOKENS, SMOKE_TOKENS = 128, 32, 16, 5
STEP_DRAFTS, STEP_TOKENS, STEP_ROUNDS = (1, 2, 6), 48, 2
ROUNDS = 3
"""Timed decodes of a cell, after one of the same length that warms up and captures."""

PLAIN, PLAIN_CHAINED, UNFORCED, SYNTHETIC = WAYS = (
    "plain",
    "plain, chained",
    "Kangaroo, unforced",
    "Kangaroo, synthetic acceptance",
)
"""Chained launches are sm_90's (``launch_config.chained``)."""

STAGEWISE, STAGEWISE_CHAINED, ONE_KERNEL = DRAFTING = ("kernel by kernel", "kernel by kernel, chained", "in one kernel")


def contexts_of(job: Job) -> tuple[int, ...]:
    """Prompt lengths, the shortest first."""
    return (20,) if job.smoke else CONTEXTS[: 1 if job.brief else None]


def bytes_a_token(shape: ModelShape, length: int, itemsize: int) -> int:
    """That a plain step must read at the end of a text of ``length``: every weight once, and all keys and values."""
    moved = {(each.op, each.role): each.bytes_moved(1, length, itemsize) for each in workloads(shape)}
    layer = sum(size for (op, _), size in moved.items() if not op.endswith("head"))
    return shape.layers * layer + moved["top1_head", "head"]


def decode(kangaroo: Kangaroo, prompt: list[int], tokens: int, plain: bool, meter: EnergyMeter) -> Generation:
    """One decode; the meter runs from its first committed step to its last."""
    steps = kangaroo.progress(prompt, max_new_tokens=tokens, plain=plain)
    last = next(steps)
    meter.begin(len(last.generation.tokens))
    for step in steps:
        last = step
    generation = last.generation
    meter.end(len(generation.tokens))
    return generation


def measure(kangaroo: Kangaroo, prompt: list[int], way: str, seconds: float, job: Job) -> dict[str, Any]:
    """Speed of one way to decode, in about ``seconds`` besides the first compilations."""
    plain, most = way in (PLAIN, PLAIN_CHAINED), paper_trace().tokens if way == SYNTHETIC else NEW_TOKENS
    tokens, rounds, meter = SMOKE_TOKENS, 1, EnergyMeter(None)
    if not job.smoke:
        decode(kangaroo, prompt, WARM_UP_TOKENS, plain, meter)  # compiles, which takes longer than it decodes
        short = decode(kangaroo, prompt, WARM_UP_TOKENS, plain, meter)
        affordable = int(seconds * short.stats.tokens_per_second / (ROUNDS + 1))
        tokens, rounds = min(most, max(LEAST_TOKENS, affordable)), ROUNDS
        decode(kangaroo, prompt, tokens, plain, meter)  # captures every graph that the length needs
        meter = EnergyMeter(job.device)
    runs = [decode(kangaroo, prompt, tokens, plain, meter).stats for _ in range(rounds)]
    speeds = [run.tokens_per_second for run in runs]
    stats = runs[0]
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "new_tokens": tokens,
        "rounds": rounds,
        "us_per_step": 1e6 * statistics.median(run.decode_seconds / run.verification_steps for run in runs),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "drafted_per_step": stats.drafted / stats.verification_steps,
        "joules_per_token": meter.joules_per_token,
    }


def measure_step(kangaroo: Kangaroo, prompt: list[int], drafts: int, job: Job) -> dict[str, Any]:
    """Microseconds of a step that makes so many drafts, whatever their confidence."""
    tokens, rounds = (SMOKE_TOKENS, 1) if job.smoke else (STEP_TOKENS, 1 + STEP_ROUNDS)
    settings: dict[str, Any] = {"num_speculative_tokens": drafts, "draft_confidence_threshold": 0.0}
    runs = [kangaroo.generate(prompt, max_new_tokens=tokens, **settings).stats for _ in range(rounds)]
    times = [1e6 * run.decode_seconds / run.verification_steps for run in runs]
    return {"us_per_step": statistics.median(times[1:] or times)}  # the first compiles and captures


class Decoders:
    """What decodes at one model's shape, a decoder a way, all on the same weights; made when they are needed."""

    def __init__(self, shape: ModelShape, job: Job) -> None:
        self.shape, self.job = shape, job
        self._made: dict[str, Kangaroo] = {}

    def __call__(self, way: str) -> Kangaroo:
        """The one for a way to decode or to draft: a graph keeps what it was captured with, so each has its own."""
        if not self._made:
            self._made[UNFORCED] = random_kangaroo(
                self.shape, self.job.device, self.job.dtype, references=self.job.smoke
            )
        if way not in self._made:
            trace = paper_trace() if way == SYNTHETIC else None
            self._made[way] = sharing_weights(self._made[UNFORCED], trace=trace, persistent=way == ONE_KERNEL)
        return self._made[way]


def run(job: Job) -> None:
    """Every model, context and way, until the time is over."""
    trace = paper_trace()
    job.note(
        synthetic={
            "assumption": ASSUMPTION,
            "mean_acceptance_length": trace.mean_acceptance_length,
            "drafted_per_step": float(trace.drafted.double().mean()),
            "num_speculative_tokens": MAX_DRAFTS,
        },
    )
    for index, shape in enumerate(job.models):
        measure_decodes(job, shape, len(job.models) - index)
        gc.collect()
        job.free()
    for some in (DRAFTING[:-1], DRAFTING[-1:]):
        for shape in job.models:
            measure_steps(job, shape, some)
            gc.collect()
            job.free()


def measure_decodes(job: Job, shape: ModelShape, models_left: int) -> None:
    """The decodes of one model; a plain one has the bytes that a step must read besides."""
    decoders = Decoders(shape, job)

    def cell(way: str, prompt: list[int], seconds: float) -> dict[str, Any]:
        with chained(way == PLAIN_CHAINED):
            found = measure(decoders(way), prompt, way, seconds, job)
        if way in (PLAIN, PLAIN_CHAINED):
            length = len(prompt) + found["new_tokens"] // 2
            found["bytes_per_token"] = bytes_a_token(shape, length, job.dtype.itemsize)
        return found

    todo = [(context, way) for context in contexts_of(job) for way in WAYS]
    for done, (context, way) in enumerate(todo):
        seconds = job.left / (models_left * len(todo) - done) / (2 if job.brief else 1)  # the other half is for steps
        entry = {"model": shape.name, "context": context, "way": way}
        job.cell("cells", entry, partial(cell, way, random_prompt(shape, context), seconds))


def measure_steps(job: Job, shape: ModelShape, ways: tuple[str, ...]) -> None:
    """The steps of one model by the number of drafts, drafting in these ways."""
    decoders, context = Decoders(shape, job), contexts_of(job)[0]

    def cell(drafting: str, drafts: int) -> dict[str, Any]:
        with chained(drafting == STAGEWISE_CHAINED):
            return measure_step(decoders(drafting), random_prompt(shape, context), drafts, job)

    for drafts in STEP_DRAFTS:
        for drafting in ways:
            entry = {"model": shape.name, "context": context, "drafts": drafts, "drafting": drafting}
            job.cell("steps", entry, partial(cell, drafting, drafts))
