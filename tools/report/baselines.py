"""What a user would pick instead, on the same card: transformers' ``generate``, two ways, with random weights.

- ``eager``: as it comes (SDPA, dynamic cache).
- ``static, compiled``: ``cache_implementation="static"``, for which ``generate`` compiles the forward pass.

Tokens a second of the steps, without the prefill and the first ``SETTLED`` tokens: ``generate`` makes a new static
cache in every call, for which the compiled forward records its CUDA graphs again. A stopping criterion waits for the
device there, and the clock runs from there to the end. ``pair.py`` measures a trained target so, too.
"""

import gc
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch._dynamo.utils
import transformers
from random_model import random_prompt
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteriaList

from kangaroo_kernels.workloads import ModelShape

from .job import Job

CONTEXTS = (128, 2048)
NEW_TOKENS = 64
SETTLED = 8
"""Tokens before the clock starts; of a text shorter than four times that, a quarter."""

EAGER, COMPILED = WAYS = ("transformers, eager", "transformers, static, compiled")
ASSISTED = "transformers, assisted by our drafter"
"""``generate`` with ``assistant_model``, of a trained pair."""


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


def settings_of(way: str, job: Job) -> dict[str, Any]:
    """What makes ``generate`` take that way; a smoke run has the static cache alone."""
    return {"cache_implementation": "static", "disable_compile": job.smoke} if way == COMPILED else {}


def timed(
    model: Any, prompt: list[int], tokens: int, way: str, job: Job, **settings: Any
) -> tuple[list[int], float | None]:
    """Generate greedily: up to so many new tokens, and tokens a second; None for a text that ended before the clock.

    ``settings`` go to ``generate``.

    Raises:
        RuntimeError: ``generate`` compiled nothing where it should; it says nothing where something does not suit it.
    """
    how, settled = settings_of(way, job) | settings, len(prompt) + max(1, min(SETTLED, tokens // 4))
    row = torch.tensor([prompt], device=job.device)
    marks: list[tuple[float, int]] = []

    def note(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        if not marks and tokens.shape[1] >= settled:
            job.synchronize()
            marks.append((time.perf_counter(), tokens.shape[1]))
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

    how |= {"attention_mask": torch.ones_like(row), "max_new_tokens": tokens, "do_sample": False}
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(row, stopping_criteria=StoppingCriteriaList([note]), **how)
    job.synchronize()
    ended, text = time.perf_counter(), out[0].tolist()
    if way == COMPILED and not job.smoke and not torch._dynamo.utils.counters["frames"]["ok"]:
        raise RuntimeError("generate compiled nothing, so this is not the compiled way.")
    new = len(text) - marks[0][1] if marks else 0
    return text[len(prompt) :], new / (ended - marks[0][0]) if new else None


def run(job: Job) -> None:
    """Eager for every model, then the compiled way, whose compilations take long, the shortest context first."""
    contexts, tokens = contexts_of(job), 6 if job.smoke else NEW_TOKENS
    for way, some in ((EAGER, contexts), (COMPILED, contexts[:1]), (COMPILED, contexts[1:])):
        for shape in job.models:
            model = lru_cache(partial(transformers_model, shape, job))

            def measure(context: int, shape: ModelShape, way: str, model: Callable[[], Any]) -> dict[str, Any]:
                for _ in range(2):  # the first warms up
                    _, speed = timed(model(), random_prompt(shape, context), tokens, way, job)
                return {"tokens_per_second": speed, "new_tokens": tokens}

            for context in some:
                entry = {"model": shape.name, "context": context, "way": way}
                job.cell("cells", entry, partial(measure, context, shape, way, model))
            model.cache_clear()
            torch.compiler.reset()
            gc.collect()
            job.free()
