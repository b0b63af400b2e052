"""Decoding the demo pair's held-out prompts: plain, Kangaroo, and transformers' ``generate``, side by side.

The decoders take turns prompt by prompt, so a slow minute of the machine hits all of them. All three must give the
same tokens before any is timed. The summary at the end has the medians over prompts.
"""

import warnings
from statistics import median

import pytest
import torch

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.demo import bundled_pair

PAIR = bundled_pair()
PROMPTS = PAIR.prompts()
NEW_TOKENS = 128


@pytest.fixture(scope="session")
def kangaroo():
    return Kangaroo.from_pretrained(PAIR.target, PAIR.adapter, device="cpu")


@pytest.fixture(scope="session")
def transformers_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(PAIR.target, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def decoders(kangaroo, transformers_model):
    def transformers_generate(tokens):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = torch.tensor([tokens])
            out = transformers_model.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(tokens) :].tolist()

    return {
        "plain": lambda tokens: kangaroo.generate(tokens, max_new_tokens=NEW_TOKENS, plain=True),
        "kangaroo": lambda tokens: kangaroo.generate(tokens, max_new_tokens=NEW_TOKENS),
        "transformers": transformers_generate,
    }


@pytest.mark.parametrize("decoder", ["plain", "kangaroo", "transformers"])  # the decorator on top varies faster
@pytest.mark.parametrize("name", PROMPTS)
def bench_decode(benchmark, decoders, kangaroo, decoder, name):
    tokens = kangaroo.tokenizer(PROMPTS[name])["input_ids"]
    wanted = decoders["plain"](tokens).tokens
    got = decoders[decoder](tokens)
    assert (got if decoder == "transformers" else got.tokens) == wanted, f"{decoder} differs from plain decoding"
    benchmark.group = f"decode {name}"
    runs = []
    benchmark.pedantic(lambda: runs.append(decoders[decoder](tokens)), rounds=5 if decoder != "transformers" else 2)
    benchmark.extra_info["decoder"] = decoder
    benchmark.extra_info["new_tokens"] = len(wanted)
    benchmark.extra_info["tokens_per_second"] = len(wanted) / benchmark.stats.stats.median
    if decoder != "transformers":  # prefill left out, as in the demo
        benchmark.extra_info["decode_tokens_per_second"] = median(run.stats.tokens_per_second for run in runs)
    if decoder == "kangaroo":
        stats = runs[0].stats
        benchmark.extra_info["mean_acceptance_length"] = stats.mean_acceptance_length
        benchmark.extra_info["draft_acceptance_rate"] = stats.draft_acceptance_rate
