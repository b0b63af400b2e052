"""The number of threads is found by turns, so that a busy moment decides nothing."""

import pytest
import torch

from kangaroo_kernels.model.loop import threads as module
from kangaroo_kernels.model.loop.threads import fastest_thread_count, threads


@pytest.mark.parametrize("busy", [range(0), range(8), range(4, 12), range(2, 30, 3), range(12, 20)])
@pytest.mark.parametrize(("costs", "wanted"), [({1: 1.0, 2: 1.5}, 1), ({1: 1.5, 2: 1.0}, 2), ({1: 1.02, 2: 1.0}, 1)])
def test_a_busy_moment_decides_nothing(monkeypatch, busy, costs, wanted):
    """A clock that the work itself moves; while the machine is busy everything takes ten times as long."""
    now, calls = [0.0], [0]

    def step() -> None:
        now[0] += costs[torch.get_num_threads()] * (10 if calls[0] in busy else 1)
        calls[0] += 1

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with threads(2):
        assert fastest_thread_count(step) == wanted
    assert calls[0] == 20
