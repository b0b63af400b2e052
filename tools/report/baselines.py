"""What a user would pick instead, on the same card: transformers' ``generate``, three ways, with random weights.

- ``eager``: as it comes (SDPA, dynamic cache).
- ``static, compiled``: ``cache_implementation="static"``, for which ``generate`` compiles the forward pass.
- ``assisted``: transformers' speculative decoding, with an assistant of Llama-68M's shape and random weights, at its
  default settings. Nearly nothing is accepted, so this is its worst case, as ``kangaroo`` without forcing is ours.

Tokens a second of the steps: a stopping criterion waits for the device once, behind the prefill's token, and the clock
runs from there to the end.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteriaList

from kangaroo_kernels.workloads import ModelShape

from .decode import random_prompt
from .job import Job

CONTEXTS = (128, 2048)
NEW_TOKENS, ROUNDS = 64, 2
ASSISTANT = ModelShape("Llama-68M", 768, 3072, 12, 12, 64, 0, 2)
WAYS = ("eager", "assisted", "static, compiled")


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


def timed(model: Any, prompt: Tensor, tokens: int, job: Job, **how: Any) -> float:
    """Tokens a second behind the first ones."""
    marks: list[tuple[float, int]] = []

    def note(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        if not marks:
            job.synchronize()
            marks.append((time.perf_counter(), tokens.shape[1]))
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([note]),
        **how,
    )
    job.synchronize()
    began, before = marks[0]
    speed: float = (out.shape[1] - before) / (time.perf_counter() - began)
    return speed


def measure(model: Any, prompt: list[int], job: Job, **how: Any) -> dict[str, Any]:
    """One way to generate: a warm-up of the same length, then the median of a few."""
    tokens = 6 if job.smoke else NEW_TOKENS
    row = torch.tensor([prompt], device=job.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timed(model, row, tokens, job, **how)
        speeds = [timed(model, row, tokens, job, **how) for _ in range(1 if job.smoke else ROUNDS)]
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "new_tokens": tokens,
        "rounds": len(speeds),
    }


def run(job: Job) -> None:
    """What needs no compiling first, for every model; then the compiled way, as far as the time reaches."""
    transformers.logging.set_verbosity_error()
    contexts = (20,) if job.smoke else CONTEXTS
    job.note(
        note="random weights; tokens a second of the steps, prefill left out",
        ways=list(WAYS),
        assistant=f"{ASSISTANT.name}'s shape with the target's vocabulary and random weights, default settings",
        compiled=not job.smoke,
    )
    compiled: dict[str, Any] = {"cache_implementation": "static", "disable_compile": job.smoke}
    for shape in job.models:
        models = Models(shape, job)
        for context in contexts:
            prompt = random_prompt(shape, context)
            entry = {"model": shape.name, "context": context}
            job.cell("cells", entry | {"way": WAYS[0]}, models.measure(prompt))
            job.cell("cells", entry | {"way": WAYS[1]}, models.measure(prompt, assisted=True))
        models.free()
    for context in contexts:
        for shape in job.models:
            models, prompt = Models(shape, job), random_prompt(shape, context)
            entry = {"model": shape.name, "context": context, "way": WAYS[2]}
            job.cell("cells", entry, models.measure(prompt, **compiled))
            models.free()


class Models:
    """A model and its assistant, made when they are first needed."""

    def __init__(self, shape: ModelShape, job: Job) -> None:
        self.shape, self.job = shape, job
        self.target: Any = None
        self.assistant: Any = None

    def measure(self, prompt: list[int], assisted: bool = False, **how: Any) -> Callable[[], dict[str, Any]]:
        """The measurement, still to be called."""

        def work() -> dict[str, Any]:
            if self.target is None:
                self.target = transformers_model(self.shape, self.job)
            if assisted and self.assistant is None:
                self.assistant = transformers_model(ASSISTANT._replace(vocab_size=self.shape.vocab_size), self.job)
            helper = {"assistant_model": self.assistant} if assisted else {}
            return measure(self.target, prompt, self.job, **helper, **how)

        return work

    def free(self) -> None:
        """Let go of both."""
        self.target = self.assistant = None
        torch.compiler.reset()
        gc.collect()
        self.job.free()
