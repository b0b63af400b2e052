"""Decode speeds at real models' shapes with random weights: plain, Kangaroo, and Kangaroo with synthetic acceptance.

With random weights no draft is sure and next to none is accepted: unforced, Kangaroo is at its worst, a draft a step
for nothing. ``synthetic.py`` says what the forced run assumes. Tokens a second are of the steps, prefill left out.
Steps with a fixed number of drafts are timed besides. Those in one kernel come behind all others: what that kernel does
wrong may end the process. A smoke run takes the same loop over the references.
"""

import gc
from functools import partial
from itertools import product
from statistics import median
from typing import Any

from iteration_profile import stage_bytes
from random_model import random_kangaroo, random_prompt, sharing_weights
from synthetic import ASSUMPTION, MAX_DRAFTS, paper_trace

from kangaroo_kernels import DecodeStats, Kangaroo
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.workloads import ModelShape

from .job import Job

CONTEXTS = (128, 2048, 8192)
NEW_TOKENS, SMOKE_TOKENS = 128, 5
STEP_DRAFTS, STEP_TOKENS = (1, 2, 6), 48
ROUNDS = 2
"""Timed decodes of a cell, after one of the same length that compiles and captures."""

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


def timed(kangaroo: Kangaroo, prompt: list[int], tokens: int, job: Job, **settings: Any) -> list[DecodeStats]:
    """The decodes of a cell that count."""
    rounds, tokens = (1, SMOKE_TOKENS) if job.smoke else (1 + ROUNDS, tokens)
    runs = [kangaroo.generate(prompt, max_new_tokens=tokens, **settings).stats for _ in range(rounds)]
    return runs[1:] or runs


def us_a_step(runs: list[DecodeStats]) -> float:
    """Microseconds, the median."""
    return median(1e6 * run.decode_seconds / run.verification_steps for run in runs)


def measure(kangaroo: Kangaroo, shape: ModelShape, context: int, way: str, job: Job) -> dict[str, Any]:
    """Speed of one way to decode; of a plain one also the bytes that a step must read."""
    plain, tokens = way in (PLAIN, PLAIN_CHAINED), paper_trace().tokens if way == SYNTHETIC else NEW_TOKENS
    with chained(way == PLAIN_CHAINED):
        runs = timed(kangaroo, random_prompt(shape, context), tokens, job, plain=plain)
    stats = runs[0]
    found = {
        "tokens_per_second": median(run.tokens_per_second for run in runs),
        "us_per_step": us_a_step(runs),
        "new_tokens": stats.new_tokens,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "drafted_per_step": stats.drafted / stats.verification_steps,
    }
    if plain:
        found["bytes_per_token"] = sum(stage_bytes(Kangaroo(kangaroo.target), context + stats.new_tokens // 2).values())
    return found


def measure_step(
    kangaroo: Kangaroo, shape: ModelShape, context: int, drafts: int, drafting: str, job: Job
) -> dict[str, Any]:
    """Microseconds of a step that makes so many drafts, whatever their confidence."""
    settings = {"num_speculative_tokens": drafts, "draft_confidence_threshold": 0.0}
    with chained(drafting == STAGEWISE_CHAINED):
        return {"us_per_step": us_a_step(timed(kangaroo, random_prompt(shape, context), STEP_TOKENS, job, **settings))}


def run(job: Job) -> None:
    """Every model, context and way, then every model's steps, until the time is over."""
    trace = paper_trace()
    job.note(
        synthetic={
            "assumption": ASSUMPTION,
            "mean_acceptance_length": trace.mean_acceptance_length,
            "drafted_per_step": float(trace.drafted.double().mean()),
            "num_speculative_tokens": MAX_DRAFTS,
        },
    )
    for ways in (WAYS, DRAFTING[:-1], DRAFTING[-1:]):
        for shape in job.models:
            measure_model(job, shape, ways)
            gc.collect()
            job.free()


def measure_model(job: Job, shape: ModelShape, ways: tuple[str, ...]) -> None:
    """The decodes of one model, or its steps by the number of drafts, in these ways."""
    made: dict[str, Kangaroo] = {}

    def decoder(way: str) -> Kangaroo:
        """All on the same weights; a graph keeps what it was captured with, so each way has its own."""
        if not made:
            made[UNFORCED] = random_kangaroo(shape, job.device, job.dtype, references=job.smoke)
        if way not in made:
            trace = paper_trace() if way == SYNTHETIC else None
            made[way] = sharing_weights(made[UNFORCED], trace=trace, persistent=way == ONE_KERNEL)
        return made[way]

    def decode(context: int, way: str) -> dict[str, Any]:
        return measure(decoder(way), shape, context, way, job)

    def step(context: int, drafts: int, drafting: str) -> dict[str, Any]:
        return measure_step(decoder(drafting), shape, context, drafts, drafting, job)

    contexts = contexts_of(job)
    if ways == WAYS:
        for context, way in product(contexts, WAYS):
            entry = {"model": shape.name, "context": context, "way": way}
            job.cell("cells", entry, partial(decode, context, way))
        return
    for drafts, drafting in product(STEP_DRAFTS, ways):
        entry = {"model": shape.name, "context": contexts[0], "drafts": drafts, "drafting": drafting}
        job.cell("steps", entry, partial(step, contexts[0], drafts, drafting))
