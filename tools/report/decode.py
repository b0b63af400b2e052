"""Decode speeds at real models' shapes with random weights: plain, Kangaroo, and steps of a fixed number of drafts.

With random weights no draft is sure and next to none is accepted: Kangaroo's own decode is at its worst, a draft a step
for nothing. So steps that make some number of drafts, whatever their confidence, are timed besides. The page sets them
against a plain step: that is how many tokens such a step must yield to pay. Tokens a second are of the steps, prefill
left out. Every cell says how many of its tokens are plain decoding's. Steps in one kernel come behind all others: what
that kernel does wrong may end the process. A smoke run takes the same loop over the references.
"""

import gc
from functools import cache, partial
from itertools import product
from statistics import median
from typing import Any

from accuracy import agreeing
from iteration_profile import stage_bytes
from random_model import random_kangaroo, random_prompt, sharing_weights

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.workloads import ModelShape

from .job import Job

CONTEXTS = (128, 2048, 8192)
NEW_TOKENS, SMOKE_TOKENS = 128, 5
STEP_DRAFTS, STEP_TOKENS = (1, 2, 6), 48
ROUNDS = 2
"""Timed decodes of a cell, after one of the same length that compiles and captures."""

PLAIN, PLAIN_CHAINED, KANGAROO = WAYS = ("plain", "plain, chained", "Kangaroo")
"""Chained launches are sm_90's (``launch_config.chained``)."""

STAGEWISE, STAGEWISE_CHAINED, ONE_KERNEL = DRAFTING = ("kernel by kernel", "kernel by kernel, chained", "in one kernel")


def contexts_of(job: Job) -> tuple[int, ...]:
    """Prompt lengths, the shortest first."""
    return (20,) if job.smoke else CONTEXTS[: 1 if job.brief else None]


def run(job: Job) -> None:
    """Every model, context and way, then every model's steps, until the time is over."""
    for ways in (WAYS, DRAFTING[:-1], DRAFTING[-1:]):
        for shape in job.models:
            measure_model(job, shape, ways)
            gc.collect()
            job.free()


def measure_model(job: Job, shape: ModelShape, ways: tuple[str, ...]) -> None:
    """The decodes of one model, or its steps by the number of drafts, in these ways."""
    made: dict[str, Kangaroo] = {}

    @cache
    def wanted(context: int, tokens: int) -> list[int]:
        """What plain decoding writes, launch by launch."""
        plain = sharing_weights(made[KANGAROO], graphs=False)
        return plain.generate(random_prompt(shape, context), max_new_tokens=tokens, plain=True).tokens

    def measure(context: int, way: str, tokens: int, **settings: Any) -> dict[str, Any]:
        """All on the same weights; a graph keeps what it was captured with, so each way has its own."""
        tokens = SMOKE_TOKENS if job.smoke else tokens
        if not made:
            made[KANGAROO] = random_kangaroo(shape, job.device, job.dtype, references=job.smoke)
        if way not in made:
            made[way] = sharing_weights(made[KANGAROO], persistent=way == ONE_KERNEL)
        with chained(way in (PLAIN_CHAINED, STAGEWISE_CHAINED)):
            found, text = timed(made[way], random_prompt(shape, context), tokens, job, settings)
        return found | {"agreeing_tokens": agreeing(wanted(context, tokens), text)}

    contexts = contexts_of(job)
    if ways == WAYS:
        for context, way in product(contexts, WAYS):
            entry = {"model": shape.name, "context": context, "way": way}
            job.cell("cells", entry, partial(measure, context, way, NEW_TOKENS, plain=way != KANGAROO))
        return
    for drafts, drafting in product(STEP_DRAFTS, ways):
        entry = {"model": shape.name, "context": contexts[0], "drafts": drafts, "drafting": drafting}
        forced = {"num_speculative_tokens": drafts, "draft_confidence_threshold": 0.0}
        job.cell("steps", entry, partial(measure, contexts[0], drafting, STEP_TOKENS, **forced))


def timed(
    kangaroo: Kangaroo, prompt: list[int], tokens: int, job: Job, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[int]]:
    """Medians over the decodes that count, of a plain one also the bytes that a step must read; and the tokens."""
    rounds = 1 if job.smoke else 1 + ROUNDS
    texts = [kangaroo.generate(prompt, max_new_tokens=tokens, **settings) for _ in range(rounds)]
    runs = [text.stats for text in texts[1:] or texts]
    found = {
        "tokens_per_second": median(run.tokens_per_second for run in runs),
        "us_per_step": median(1e6 * run.decode_seconds / run.verification_steps for run in runs),
        "new_tokens": runs[0].new_tokens,
        "mean_acceptance_length": runs[0].mean_acceptance_length,
        "drafted_per_step": runs[0].drafted / runs[0].verification_steps,
    }
    if settings.get("plain"):
        length = len(prompt) + runs[0].new_tokens // 2
        found["bytes_per_token"] = sum(stage_bytes(Kangaroo(kangaroo.target), length).values())
    return found, texts[-1].tokens
