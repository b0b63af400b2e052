"""Decode speeds at real models' shapes with random weights: plain, Kangaroo, and Kangaroo with synthetic acceptance.

With random weights no draft is sure and next to none is accepted: unforced, Kangaroo is at its worst, a draft a step
for nothing. ``synthetic.py`` says what the forced run assumes. Tokens a second are of the steps, prefill left out.
Steps with a fixed number of drafts are timed besides: drafting kernel by kernel, in chained launches, in one kernel.
They come last, and those in one kernel behind all others: what a kernel does wrong may end the process.
A smoke run takes the same loop over the references: Triton's interpreter is a thousand times slower.
"""

import gc
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from random_model import exit_layer_of, random_drafter, random_target
from synthetic import ASSUMPTION, MAX_DRAFTS, paper_trace, with_synthetic_acceptance

from kangaroo_kernels import Generation, Kangaroo
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.model.backend import REFERENCES
from kangaroo_kernels.model.target.llama import Llama
from kangaroo_kernels.workloads import ModelShape

from .energy import EnergyMeter
from .job import Job

CONTEXTS = (128, 2048, 8192)
NEW_TOKENS, LEAST_TOKENS, WARM_UP_TOKENS = 128, 32, 16
STEP_DRAFTS, STEP_TOKENS, STEP_ROUNDS = (1, 2, 6), 48, 2
SMOKE_TOKENS = 5
ROUNDS = 3
"""Timed decodes of a cell, after one of the same length that warms up and captures."""

WAYS = ("plain", "kangaroo", "kangaroo, synthetic")


def contexts_of(job: Job) -> tuple[int, ...]:
    """Prompt lengths."""
    return (20,) if job.smoke else CONTEXTS


CHAINED = "kernel by kernel, chained"
DRAFTING = {"kernel by kernel": "kangaroo", CHAINED: "chained", "in one kernel": "persistent"}
"""How steps draft, and what decodes so; chained launches are sm_90's (``launch_config.chained``)."""


def random_prompt(shape: ModelShape, length: int) -> list[int]:
    """Tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(length)
    prompt: list[int] = torch.randint(shape.vocab_size, (length,), generator=generator).tolist()
    return prompt


def bytes_a_token(target: Llama, length: int) -> int:
    """That a plain step must read at the end of a text of ``length``: every weight, and all keys and values."""
    config = target.config
    rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * rows + 2 * kv_rows + 3 * config.intermediate_size) + 2 * length * kv_rows
    elements = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    return elements * target.dtype.itemsize


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
    plain, most = way == WAYS[0], paper_trace().tokens if way == WAYS[2] else NEW_TOKENS
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
    found: dict[str, Any] = {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "new_tokens": tokens,
        "rounds": rounds,
        "joules_per_token": meter.joules_per_token,
    }
    if plain:
        found["bytes_per_token"] = bytes_a_token(kangaroo.target, len(prompt) + tokens // 2)
    else:
        stats = runs[0]
        found |= {
            "mean_acceptance_length": stats.mean_acceptance_length,
            "drafted_per_step": stats.drafted / stats.verification_steps,
            "acceptance_rate_per_position": stats.acceptance_rate_per_position,
            "us_per_step": 1e6 * statistics.median(run.decode_seconds / run.verification_steps for run in runs),
        }
    return found


def measure_step(kangaroo: Kangaroo, prompt: list[int], drafts: int, job: Job) -> dict[str, Any]:
    """Microseconds of a step that makes so many drafts, whatever their confidence."""
    tokens, rounds = (SMOKE_TOKENS, 1) if job.smoke else (STEP_TOKENS, 1 + STEP_ROUNDS)
    settings: dict[str, Any] = {"num_speculative_tokens": drafts, "draft_confidence_threshold": 0.0}
    runs = [kangaroo.generate(prompt, max_new_tokens=tokens, **settings).stats for _ in range(rounds)]
    times = [1e6 * run.decode_seconds / run.verification_steps for run in runs]
    return {"us_per_step": statistics.median(times[1:] or times)}  # the first compiles and captures


class Decoders:
    """A model's weights, made when they are first needed, and what decodes with them."""

    def __init__(self, shape: ModelShape, job: Job) -> None:
        self.shape, self.job = shape, job
        self._made: dict[str, Kangaroo] = {}

    def __call__(self, kind: str) -> Kangaroo:
        """``kangaroo``; ``chained``, to be captured so; ``persistent``, in one kernel; ``synthetic``, by the trace."""
        if not self._made:
            operations = replace(REFERENCES, kernels="triton") if self.job.smoke else None
            target = random_target(self.shape, self.job.device, self.job.dtype, operations=operations)
            drafter = random_drafter(target, exit_layer_of(self.shape))
            synthetic = with_synthetic_acceptance(target, paper_trace())
            self._made = {
                "kangaroo": Kangaroo(target, drafter),
                "chained": Kangaroo(target, drafter),  # graphs of its own
                "persistent": Kangaroo(target, drafter, persistent=True),
                "synthetic": Kangaroo(synthetic, random_drafter(synthetic, drafter.exit_layer)),
            }
        return self._made[kind]


def run(job: Job) -> None:
    """Every model, context and way, until the time is over."""
    trace = paper_trace()
    job.note(
        note="random weights; tokens a second of the steps, prefill left out",
        ways=list(WAYS),
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
    for some in (tuple(DRAFTING)[:-1], tuple(DRAFTING)[-1:]):
        for shape in job.models:
            measure_steps(job, shape, some)
            gc.collect()
            job.free()


def measure_decodes(job: Job, shape: ModelShape, models_left: int) -> None:
    """The decodes of one model."""
    decoders = Decoders(shape, job)

    def decode_cell(way: str, prompt: list[int], seconds: float) -> dict[str, Any]:
        return measure(decoders("synthetic" if way == WAYS[2] else "kangaroo"), prompt, way, seconds, job)

    todo = [(context, way) for context in contexts_of(job) for way in WAYS]
    for done, (context, way) in enumerate(todo):
        seconds = job.left / (models_left * len(todo) - done)
        entry = {"model": shape.name, "context": context, "way": way}
        job.cell("cells", entry, partial(decode_cell, way, random_prompt(shape, context), seconds))


def measure_steps(job: Job, shape: ModelShape, ways: Sequence[str]) -> None:
    """The steps of one model by the number of drafts, drafting in these ways."""
    decoders = Decoders(shape, job)

    def step_cell(drafting: str, prompt: list[int], drafts: int) -> dict[str, Any]:
        kangaroo = decoders(DRAFTING[drafting])
        with chained(drafting == CHAINED):
            return measure_step(kangaroo, prompt, drafts, job)

    context = contexts_of(job)[0]
    for drafts in STEP_DRAFTS:
        for drafting in ways:
            entry = {"model": shape.name, "context": context, "drafts": drafts, "drafting": drafting}
            job.cell("steps", entry, partial(step_cell, drafting, random_prompt(shape, context), drafts))
