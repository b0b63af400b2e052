"""A trained pair on held-out prompts: real acceptance, real speed, whether the tokens are plain decoding's.

Then the same prompts with the pair's target in what a user would pick instead, as ``baselines.py`` runs random models,
and in transformers with our drafter as its assistant. In a low precision a text may differ from ours by rounding; how
many tokens agree is noted.
"""

from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

from accuracy import agreeing
from plain_llama import PlainLlama
from transformers import AutoModelForCausalLM

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.demo import DemoPair
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.evaluation.compare import Comparison, compare, summarise
from kangaroo_kernels.model.integrations.assistant import assistant

from . import baselines
from .job import Job

NEW_TOKENS, ROUNDS, PROMPTS = 256, 3, 12
OWN_SHARE = 0.6
"""Of the time, for plain decoding and Kangaroo at most; the others have the rest."""


class Decoded(NamedTuple):
    """A prompt that plain decoding and Kangaroo went through."""

    name: str
    prompt: list[int]
    new: list[int]  # tokens of plain decoding
    speed: float  # Kangaroo's tokens a second


def run(job: Job) -> None:
    """Every prompt, plain and Kangaroo in turns, then all of them together; then the others."""
    assert job.pair is not None
    pair = DemoPair(job.pair)
    kangaroo = Kangaroo.from_pretrained(pair.target, pair.adapter, device=job.device)
    assert isinstance(kangaroo.drafter, KangarooDrafter)
    config, adapter = kangaroo.target.config, kangaroo.drafter.adapter.config
    limits = {  # named, since a CPU would otherwise find its own
        "num_speculative_tokens": adapter.num_speculative_tokens,
        "draft_confidence_threshold": adapter.draft_confidence_threshold,
    }
    job.note(
        name=job.pair.name,
        dtype=str(kangaroo.target.dtype).removeprefix("torch."),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        exit_layer=adapter.exit_layer,
        not_run=0,
        **limits,
    )
    prompts = list(pair.prompts().items())[: 2 if job.smoke else PROMPTS]
    comparisons, decoded = list[Comparison](), list[Decoded]()
    new_tokens, rounds = (24, 1) if job.smoke else (NEW_TOKENS, ROUNDS)
    for name, text in prompts:
        if job.left <= (1 - OWN_SHARE) * job.seconds:
            job.note(not_run=len(prompts) - len(comparisons))
            break
        job.note(doing=name)
        plain = kangaroo.generate(text, max_new_tokens=new_tokens, plain=True)
        comparison = compare(kangaroo, text, name=name, max_new_tokens=new_tokens, rounds=rounds, **limits)
        comparisons.append(comparison)
        prompt = kangaroo.tokenizer(text)["input_ids"]
        decoded.append(Decoded(name, prompt, plain.tokens, comparison.kangaroo_tokens_per_second))
        job.note(prompts=[each.as_dict() for each in comparisons], total=summarise(comparisons).as_dict())
    beside_others(job, pair, kangaroo, decoded)


def beside_others(job: Job, pair: DemoPair, kangaroo: Kangaroo, decoded: list[Decoded]) -> None:
    """Every prompt in every way, a cell each, with how many tokens agree before the first that differs.

    The longest text comes first: ``generate`` keeps the length of its static cache from then on, and compiles once. So
    does plain PyTorch's cache, which has room for the longest.
    """
    longest_first = sorted(decoded, key=lambda each: -len(each.prompt) - len(each.new))

    @lru_cache
    def model() -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(pair.target, dtype=kangaroo.target.dtype)
        return loaded.to(job.device).eval()

    @lru_cache
    def drafter() -> Any:
        return assistant(model(), pair.adapter)

    @lru_cache
    def plain() -> PlainLlama:
        longest = longest_first[0]
        return PlainLlama(kangaroo.target, len(longest.prompt) + len(longest.new), compiled=not job.smoke)

    def decode(text: Decoded, way: str) -> tuple[list[int], float | None]:
        if way == baselines.PLAIN_TORCH:
            return baselines.timed_plain(plain(), text.prompt, len(text.new), job)
        settings = {"assistant_model": drafter()} if way == baselines.ASSISTED else {}
        return baselines.timed(model(), text.prompt, len(text.new), way, job, **settings)

    def cell(text: Decoded, way: str) -> dict[str, Any]:
        for _ in range(2):  # the first warms up
            tokens, speed = decode(text, way)
        return {
            "tokens_per_second": speed,
            "kangaroo_speedup": text.speed / speed if speed else None,
            "new_tokens": len(text.new),
            "agreeing_tokens": agreeing(text.new, tokens),
        }

    for text, way in product(longest_first, (*baselines.WAYS, baselines.ASSISTED)):
        job.cell("cells", {"prompt": text.name, "way": way}, partial(cell, text, way))
