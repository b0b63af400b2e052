"""What a step takes from PyTorch's own state and what it leaves to the caller: threads, autocast, devices.

Small matrices lose more to waking threads than they gain, so the number of CPU threads is measured.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

ROUNDS = 5
"""How often each number of threads is timed; its best round counts."""


@contextmanager
def own_state(device: torch.device) -> Iterator[None]:
    """Inference mode, free of an autocast or a default device that the caller works under: they would change tokens.

    A GPU is the current one: Triton launches there, and events, streams and captures belong to it. Each thread has a
    current GPU of its own, the first one unless it says otherwise.
    """
    moved = torch.empty(0).device.type != "cpu"  # the quickest question for the default device
    current: AbstractContextManager[object] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, torch.inference_mode():
        if not moved and not torch.is_autocast_enabled(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False), torch.device("cpu"):
            yield


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` intra-op threads (None leaves it alone) and put the caller's number back."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_thread_count(step: Callable[[], object]) -> int:
    """Time ``step`` with 1, 2, 4, ... threads up to the caller's number; the smallest count within 3 % of the best.

    The counts take turns and the best round of each counts, so a busy moment slows them all alike and decides nothing.
    """
    limit = torch.get_num_threads()
    counts = [1 << bit for bit in range(limit.bit_length()) if 1 << bit < limit] + [limit]
    times = dict.fromkeys(counts, float("inf"))
    for _ in range(ROUNDS if len(counts) > 1 else 0):
        for count in counts:
            with threads(count):
                step()  # wakes the threads and warms the caches
                began = time.perf_counter()
                step()
                times[count] = min(times[count], time.perf_counter() - began)
    fastest = min(times.values())
    return min(count for count, seconds in times.items() if seconds <= 1.03 * fastest)
