"""``draft_loop`` with many programs, side by side: the bits of the stages, whoever comes first."""

import importlib
from typing import Any

import pytest
import torch
from draft_steps import Step, begin, by_stages, make_model, poison, same, with_caches
from side_by_side import side_by_side

from kangaroo_kernels.contract import DraftModel
from kangaroo_kernels.draft_loop import DraftLoop, draft_loop
from kangaroo_kernels.draft_loop.stages import ATTEND, CHOOSE, DOWN, GATE_UP, HEAD, OUTPUT, QKV

module = importlib.import_module("kangaroo_kernels.draft_loop.kernel")
STAGES = {"qkv": QKV, "attend": ATTEND, "output": OUTPUT, "gate_up": GATE_UP, "down": DOWN}
STAGES |= {"head": HEAD, "choose": CHOOSE}
DRAFTS, BEFORE = 2, 126
"""The most drafts, and the position before the newest token: the context crosses a split of the attention."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs programs side by side by itself")


def launch(model: DraftModel, programs: int, order: int, missing: int = 0, **settings: Any) -> tuple[Step, DraftLoop]:
    """A loop of so many programs, in an order that chance draws; ``missing`` more are waited for, and never come."""
    step = begin(model, DRAFTS, BEFORE)
    model = with_caches(model, step.caches)
    loop = DraftLoop(model, DRAFTS, programs=programs, polls=100 if missing else 100_000)
    loop.programs += missing
    poison(loop)
    with side_by_side(order) as switches:
        draft_loop(model, *step[:4], prepared=loop, out=step.out, **settings)
    assert switches[0] > programs
    return step, loop


def wanted(model: DraftModel, **settings: Any) -> Step:
    """What the stage kernels give."""
    step = begin(model, DRAFTS, BEFORE)
    by_stages(model, step, **settings)
    return step


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("programs", [2, 5])
def test_many_programs_give_the_bits_of_the_stages(device, programs, sampling):
    """Fewer of them than a stage has tiles, and more; drafting to the end, and an early exit."""
    model = make_model(device)
    for order, threshold in enumerate((0.0, 0.1)):
        step, loop = launch(model, programs, order, threshold=threshold, **sampling)
        same(step, wanted(model, threshold=threshold, **sampling))
        assert not loop.state.any()  # ready to be launched again


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of NaN
@pytest.mark.parametrize("name", STAGES)
def test_every_barrier_is_needed(device, monkeypatch, name):
    """Without the one behind a stage, some order gives something else."""
    wait, without = module.wait, STAGES[name].value + 1

    def hasty(state_ptr: Any, arrivals: Any, polls: Any, cause: Any) -> Any:
        return arrivals >= 0 if int(cause) == without else wait(state_ptr, arrivals, polls, cause)

    model = make_model(device, layers=1)
    stages = wanted(model, threshold=0.0)
    monkeypatch.setattr(module, "wait", hasty)
    for order in range(8):
        step, _ = launch(model, 3, order, threshold=0.0)
        try:
            same(step, stages)
        except AssertionError:
            return
    pytest.fail(f"no order shows that the barrier behind {name} is missing")


@pytest.mark.parametrize("order", range(3))
def test_nobody_waits_for_ever(device, order):
    """A program that never comes: all others leave, with an error word, whatever the order."""
    _, loop = launch(make_model(device, layers=1), 3, order, missing=1, threshold=0.0)
    assert int(loop.error) == QKV.value + 1
