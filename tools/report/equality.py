"""Bit-equality at real shapes: operations, the deep layers with the head, and whole decodes, by ``torch.equal``.

In Triton's interpreter on a CPU rows are not bit-equal (``docs/kernels.md``); a smoke run only shows the comparisons.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_measure import first_rows, launcher, same_bits, written
from random_model import exit_layer_of, random_drafter, random_target

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.workloads import ModelShape, Settings, workloads

from .decode import random_prompt
from .job import Job

ROWS = 16
QUIET = 0.1
"""What the layers behind the exit add: so little that about half of the drafts are right."""

CONTEXT, NEW_TOKENS = 300, 96
SETTINGS = ((6, 0.6), (6, 0.0), (15, 0.0), (1, 1.0))
"""Most drafts a step and confidence threshold."""


@torch.inference_mode()
def operations_are_equal(job: Job, shape: ModelShape) -> dict[str, Any]:
    """Every operation on 16 rows against the same on their first M, alone."""
    counts = (2,) if job.smoke else range(1, ROWS)
    differing = []
    for workload in workloads(shape):
        arguments = workload.make(Settings(ROWS, 32 if job.smoke else 1000, job.dtype, job.device))
        kernel = launcher(workload.op)
        together = written(workload.op, kernel, arguments)
        for count in counts:
            alone = written(workload.op, kernel, first_rows(workload.op, arguments, count))
            # an appended cache has its rows in the second dimension
            some = [
                whole[:, :count] if whole.ndim == 3 and workload.op == "qkv_rope" and index else whole[:count]
                for index, whole in enumerate(together)
            ]
            if not same_bits(alone, some):
                differing.append(f"{workload.op} ({workload.role}), {count} rows")
    return {"equal": not differing, "compared": len(workloads(shape)) * len(counts), "differing": differing}


@torch.inference_mode()
def rows_are_equal(job: Job, kangaroo: Kangaroo, prompt: list[int]) -> dict[str, Any]:
    """The deep layers and the head over 16 rows at once, as in verification, and row by row, as in plain decoding."""
    target, drafter = kangaroo.target, kangaroo.drafter
    assert drafter is not None
    config, weights, position = target.config, target.weights, len(prompt)
    rows = 3 if job.smoke else ROWS
    cache = target.new_cache()
    cache.reserve(position + rows)
    target.run(target.embed(prompt), cache, 0, 0, config.num_hidden_layers)
    generator = torch.Generator(job.device).manual_seed(0)
    states = torch.empty(rows, config.hidden_size, dtype=job.dtype, device=job.device).normal_(generator=generator)

    def deep(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = target.run(states[first:last], cache, position + first, drafter.exit_layer, config.num_hidden_layers)
        best = target.operations.top1_head(hidden, weights.norm, weights.head, eps=config.rms_norm_eps)
        return hidden, best.token, best.confidence

    together = deep(0, rows)
    alone = [torch.cat(parts) for parts in zip(*(deep(row, row + 1) for row in range(rows)), strict=True)]
    names = ("hidden states", "tokens", "confidences")
    differing = [
        name for name, ours, theirs in zip(names, together, alone, strict=True) if not torch.equal(ours, theirs)
    ]
    # one row at a time, which is one shape for the library: equal states then have equal logits
    logits = [[target.logits(states[row : row + 1]) for row in range(rows)] for states in (together[0], alone[0])]
    if not torch.equal(torch.cat(logits[0]), torch.cat(logits[1])):
        differing.append("logits")
    return {"equal": not differing, "compared": rows, "differing": differing}


def decodes_are_equal(job: Job, kangaroo: Kangaroo, prompt: list[int]) -> dict[str, Any]:
    """Plain decoding and Kangaroo at several settings, greedy and sampled: the tokens."""
    tokens = 8 if job.smoke else NEW_TOKENS
    settings = SETTINGS[1:2] if job.smoke else SETTINGS
    differing, runs = [], []
    for temperature in (0.0,) if job.smoke else (0.0, 0.8):
        wanted = kangaroo.generate(prompt, max_new_tokens=tokens, temperature=temperature, plain=True).tokens
        for drafts, threshold in settings:
            got = kangaroo.generate(
                prompt,
                max_new_tokens=tokens,
                temperature=temperature,
                num_speculative_tokens=drafts,
                draft_confidence_threshold=threshold,
            )
            name = f"temperature {temperature:g}, {drafts} drafts, threshold {threshold:g}"
            runs.append({"settings": name, "mean_acceptance_length": got.stats.mean_acceptance_length})
            if not torch.equal(torch.tensor(got.tokens), torch.tensor(wanted)):
                differing.append(name)
    return {"equal": not differing, "compared": len(runs), "differing": differing, "runs": runs}


def run(job: Job) -> None:
    """Every model, the largest first; drafting in one kernel behind all others, which it may take down with it."""
    for persistent in (False, True):
        for shape in job.models:
            compare_model(job, shape, persistent)
            gc.collect()
            job.free()


def compare_model(job: Job, shape: ModelShape, persistent: bool) -> None:
    """The comparisons at one model's shape, or those of drafting in one kernel."""
    made: list[Kangaroo] = []
    prompt = random_prompt(shape, 20 if job.smoke else CONTEXT)

    def with_model(compare: Callable[[Job, Kangaroo, list[int]], dict[str, Any]]) -> dict[str, Any]:
        if not made:  # an error in making it is the cell's
            target = random_target(shape, job.device, job.dtype, quiet=QUIET)
            made.append(Kangaroo(target, random_drafter(target, exit_layer_of(shape)), persistent=persistent))
        return compare(job, made[0], prompt)

    if persistent:
        comparisons = {"decodes, drafting in one kernel": partial(with_model, decodes_are_equal)}
    else:
        comparisons = {
            "operations": partial(operations_are_equal, job, shape),
            "rows of a verification": partial(with_model, rows_are_equal),
            "decodes": partial(with_model, decodes_are_equal),
        }
    for what, compare in comparisons.items():
        job.cell("cells", {"model": shape.name, "what": what}, compare)
