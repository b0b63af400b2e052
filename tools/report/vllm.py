"""vLLM on the same card, on the weights of the other ways, written to a folder for it.

It decodes as it comes: compiled, under CUDA graphs, its own attention. Tokens a second are those of the steps: what a
text takes, less what its first ``SETTLED`` tokens take with the prefill. A model's contexts share one engine.
"""

import gc
import tempfile
from functools import partial
from typing import Any

from accuracy import agreeing
from random_model import random_prompt
from vllm_process import decode_in_vllm

from kangaroo_kernels.workloads import TINY, ModelShape

from .baselines import NEW_TOKENS, SETTLED, Subject, contexts_of
from .job import Job

WAY = "vLLM"
SMOKE_SHAPE = TINY._replace(layers=2)
"""Its CPU attention takes no smaller heads."""


def run(job: Job) -> None:
    """Every model at every context."""
    tokens, contexts = 2 * SETTLED if job.smoke else NEW_TOKENS, contexts_of(job)
    for shape in (SMOKE_SHAPE,) if job.smoke else job.models:
        found: dict[int, dict[str, Any]] = {}

        def cell(context: int, shape: ModelShape = shape, found: dict[int, dict[str, Any]] = found) -> dict[str, Any]:
            if context == contexts[0]:
                found.update(measure(shape, job, tokens))
            if context not in found:
                raise RuntimeError("vLLM failed at the first context of this model.")
            return found[context]

        for context in contexts:
            job.cell("cells", {"model": shape.name, "context": context, "way": WAY}, partial(cell, context))


def measure(shape: ModelShape, job: Job, tokens: int) -> dict[int, dict[str, Any]]:
    """A model's cells by their context."""
    assert job.vllm is not None
    contexts, subject = contexts_of(job), Subject(shape, job, tokens)
    wanted = [subject.ours(context) for context in contexts]
    prompts = [random_prompt(shape, context) for context in contexts]
    with tempfile.TemporaryDirectory() as name:
        subject.stock.save_pretrained(name)
        del subject
        gc.collect()
        job.free()  # vLLM takes most of the card
        engine = {"model": name, "dtype": str(job.dtype).removeprefix("torch."), "skip_tokenizer_init": True}
        engine |= {"max_model_len": max(contexts) + tokens, "enable_prefix_caching": False, "seed": 0}
        if job.smoke:
            engine |= {"enforce_eager": True, "gpu_memory_utilization": 0.1}
        sampling = {"ignore_eos": True, "detokenize": False}
        found = decode_in_vllm(job.vllm, engine, prompts, [SETTLED, tokens], sampling=sampling, warmups=1)
    job.note(version=found["version"])
    rows = zip(contexts, wanted, found["tokens"], found["seconds"], strict=True)
    return {
        context: {
            "tokens_per_second": (tokens - SETTLED) / (whole - settled),
            "new_tokens": tokens,
            "agreeing_tokens": agreeing(ours, theirs),
        }
        for context, ours, theirs, (settled, whole) in rows
    }
