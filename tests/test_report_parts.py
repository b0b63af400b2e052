"""The report's parts beside transformers and decodes: what is timed, what is left out, what is added up."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from gpu_card import EnergyMeter
from random_model import SMOKE
from report import baselines, decode, pair
from report.job import Job

from kangaroo_kernels import DecodeStats
from kangaroo_kernels.model.demo import PAIR as DEMO_PAIR


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "piece.json", tmp_path, 60.0, smoke=True)


class SlowAtFirst:
    """Decodes 300 tokens a second, but for the first time, in which something is compiled."""

    def __init__(self):
        self.asked = []

    def progress(self, prompt, max_new_tokens, plain):
        self.asked.append(max_new_tokens)
        speed = 0.5 if len(self.asked) == 1 else 300.0
        stats = DecodeStats(max_new_tokens, max_new_tokens, decode_seconds=max_new_tokens / speed)
        for tokens in ([1], [1] * max_new_tokens):
            yield SimpleNamespace(generation=SimpleNamespace(tokens=tokens, stats=stats))


@pytest.mark.parametrize(
    ("way", "seconds", "tokens"),
    [(decode.UNFORCED, 4, 128), (decode.SYNTHETIC, 4, 247), (decode.UNFORCED, 0.8, 60), (decode.UNFORCED, 0.1, 32)],
)
def test_a_decode_is_as_long_as_the_time_affords(way, seconds, tokens, monkeypatch):
    """A synthetic one sees the whole trace; what the first compilation took counts for nothing."""
    monkeypatch.setattr(decode, "EnergyMeter", lambda device: EnergyMeter(None))
    kangaroo = SlowAtFirst()
    found = decode.measure(kangaroo, [1], way, seconds, SimpleNamespace(smoke=False, device=None))
    assert kangaroo.asked == [16, 16, *[tokens] * 4]
    assert found["new_tokens"] == tokens
    assert found["tokens_per_second"] == pytest.approx(300)
    assert found["us_per_step"] == pytest.approx(1e6 / 300)


def test_every_model_is_measured_eagerly_before_anything_is_compiled(job, monkeypatch):
    monkeypatch.setattr(Job, "models", (SMOKE, SMOKE._replace(name="other")))
    monkeypatch.setattr(baselines, "contexts_of", lambda job: (8, 16))
    monkeypatch.setattr(baselines, "measure", lambda *arguments: {})
    baselines.run(job)
    cells = [(cell["way"], cell["context"]) for cell in job.values["cells"]]
    eager = [(baselines.EAGER, context) for context in (8, 16)] * 2
    assert cells == [*eager, *[(baselines.COMPILED, 8)] * 2, *[(baselines.COMPILED, 16)] * 2]


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


@pytest.mark.parametrize(("tokens", "slow"), [(64, 8), (32, 8), (12, 3), (6, 1), (2, 1)])
def test_a_baselines_clock_starts_behind_prefill_and_first_tokens(tokens, slow, job, monkeypatch):
    timed = baselines.timed(Timepiece(monkeypatch, slow), [1, 2, 3], tokens, job)
    assert timed == (list(range(1, tokens + 1)), pytest.approx(2.0))


@pytest.mark.parametrize("ends_after", [3, 8])
def test_a_text_that_ends_in_them_has_no_speed(ends_after, job, monkeypatch):
    timed = baselines.timed(Timepiece(monkeypatch, 8, ends_after), [1, 2, 3], 64, job)
    assert timed == (list(range(1, ends_after + 1)), None)


def test_a_forward_that_was_not_compiled_is_no_compiled_way(job, monkeypatch):
    """On a CPU ``generate`` compiles nothing, whatever it is asked for."""
    from torch._dynamo import utils

    asked = baselines.settings_of(baselines.COMPILED, SimpleNamespace(smoke=False))
    monkeypatch.setattr(utils, "counters", {"frames": Counter()})
    baselines.require_compiled({})
    baselines.require_compiled(baselines.settings_of(baselines.COMPILED, job))
    with pytest.raises(RuntimeError, match="generate compiled nothing"):
        baselines.timed(Timepiece(monkeypatch, 8), [1], 64, job, **asked)
    monkeypatch.setattr(utils, "counters", {"frames": Counter(ok=1)})
    baselines.require_compiled(asked)


# ---- a trained pair beside transformers


@pytest.mark.parametrize(
    ("theirs", "agree"), [([1, 2, 3], 3), ([1, 9, 3], 1), ([1, 2], 2), ([2], 0)], ids=["all", "one", "short", "none"]
)
def test_tokens_agree_until_the_first_difference(theirs, agree):
    assert pair.agreeing([1, 2, 3], theirs) == agree


@pytest.fixture
def beside(job, monkeypatch):
    """``beside(timed)``: what is noted of two prompts; ``timed(tokens, compiled)`` stands for transformers."""

    def run(timed):
        monkeypatch.setattr(baselines, "trained_model", lambda folder, job, dtype: (folder, dtype))

        def called(model, prompt, tokens, job, **how):
            assert model == ("TARGET", torch.bfloat16)
            return baselines.Timed(*timed(prompt, tokens, "cache_implementation" in how))

        monkeypatch.setattr(baselines, "timed", called)
        texts = [pair.Decoded("short", [5], [1, 2, 3], 90.0), pair.Decoded("long", [5] * 8, [1, 2, 3, 4], 60.0)]
        kangaroo = SimpleNamespace(target=SimpleNamespace(dtype=torch.bfloat16))
        pair.beside_transformers(job, SimpleNamespace(target="TARGET"), kangaroo, texts)
        return json.loads(job.piece.read_text())

    return run


def test_a_pair_is_set_beside_transformers(beside):
    calls = []

    def timed(prompt, tokens, compiled):
        calls.append((len(prompt), tokens, compiled))
        speed = 10.0 + 10 * compiled if len(calls) % 2 == 0 else 1.0  # the first time, something compiles
        return [1, 2, 9, 4][:tokens], speed

    found = beside(timed)
    once = [(8, 4, False), (8, 4, True), (1, 3, False), (1, 3, True)]
    assert calls == [call for call in once for _ in range(2)], "the longest text makes the static cache long enough"
    figures = {"tokens_per_second": 20.0, "kangaroo_speedup": 3.0, "new_tokens": 4, "agreeing_tokens": 2}
    assert found["cells"][1] == {"prompt": "long", "way": baselines.COMPILED, **figures}
    figures = {"tokens_per_second": 10.0, "kangaroo_speedup": 7.5, "new_tokens": 7, "agreeing_tokens": 4}
    assert found["baselines"][0] == {"way": baselines.EAGER, "prompts": 2, **figures}


def test_a_way_of_transformers_that_fails_is_left_and_told(beside):
    def timed(prompt, tokens, compiled):
        if compiled:
            raise RuntimeError("no C compiler")
        return [], None

    found = beside(timed)
    cells = [(cell["prompt"], cell["way"], "error" in cell) for cell in found["cells"]]
    eager, compiled = baselines.WAYS
    assert cells == [("long", eager, False), ("long", compiled, True), ("short", eager, False)]
    assert [total["prompts"] for total in found["baselines"]] == [2, 0]
    assert found["baselines"][0]["tokens_per_second"] is None


def test_transformers_has_its_share_of_the_time_and_begins_nothing_without(beside, job):
    job.pair, job.deadline = DEMO_PAIR, job.deadline - 0.62 * job.seconds
    pair.run(job)
    assert job.values["not_run"] == 2
    assert "total" not in job.values
    job.deadline = 0
    found = beside(lambda *arguments: pytest.fail("called"))
    assert [cell["skipped"] for cell in found["cells"]] == ["no time left"] * 4
