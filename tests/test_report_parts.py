"""The report's parts beside transformers and pairs: what is timed, what is left out, what is added up."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from report import baselines, pair
from report.job import Job

from kangaroo_kernels.model.demo import PAIR as DEMO_PAIR


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "piece.json", tmp_path, 60.0, smoke=True)


class Timepiece:
    """Stands in for a model and for its clock: a call takes 100 seconds, so do the first tokens, each later one 0.5."""

    def __init__(self, monkeypatch, slow_tokens, ends_after=None):
        self.now, self.slow_tokens, self.ends_after = 0.0, slow_tokens, ends_after
        monkeypatch.setattr(baselines.time, "perf_counter", lambda: self.now)

    def generate(self, prompt, attention_mask, max_new_tokens, do_sample, stopping_criteria, **settings):
        assert not do_sample
        self.now += 100
        for new in range(1, (self.ends_after or max_new_tokens) + 1):
            self.now += 100 if new <= self.slow_tokens else 0.5
            prompt = torch.cat([prompt, torch.full_like(prompt[:, :1], new)], dim=1)
            assert not stopping_criteria(prompt, None).any()
        return prompt


@pytest.mark.parametrize(
    ("tokens", "slow", "ends_after", "speed"),
    [(64, 8, None, 2.0), (12, 3, None, 2.0), (2, 1, None, 2.0), (64, 8, 3, None), (64, 8, 8, None)],
)
def test_a_baselines_clock_starts_behind_prefill_and_first_tokens(tokens, slow, ends_after, speed, job, monkeypatch):
    """A text that ends in them has no speed."""
    timed = baselines.timed(Timepiece(monkeypatch, slow, ends_after), [1, 2, 3], tokens, baselines.EAGER, job)
    assert timed == (list(range(1, (ends_after or tokens) + 1)), speed and pytest.approx(speed))


def test_a_forward_that_was_not_compiled_is_no_compiled_way(job, monkeypatch):
    """On a CPU ``generate`` compiles nothing, whatever it is asked for."""
    from torch._dynamo import utils

    monkeypatch.setattr(utils, "counters", {"frames": Counter()})
    arguments = ([1], 64, baselines.COMPILED, SimpleNamespace(smoke=False, device="cpu", synchronize=lambda: None))
    with pytest.raises(RuntimeError, match="generate compiled nothing"):
        baselines.timed(Timepiece(monkeypatch, 8), *arguments)
    monkeypatch.setattr(utils, "counters", {"frames": Counter(ok=1)})
    baselines.timed(Timepiece(monkeypatch, 8), *arguments)


def test_a_pair_is_set_beside_transformers(job, monkeypatch):
    def timed(model, prompt, tokens, way, job, assistant_model=None):
        assert (assistant_model == "ASSISTANT") == (way == baselines.ASSISTED)
        if way == baselines.COMPILED and tokens == 3:
            raise RuntimeError("no C compiler")
        return [1, 2, 9, 4][:tokens], 20.0

    monkeypatch.setattr(pair.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(pair, "assistant", lambda *_: "ASSISTANT")
    monkeypatch.setattr(baselines, "timed", timed)
    texts = [pair.Decoded("short", [5], [1, 2, 3], 90.0), pair.Decoded("long", [5] * 8, [1, 2, 3, 4], 60.0)]
    kangaroo = SimpleNamespace(target=SimpleNamespace(dtype=torch.bfloat16))
    pair.beside_transformers(job, SimpleNamespace(target="TARGET", adapter="ADAPTER"), kangaroo, texts)
    found = json.loads(job.piece.read_text())
    assert [cell["prompt"] for cell in found["cells"]] == ["long"] * 3 + ["short"] * 3
    figures = {"tokens_per_second": 20.0, "kangaroo_speedup": 3.0, "new_tokens": 4, "agreeing_tokens": 2}
    assert found["cells"][1] == {"prompt": "long", "way": baselines.COMPILED, **figures}
    assert "error" in found["cells"][4]


def test_transformers_has_its_share_of_the_time(job):
    job.pair, job.deadline = DEMO_PAIR, job.deadline - 0.62 * job.seconds
    pair.run(job)
    assert job.values["not_run"] == 2
    assert "total" not in job.values
