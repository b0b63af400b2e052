"""A draft on the CPU: the target's first layers, the adapter, and a head with all rows or with some.

The adapters' weights are random, which changes no time. Six drafts are made in a row, as a step makes them; the shallow
layers run once more, for the last of them. The record has the time of a draft, and what it is to be set against: the
verification of seven rows, and a step of plain decoding.
"""

import time
from pathlib import Path
from statistics import median

import pytest
import torch

from kangaroo_kernels import Kangaroo, KangarooError, Settings
from kangaroo_kernels.model.drafters.vocabulary import write_draft_vocabulary
from kangaroo_kernels.model.load import open_model
from kangaroo_kernels.model.loop.host import chooser_of, verify
from kangaroo_kernels.model.loop.threads import threads
from kangaroo_kernels.model.named import find_pair
from kangaroo_kernels.model.target.config import parse_config
from kangaroo_kernels.model.training.adapter_module import TrainableAdapter, adapter_config_values, save_adapter
from kangaroo_kernels.model.training.settings import TrainingSettings

DRAFTS = 6
EXIT_LAYERS = {"smollm2": 6, "demo": 4}
PROMPT = list(range(100, 132))
CASES = [
    (model, dtype, rows)
    for model, dtype, some in (("smollm2", "float32", 8192), ("smollm2", "float16", 8192), ("demo", "float32", 512))
    for rows in (None, some)
]


def load(model, dtype, rows, folder):
    """The named model with a random adapter, which drafts all tokens or the first ``rows``."""
    try:
        values = open_model(find_pair(model, None)[0]).values
    except KangarooError as missing:
        pytest.skip(str(missing))
    settings = TrainingSettings(model=model, data=(Path(),), exit_layer=EXIT_LAYERS[model], out=folder)
    values = adapter_config_values(values, settings)
    torch.manual_seed(0)
    with torch.inference_mode(False):
        save_adapter(folder, values, TrainableAdapter(parse_config(values), 1), torch.float32)
    if rows is not None:
        write_draft_vocabulary(folder, torch.arange(rows))
    return Kangaroo.from_pretrained(model, folder, device="cpu", dtype=dtype)


def milliseconds(work, rounds=10):
    """The median time of some work."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("model", "dtype", "rows"), CASES)
def bench_draft_step(benchmark, tmp_path, model, dtype, rows, temperature):
    kangaroo = load(model, dtype, rows, tmp_path)
    target, drafter, session = kangaroo.target, kangaroo.drafter, kangaroo.session()
    settings = {"max_new_tokens": 32, "temperature": temperature, "draft_confidence_threshold": 0.0}
    with threads(1):
        plain = session.generate(PROMPT, plain=True, **settings)
        assert session.generate(PROMPT, **settings).tokens == plain.tokens, "drafting changed the text"
        text = session.memory.text
        chooser = chooser_of(target, text, kangaroo.resolve(PROMPT, Settings(**settings)))

        def propose():
            drafter.commit(text, 1)  # the text goes on from where it was
            return drafter.propose(text, chooser, DRAFTS, 0.0)

        benchmark.group = f"draft, {model}, {dtype}, {'sampled' if temperature else 'greedy'}"
        draft = benchmark.pedantic(propose, rounds=30, warmup_rounds=5)
        assert len(draft.tokens) == DRAFTS
        verification = milliseconds(lambda: verify(target, drafter.first_layer, text, chooser, draft))
    benchmark.extra_info |= {
        "head_rows": rows or target.config.vocab_size,
        "draft_ms": 1e3 * benchmark.stats.stats.median / DRAFTS,
        "verification_ms": verification,
        "plain_step_ms": 1e3 * plain.stats.decode_seconds / plain.stats.new_tokens,
    }
