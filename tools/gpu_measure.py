# ruff: noqa: N803 (constexpr in capitals, as in the kernels)
"""How kernels are measured on a GPU, for the benchmarks and for the tuner.

- Repetitions are captured in a CUDA graph, so that no launch gap is timed, and events around a replay time it. Another
  replay goes before each, unmeasured: the card is busy while the host submits the timed one.
- Repetitions take the next of a rotating number of argument sets, whose weights together exceed ``OVERFLOW`` times the
  L2: as in decoding, every weight comes from memory. All numbers are random: zeros can run faster than data does.
- The yardstick is measured on the same card: a read-only stream over a buffer many times the L2.

No clock, limit or mode of the card is ever set; ``gpu_card.snapshot`` records them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gpu_card import read_card
from torch import Tensor

from kangaroo_kernels.model.loop.graphs import no_garbage_collection

OVERFLOW = 4
"""The argument sets' weights together are larger than so many times the L2."""

REPLAY_US, LEAST_US = 2000.0, 2.0
"""A replay lasts at least so long, for its launch and its events take a few microseconds; no launch is faster."""

FASTEST_READ = 5e6
"""Bytes a microsecond that no card exceeds: what a call takes at least, where its time is not known yet."""

ROUNDS, WARM_UP_SECONDS = 30, 0.05
"""Timed replays, and how long before them others run, in which the clocks rise."""


class Quantiles(NamedTuple):
    """Of the time of a call, in microseconds."""

    p20: float
    p50: float
    p80: float


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """The 20th, 50th and 80th percentile, interpolated; of at least two times."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Quantiles(1e6 * tenths[1], 1e6 * tenths[4], 1e6 * tenths[7])


def sets_needed(set_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """How many sets of ``set_bytes`` exceed ``OVERFLOW`` times the L2: at least two, within half of the free memory."""
    wanted = max(2, OVERFLOW * l2_bytes // set_bytes + 1)
    return max(1, min(wanted, free_bytes // 2 // set_bytes))


def repetitions_for(sets: int, least_us: float) -> int:
    """Calls a graph: every set equally often, and ``REPLAY_US`` if a call takes ``least_us``."""
    rounds = -(-REPLAY_US // (sets * max(least_us, LEAST_US)))
    return sets * max(1, int(rounds))


class Replays:
    """A CUDA graph of ``repetitions`` calls, in the order of ``calls`` and again from the first, warmed up.

    Each call launches the same work on arguments of its own. They are kept, and with them the memory that is read.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], repetitions: int) -> None:
        self.calls, self.repetitions = calls, repetitions
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, loads and makes handles where that is allowed
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with no_garbage_collection(), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            for index in range(repetitions):
                calls[index % len(calls)]()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun = time.perf_counter()
        while time.perf_counter() - begun < WARM_UP_SECONDS:
            self.seconds()

    def seconds(self) -> float:
        """Of a call, the mean over one replay."""
        self.graph.replay()
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3 / self.repetitions


def time_graph(calls: Sequence[Callable[[], object]], repetitions: int, rounds: int = ROUNDS) -> Quantiles:
    """Capture, warm up, and time ``rounds`` replays."""
    replays = Replays(calls, repetitions)
    return quantiles([replays.seconds() for _ in range(rounds)])


# ---- the yardstick


@triton.jit
def read_stream_kernel(
    source_ptr,  # [count] int32
    sums_ptr,  # [programs] int32
    count,
    BLOCK: tl.constexpr,
    LOADS: tl.constexpr,
):
    """One program sums every ``num_programs``-th chunk of ``LOADS * BLOCK`` integers; the sum wraps around."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(tl.program_id(0) * (BLOCK * LOADS), count, tl.num_programs(0) * (BLOCK * LOADS)):
        for load in tl.static_range(LOADS):  # independent of one another: several are under way at once
            total += tl.load(source_ptr + first + load * BLOCK + offs)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


class Stream(NamedTuple):
    """A way to read a buffer."""

    num_warps: int  # of a program
    loads: int  # of 16 bytes, that a thread has under way
    programs: int  # of a multiprocessor; 0 for a program a chunk

    @property
    def chunk(self) -> int:
        """32-bit integers that a program reads at a time; 4 of them are 16 bytes."""
        return 32 * self.num_warps * 4 * self.loads


STREAMS = tuple(Stream(*values) for values in product((4, 8), (4, 8, 16), (0, 4, 8, 16)))


def read_stream(source: Tensor, stream: Stream, multiprocessors: int) -> Tensor:
    """Read ``source`` ``[count]`` int32 once, ``count`` a multiple of the chunk: the programs' sums, int32."""
    chunks = source.numel() // stream.chunk
    assert chunks * stream.chunk == source.numel() < 2**31
    programs = min(chunks, stream.programs * multiprocessors) if stream.programs else chunks
    sums = torch.empty(programs, dtype=torch.int32, device=source.device)
    sizes = {"BLOCK": stream.chunk // stream.loads, "LOADS": stream.loads, "num_warps": stream.num_warps}
    read_stream_kernel[(programs,)](source, sums, source.numel(), **sizes)
    return sums


class Ceiling(NamedTuple):
    """What a card's memory gives, in 10^9 bytes a second."""

    read: float  # by the fastest read-only stream
    copy: float  # from device to device, bytes read and bytes written
    buffer_bytes: int
    stream: Stream  # the fastest one


def measure_ceiling(device: torch.device) -> Ceiling:
    """Try every one of ``STREAMS``, and time the fastest again; a few seconds.

    Raises:
        RuntimeError: a stream that did not read every integer.
    """
    card = read_card(device)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    unit = 4 * max(stream.chunk for stream in STREAMS) * 8  # every chunk divides it, and its halves
    buffer_bytes = min(4 << 30, max(16 * card.l2_bytes, 1 << 30), free_bytes // 2) // unit * unit
    source = torch.empty(buffer_bytes // 4, dtype=torch.int32, device=device).random_()
    wanted, repetitions = source.sum(), repetitions_for(1, buffer_bytes / FASTEST_READ)

    def measure(stream: Stream, rounds: int) -> float:
        read = partial(read_stream, source, stream, card.multiprocessors)
        if int(read().sum() - wanted) % (1 << 32):  # a program's sum wraps around
            raise RuntimeError(f"the stream {stream} did not read every integer once.")
        return time_graph([read], repetitions, rounds).p50

    fastest = min(STREAMS, key=lambda stream: measure(stream, 5))
    read_us, (first, second) = measure(fastest, ROUNDS), source.chunk(2)
    copy_us = time_graph([lambda: first.copy_(second)], repetitions).p50
    return Ceiling(buffer_bytes / read_us / 1e3, buffer_bytes / copy_us / 1e3, buffer_bytes, fastest)
