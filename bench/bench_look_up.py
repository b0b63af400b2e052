"""``look_up`` over texts of several lengths, beside the same in PyTorch's operations.

On a GPU, a round is the device time of a call (``tools/gpu_measure.py``), from a captured graph; without one, only the
reference runs. Texts are of 50 tokens by chance, so that short matches are everywhere, as in real text.
"""

import time

import pytest
import torch
from accuracy import launcher, reference
from gpu_measure import ROUNDS, Replays, repetitions_for

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
MOST, LEAST = 15, 3
TOTAL = [0.0]
"""Seconds of calls on the device; pytest-benchmark reads them before and after a round."""


@pytest.mark.benchmark(timer=(lambda: TOTAL[0]) if ON_GPU else time.perf_counter)
@pytest.mark.parametrize("way", ["kernel", "reference"] if ON_GPU else ["reference"])
@pytest.mark.parametrize("length", [512, 8192, 131072])
def bench_look_up(benchmark, length, way):
    text = torch.randint(50, (length,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    count, arrivals = torch.tensor([length], device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    benchmark.group = f"look_up, {length} tokens"
    benchmark.extra_info |= {"op": "look_up", "length": length, "way": way, "bytes": text.nbytes}
    function = launcher("look_up") if way == "kernel" else reference("look_up")

    def call():
        return function(text, count, MOST, LEAST, arrivals=arrivals)

    wanted = reference("look_up")(text.cpu(), length, MOST, LEAST)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(call(), wanted, strict=True))
    if not ON_GPU:
        benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=3, iterations=5)
        return
    replays = Replays([call], repetitions_for(1, 0.0))

    def replay():
        TOTAL[0] += replays.seconds()

    benchmark.pedantic(replay, rounds=ROUNDS)
