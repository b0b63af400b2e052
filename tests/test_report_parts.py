"""The report's parts beside transformers and pairs: what is timed, what is left out, what is added up."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import plain_llama
import pytest
import torch
from plain_llama import PlainLlama
from random_model import RESIDENT_REFERENCES, SMOKE, random_target
from report import baselines, pair, vllm

from kangaroo_kernels.model.demo import PAIR as DEMO_PAIR


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


def test_a_pair_is_set_beside_others(job, monkeypatch):
    def timed(model, prompt, tokens, way, job, assistant_model=None):
        assert (assistant_model == "ASSISTANT") == (way == baselines.ASSISTED)
        if way == baselines.COMPILED and tokens == 3:
            raise RuntimeError("no C compiler")
        return [1, 2, 9, 4][:tokens], 20.0

    monkeypatch.setattr(pair.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(pair, "assistant", lambda *_: "ASSISTANT")
    monkeypatch.setattr(pair, "PlainLlama", lambda target, length, compiled: ("PLAIN", length, compiled))
    monkeypatch.setattr(baselines, "timed", timed)
    monkeypatch.setattr(baselines, "timed_plain", lambda plain, prompt, tokens, job: ([1] * plain[1], 30.0))
    texts = [pair.Decoded("short", [5], [1, 2, 3], 90.0), pair.Decoded("long", [5] * 8, [1, 2, 3, 4], 60.0)]
    kangaroo = SimpleNamespace(target=SimpleNamespace(dtype=torch.bfloat16))
    pair.beside_others(job, SimpleNamespace(target="TARGET", adapter="ADAPTER"), kangaroo, texts)
    found = json.loads(job.piece.read_text())
    assert [cell["prompt"] for cell in found["cells"]] == ["long"] * 4 + ["short"] * 4
    figures = {"tokens_per_second": 20.0, "kangaroo_speedup": 3.0, "new_tokens": 4, "agreeing_tokens": 2}
    assert found["cells"][2] == {"prompt": "long", "way": baselines.COMPILED, **figures}
    assert "error" in found["cells"][6]
    plain = {"tokens_per_second": 30.0, "kangaroo_speedup": 3.0, "new_tokens": 3, "agreeing_tokens": 1}
    assert found["cells"][5] == {"prompt": "short", "way": baselines.PLAIN_TORCH, **plain}


def test_what_captured_no_graph_is_no_compiled_way(monkeypatch):
    """The compiler goes on without, and says nothing."""
    target = random_target(SMOKE, torch.device("cpu"), torch.float32, backend=RESIDENT_REFERENCES)
    plain, counted = PlainLlama(target, 8, compiled=False), Counter()
    monkeypatch.setattr(plain_llama.torch._dynamo.utils, "counters", {"inductor": counted})

    def step(*arguments):
        counted["cudagraph_skips"] += 1
        return plain(*arguments)

    assert len(plain.generate([1, 2], 4, 1, lambda: None)[0]) == 4
    plain.step = step
    with pytest.raises(RuntimeError, match="captured no CUDA graph"):
        plain.generate([1, 2], 4, 1, lambda: None)


# ---- vLLM


def in_the_place_of_vllm(python, engine, prompts, tokens, *, sampling, warmups):
    """transformers reads the folder that was written for vLLM."""
    assert (python, tokens, warmups) == ("python", [8, 16], 1) and sampling["ignore_eos"]
    model = pair.AutoModelForCausalLM.from_pretrained(engine["model"])
    rows = [torch.tensor([prompt]) for prompt in prompts]
    texts = [
        model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=tokens[-1], do_sample=False)[
            0, len(row[0]) :
        ]
        for row in rows
    ]
    return {"version": "1", "tokens": [text.tolist() for text in texts], "seconds": [[3.0, 5.0]] * len(prompts)}


def test_vllm_decodes_the_same_weights(job, monkeypatch):
    monkeypatch.setattr(vllm, "decode_in_vllm", in_the_place_of_vllm)
    monkeypatch.setattr(vllm, "contexts_of", lambda job: (5, 20))
    job.vllm = "python"
    vllm.run(job)
    figures = {"tokens_per_second": 4.0, "new_tokens": 16, "agreeing_tokens": 16}
    where = [{"model": "tiny", "context": context, "way": "vLLM"} for context in (5, 20)]
    assert job.values["cells"] == [each | figures for each in where]


def test_a_vllm_that_fails_is_not_tried_again(job, monkeypatch):
    def fail(*arguments, **named):
        failed.append(1)
        raise RuntimeError("vLLM ended with status 1")

    failed = []
    monkeypatch.setattr(vllm, "decode_in_vllm", fail)
    monkeypatch.setattr(vllm, "contexts_of", lambda job: (5, 20))
    job.vllm = "python"
    vllm.run(job)
    assert failed == [1]
    assert ["error" in cell for cell in job.values["cells"]] == [True, True]


STAND_IN = """
from types import SimpleNamespace as Some
__version__ = "7"
class LLM:
    def __init__(self, max_num_seqs, model): assert (max_num_seqs, model) == (1, "folder"), model
    def generate(self, prompt, sampling, use_tqdm):
        return [Some(outputs=[Some(token_ids=prompt["prompt_token_ids"] * sampling.max_tokens)])]
def SamplingParams(temperature, max_tokens, ignore_eos): return Some(max_tokens=max_tokens)
"""


def test_vllm_runs_in_an_environment_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    arguments = ([[4], [5, 6]], [1, 2])
    found = vllm.decode_in_vllm(python, {"model": "folder"}, *arguments, sampling={"ignore_eos": True}, warmups=1)
    assert (found["version"], found["tokens"]) == ("7", [[4, 4], [5, 6, 5, 6]])
    assert [len(each) for each in found["seconds"]] == [2, 2]
    with pytest.raises(RuntimeError, match="vLLM ended with status 1"):
        vllm.decode_in_vllm(python, {"model": "another"}, *arguments)


def test_transformers_has_its_share_of_the_time(job):
    job.pair, job.deadline = DEMO_PAIR, job.deadline - 0.62 * job.seconds
    pair.run(job)
    assert job.values["not_run"] == 2
    assert "total" not in job.values
