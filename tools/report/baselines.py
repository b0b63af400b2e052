"""What a user would pick instead, on the same card and the same random weights.

- ``transformers, eager``: ``generate`` as it comes (SDPA, dynamic cache).
- ``plain PyTorch, compiled``: a whole step compiled as gpt-fast does it (``plain_llama.py``), with no ``generate``
  around it.
- ``transformers, static, compiled``: ``cache_implementation="static"``, for which ``generate`` compiles the forward
  pass.

Tokens a second of the steps, without the prefill and the first ``SETTLED`` tokens: ``generate`` makes a new static
cache in every call, for which the compiled forward records its CUDA graphs again. A stopping criterion waits for the
device there, and the clock runs from there to the end. Every cell says how many of its tokens are those of this
library's plain decoding, up to the first other one. ``pair.py`` measures a trained target so, too.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from itertools import product
from typing import Any

import torch
import torch._dynamo.utils
import transformers
from accuracy import agreeing
from plain_llama import PlainLlama, matrix
from random_model import RESIDENT_REFERENCES, random_prompt, random_target
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteriaList

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.target.llama import Llama
from kangaroo_kernels.reference.qkv_rope import separate_rope
from kangaroo_kernels.workloads import ModelShape

from .job import Job

CONTEXTS = (128, 2048)
NEW_TOKENS = 64
SETTLED = 8
"""Tokens before the clock starts; of a text shorter than four times that, a quarter."""

EAGER, PLAIN_TORCH, COMPILED = WAYS = (
    "transformers, eager",
    "plain PyTorch, compiled",
    "transformers, static, compiled",
)
ASSISTED = "transformers, assisted by our drafter"
"""``generate`` with ``assistant_model``, of a trained pair."""


def contexts_of(job: Job) -> tuple[int, ...]:
    """Prompt lengths, the shortest first."""
    return (20,) if job.smoke else CONTEXTS


def in_transformers(target: Llama) -> Any:
    """The target as a ``LlamaForCausalLM`` on copies of its weights, since those belong to inference mode."""
    config = target.config
    stock = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(stock, dtype=target.dtype).eval()
    model.load_state_dict({name: tensor.clone() for name, tensor in named_tensors(target)}, assign=True)
    with target.device:  # what is computed and not loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(stock)
    return model


def named_tensors(target: Llama) -> Iterator[tuple[str, Tensor]]:
    """A target's weights under transformers' names."""
    weights, head_dim = target.weights, target.config.head_dim
    heads, kv_heads = target.config.num_attention_heads, target.config.num_key_value_heads
    yield from (("model.embed_tokens.weight", weights.embedding), ("model.norm.weight", weights.norm))
    yield "lm_head.weight", matrix(weights.head)
    for index, layer in enumerate(weights.layers):
        attention, mlp, name = layer.attention, layer.mlp, f"model.layers.{index}."
        assert mlp is not None
        q, k, v = matrix(attention.qkv).split([head_dim * each for each in (heads, kv_heads, kv_heads)])
        gate, up = matrix(mlp.gate_up).chunk(2)
        yield from (
            (name + "input_layernorm.weight", attention.norm),
            (name + "post_attention_layernorm.weight", mlp.norm),
        )
        for part, rows in (("q", separate_rope(q, head_dim)), ("k", separate_rope(k, head_dim)), ("v", v)):
            yield f"{name}self_attn.{part}_proj.weight", rows
        yield name + "self_attn.o_proj.weight", matrix(attention.output)
        for part, rows in (("gate", gate), ("up", up), ("down", matrix(mlp.down))):
            yield f"{name}mlp.{part}_proj.weight", rows


def settings_of(way: str, job: Job) -> dict[str, Any]:
    """What makes transformers' ``generate`` take that way; a smoke run has the static cache alone."""
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


def timed_plain(model: PlainLlama, prompt: list[int], tokens: int, job: Job) -> tuple[list[int], float | None]:
    """As ``timed``, in plain PyTorch."""
    settled = max(1, min(SETTLED, tokens // 4))
    text, seconds = model.generate(prompt, tokens, settled, job.synchronize)
    return text, (tokens - settled) / seconds if tokens > settled else None


class Subject:
    """A random model in the form that each way takes, made when it is first asked for.

    Args:
        shape: of the model.
        job: which says where it lives.
        tokens: that each way writes.
    """

    def __init__(self, shape: ModelShape, job: Job, tokens: int) -> None:
        self.shape, self.job, self.tokens = shape, job, tokens
        self.ours = cache(self._ours)

    @cached_property
    def target(self) -> Llama:
        """The weights."""
        backend = RESIDENT_REFERENCES if self.job.smoke else None
        return random_target(self.shape, self.job.device, self.job.dtype, backend=backend)

    @cached_property
    def stock(self) -> Any:
        """In transformers."""
        return in_transformers(self.target)

    def _ours(self, context: int) -> list[int]:
        """What this library's plain decoding writes."""
        prompt = random_prompt(self.shape, context)
        return Kangaroo(self.target).generate(prompt, max_new_tokens=self.tokens, plain=True).tokens

    def measure(self, context: int, way: str) -> dict[str, Any]:
        """A way's speed and its verdict; the first of two decodes warms up."""
        prompt, wanted = random_prompt(self.shape, context), self.ours(context)
        if way == PLAIN_TORCH:
            plain = PlainLlama(self.target, context + self.tokens, compiled=not self.job.smoke)
            decode: Callable[[], tuple[list[int], float | None]]
            decode = partial(timed_plain, plain, prompt, self.tokens, self.job)
        else:
            decode = partial(timed, self.stock, prompt, self.tokens, way, self.job)
        decode()
        text, speed = decode()
        return {"tokens_per_second": speed, "new_tokens": self.tokens, "agreeing_tokens": agreeing(wanted, text)}


def run(job: Job) -> None:
    """Eager for every model, then the compiled ways, whose compilations take long, the shortest context first."""
    contexts, tokens = contexts_of(job), 6 if job.smoke else NEW_TOKENS
    for ways, some in ((WAYS[:1], contexts), (WAYS[1:], contexts[:1]), (WAYS[1:], contexts[1:])):
        for shape in job.models:
            subject = Subject(shape, job, tokens)
            for way, context in product(ways, some):
                entry = {"model": shape.name, "context": context, "way": way}
                job.cell("cells", entry, partial(subject.measure, context, way))
                torch.compiler.reset()
            del subject
            gc.collect()
            job.free()
