"""What figures with random weights rest on: models near real ones' numbers, and drafts that follow a trace."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from random_model import RESIDENT_REFERENCES, SMOKE, random_drafter, random_target
from synthetic import MAX_DRAFTS, RATE, Trace, paper_trace, with_synthetic_acceptance

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model import session as runtime
from kangaroo_kernels.model.backend import REFERENCES
from kangaroo_kernels.workloads import MODELS, TINY

CPU = torch.device("cpu")


def test_the_trace_has_the_papers_mean():
    trace = paper_trace()
    assert sum(RATE**position for position in range(7)) == pytest.approx(1.93, abs=1e-4)
    assert trace.mean_acceptance_length == pytest.approx(1.93, abs=1e-3)
    assert trace.tokens == int((trace.agreed + 1).sum())
    for position in range(1, MAX_DRAFTS + 1):
        share = float((trace.agreed >= position).double().mean())
        assert share == pytest.approx(RATE**position, abs=0.5 / len(trace.agreed))
    assert torch.equal(trace.drafted, (trace.agreed + 1).clamp(max=MAX_DRAFTS))
    neighbours = torch.corrcoef(torch.stack((trace.agreed[1:], trace.agreed[:-1])).double())[0, 1]
    assert abs(float(neighbours)) < 0.2, "the steps are shuffled"


@pytest.mark.parametrize(
    ("backend", "lag"),
    [(RESIDENT_REFERENCES, 0), (RESIDENT_REFERENCES, 2), (None, 0)],
    ids=["", "host lags", "kernels"],
)
def test_a_decode_follows_the_trace(backend, lag, device, monkeypatch):
    """Also across its end, across decodes, and into the limit, which cuts the last step short.

    A host that reads late launches iterations beyond the limit; they take no step of the trace.
    """
    loop = runtime.device_steps
    monkeypatch.setattr(runtime, "device_steps", lambda *args, **named: loop(*args, **named, lag=lag))
    agreed = torch.tensor([0, 3, 1, 2, 0])
    trace = Trace((agreed + 1).clamp(max=3), agreed)
    target = random_target(SMOKE, device if backend is None else CPU, torch.float32, backend=backend)
    forced = with_synthetic_acceptance(target, trace, 3)
    kangaroo = Kangaroo(forced, random_drafter(forced, 1))

    def steps(tokens):
        progress = kangaroo.progress([5, 6, 7], max_new_tokens=tokens, num_speculative_tokens=3)
        return [(len(step.commit.tokens), step.commit.agreed, step.commit.drafted) for step in progress]

    whole = [(1, 0, 1), (4, 3, 3), (2, 1, 2), (3, 2, 3), (1, 0, 1)]
    rounds = 2 if backend is not None else 1
    assert steps(11 * rounds)[:-1] == (whole * rounds)[:-1]
    assert steps(4) == [(1, 0, 1), (3, 2, 2)], "the trace begins again, and the limit cuts"


def test_plain_decoding_is_left_alone():
    target = random_target(SMOKE, CPU, torch.float32, backend=RESIDENT_REFERENCES)
    forced = with_synthetic_acceptance(target, paper_trace())
    runs = [Kangaroo(one).generate([5, 6, 7], max_new_tokens=9, plain=True) for one in (target, forced)]
    assert runs[0].tokens == runs[1].tokens
    assert len(runs[0].tokens) == 9


def test_states_stay_near_one_through_many_layers():
    shape = TINY._replace(layers=32)
    target = random_target(shape, CPU, torch.bfloat16, backend=REFERENCES)
    cache = target.new_cache()
    cache.reserve(64)
    with torch.inference_mode():
        hidden = target.run(target.embed(list(range(64))), cache, 0, 0, shape.layers)
        logits = target.logits(hidden)
    assert hidden.dtype == torch.bfloat16
    assert 0.5 < float(hidden.float().std()) < 4
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3


@pytest.mark.gpu
def test_a_captured_decode_follows_the_trace():
    """Replayed graphs go through the trace: the same counts at every visit."""
    agreed = torch.tensor([0, 3, 1, 2, 0])
    target = random_target(MODELS[2]._replace(layers=4), torch.device("cuda"), torch.bfloat16)
    forced = with_synthetic_acceptance(target, Trace((agreed + 1).clamp(max=3), agreed), 3)
    kangaroo = Kangaroo(forced, random_drafter(forced, 1))
    for _ in range(3):  # launched, captured, replayed; 88 tokens are eight times the trace
        steps = kangaroo.progress([5, 6, 7], max_new_tokens=88, num_speculative_tokens=3)
        assert [step.commit.agreed for step in steps][:-1] == (agreed.tolist() * 8)[:-1]
