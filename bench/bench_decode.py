"""Decoding side by side: the demo pair's held-out prompts, and SmolLM2-135M-Instruct where it is installed.

The decoders take turns prompt by prompt, so a slow minute of the machine hits all of them. Ours and transformers'
``generate`` must give the same tokens before any is timed. The summary at the end has the medians over prompts.

SmolLM2 runs on one thread, its weights rounded to fp16 as llama.cpp's F16 file has them; ``plain, float32`` keeps them
as they are. llama.cpp joins in where it is installed (``llama_cpp.py``); its own arithmetic may choose other tokens.
"""

import time
import warnings
from statistics import median

import llama_cpp
import pytest
import torch

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.chat import chat_tokens
from kangaroo_kernels.model.demo import QUESTIONS as DEMO_QUESTIONS
from kangaroo_kernels.model.demo import bundled_pair
from kangaroo_kernels.model.loop.threads import threads
from kangaroo_kernels.model.named import find_smollm2

PAIR = bundled_pair()
PROMPTS = PAIR.prompts()
NEW_TOKENS = 128
QUESTIONS = {
    "lighthouse": "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "bread": "Explain step by step how to bake bread.",
    "sea": "Why is the sea salty?",
    "correct": DEMO_QUESTIONS["correct"],
}


@pytest.fixture(scope="session")
def kangaroo():
    return Kangaroo.from_pretrained(PAIR.target, PAIR.adapter, device="cpu")


@pytest.fixture(scope="session")
def transformers_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(PAIR.target, dtype=torch.float32).eval()


def transformers_generate(model, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = torch.tensor([tokens])
        out = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    return out[0, len(tokens) :].tolist()


@pytest.fixture(scope="session")
def decoders(kangaroo, transformers_model):
    return {
        "plain": lambda tokens: kangaroo.generate(tokens, max_new_tokens=NEW_TOKENS, plain=True),
        "kangaroo": lambda tokens: kangaroo.generate(tokens, max_new_tokens=NEW_TOKENS),
        "transformers": lambda tokens: transformers_generate(transformers_model, tokens),
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


@pytest.fixture(scope="session")
def smol(tmp_path_factory):
    """SmolLM2's prompts, and its decoders by name: from a prompt's tokens to the new ones."""
    from transformers import AutoModelForCausalLM

    try:
        file = find_smollm2()
    except KangarooError as missing:
        pytest.skip(str(missing))
    ours, exact = (Kangaroo.from_pretrained("smollm2", device="cpu", dtype=dtype) for dtype in ("float16", "float32"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()

    def plain(kangaroo):
        return lambda tokens: kangaroo.generate(tokens, max_new_tokens=NEW_TOKENS, plain=True).tokens

    found = {"plain": plain(ours), "plain, float32": plain(exact)}
    found["transformers"] = lambda tokens: transformers_generate(model, tokens)
    found["kangaroo"] = lambda tokens: ours.generate(tokens, max_new_tokens=NEW_TOKENS).tokens
    if llama_cpp.compiled_module() is not None:
        path = llama_cpp.write_f16_file(file, tmp_path_factory.mktemp("llama_cpp") / "f16.gguf")
        llama = llama_cpp.LlamaCpp(path, context=512)
        found["llama.cpp"] = lambda tokens: llama.generate(tokens, NEW_TOKENS)
    messages = {name: [{"role": "user", "content": text}] for name, text in QUESTIONS.items()}
    return {name: chat_tokens(each, ours.tokenizer) for name, each in messages.items()}, found


@pytest.mark.parametrize("decoder", ["plain", "plain, float32", "kangaroo", "transformers", "llama.cpp"])
@pytest.mark.parametrize("name", QUESTIONS)
def bench_smollm2(benchmark, smol, decoder, name):
    prompts, found = smol
    if decoder not in found:
        pytest.skip(f"{decoder} is not here")
    with threads(1):
        wanted, got = found["plain"](prompts[name]), found[decoder](prompts[name])
        assert got == wanted or decoder in ("plain, float32", "llama.cpp"), f"{decoder} differs from plain decoding"
        benchmark.group = f"SmolLM2 {name}"
        cpu = time.process_time()
        benchmark.pedantic(lambda: found[decoder](prompts[name]), rounds=3)
        cpu = time.process_time() - cpu
    benchmark.extra_info["smollm2"] = decoder
    benchmark.extra_info["new_tokens"] = len(got)
    benchmark.extra_info["same_tokens"] = sum(a == b for a, b in zip(got, wanted, strict=False))
    benchmark.extra_info["tokens_per_second"] = len(got) / benchmark.stats.stats.median
    benchmark.extra_info["cpu_ms_per_token"] = 1e3 * cpu / 3 / len(got)
