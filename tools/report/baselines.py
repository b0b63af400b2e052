"""What a user would pick instead, on the same card: transformers' ``generate``, two ways, with random weights.

- ``eager``: as it comes (SDPA, dynamic cache).
- ``static, compiled``: ``cache_implementation="static"``, for which ``generate`` compiles the forward pass.

Tokens a second of the steps, without the prefill and the first ``SETTLED`` tokens: ``generate`` makes a new static
cache in every call, for which the compiled forward records its CUDA graphs again. A stopping criterion waits for the
device there, and the clock runs from there to the end. ``pair.py`` measures a trained target so, too.
"""

import gc
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo.utils
import transformers
from random_model import random_prompt
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteriaList

from kangaroo_kernels.workloads import ModelShape

from .job import Job

CONTEXTS = (128, 2048)
NEW_TOKENS, ROUNDS = 64, 2
SETTLED = 8
"""Tokens before the clock starts; of a text shorter than four times that, a quarter."""

EAGER, COMPILED = WAYS = ("transformers, eager", "transformers, static, compiled")


def contexts_of(job: Job) -> tuple[int, ...]:
    """Prompt lengths, the shortest first."""
    return (20,) if job.smoke else CONTEXTS


def transformers_model(shape: ModelShape, job: Job) -> Any:
    """A random ``LlamaForCausalLM``, made on the device."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with job.device:
        return AutoModelForCausalLM.from_config(config, dtype=job.dtype).eval()


def trained_model(folder: Path, job: Job, dtype: torch.dtype) -> Any:
    """A checkpoint as transformers loads it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(job.device).eval()


def settings_of(way: str, job: Job) -> dict[str, Any]:
    """What makes ``generate`` take that way; a smoke run has the static cache alone."""
    return {"cache_implementation": "static", "disable_compile": job.smoke} if way == COMPILED else {}


def require_compiled(how: dict[str, Any]) -> None:
    """``generate`` leaves compiling out without a word where something does not suit it.

    Raises:
        RuntimeError: nothing was compiled, though ``how`` asks for it.
    """
    asked = how.get("cache_implementation") == "static" and not how["disable_compile"]
    if asked and not torch._dynamo.utils.counters["frames"]["ok"]:
        raise RuntimeError("generate compiled nothing, so this is not the compiled way.")


class Timed(NamedTuple):
    """One call of ``generate``.

    Attributes:
        tokens: the new ones.
        tokens_per_second: None for a text that ended before there was anything to time.
    """

    tokens: list[int]
    tokens_per_second: float | None


def timed(model: Any, prompt: list[int], tokens: int, job: Job, **how: Any) -> Timed:
    """Generate greedily, up to so many tokens."""
    settled = len(prompt) + max(1, min(SETTLED, tokens // 4))
    row = torch.tensor([prompt], device=job.device)
    marks: list[tuple[float, int]] = []

    def note(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        if not marks and tokens.shape[1] >= settled:
            job.synchronize()
            marks.append((time.perf_counter(), tokens.shape[1]))
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([note]),
            **how,
        )
    job.synchronize()
    ended, text = time.perf_counter(), out[0].tolist()
    require_compiled(how)
    speed = None
    if marks and len(text) > marks[0][1]:
        speed = (len(text) - marks[0][1]) / (ended - marks[0][0])
    return Timed(text[len(prompt) :], speed)


def measure(models: dict[str, Any], shape: ModelShape, context: int, way: str, job: Job) -> dict[str, Any]:
    """One way to generate: a warm-up of the same length, then the median of a few."""
    if shape.name not in models:
        models[shape.name] = transformers_model(shape, job)
    tokens, rounds = (6, 1) if job.smoke else (NEW_TOKENS, ROUNDS)
    call = partial(timed, models[shape.name], random_prompt(shape, context), tokens, job, **settings_of(way, job))
    call()
    speeds = [speed for _, speed in (call() for _ in range(rounds)) if speed is not None]
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "new_tokens": tokens,
        "rounds": len(speeds),
    }


def run(job: Job) -> None:
    """Eager for every model, then the compiled way, whose compilations take long, the shortest context first."""
    job.note(settled=SETTLED, compiled=not job.smoke)
    contexts = contexts_of(job)
    for way, some in ((EAGER, contexts), (COMPILED, contexts[:1]), (COMPILED, contexts[1:])):
        for shape in job.models:
            models: dict[str, Any] = {}
            for context in some:
                entry = {"model": shape.name, "context": context, "way": way}
                job.cell("cells", entry, partial(measure, models, shape, context, way, job))
            models.clear()
            torch.compiler.reset()
            gc.collect()
            job.free()
