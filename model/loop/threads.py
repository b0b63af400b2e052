"""How many CPU threads a decode should use: small matrices lose more to waking threads than they gain."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


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


def fastest_thread_count(step: Callable[[], object], repeats: int = 3) -> int:
    """Time ``step`` with 1, 2, 4, ... threads up to the caller's number; the smallest count within 3 % of the best."""
    limit = torch.get_num_threads()
    counts = [1 << bit for bit in range(limit.bit_length()) if 1 << bit < limit] + [limit]
    times = {}
    for count in counts:
        with threads(count):
            step()  # wakes the threads and warms the caches
            best = float("inf")
            for _ in range(repeats):
                began = time.perf_counter()
                step()
                best = min(best, time.perf_counter() - began)
            times[count] = best
    fastest = min(times.values())
    return min(count for count, seconds in times.items() if seconds <= 1.03 * fastest)
