# ruff: noqa: N803 (constexpr in capitals, as in the kernels)
"""How kernels are measured on a GPU, for the benchmarks and for the tuner.

- Repetitions are captured in a CUDA graph, so that no launch gap is timed, and events around a replay time it. Another
  replay goes before each, unmeasured: the card is busy while the host submits the timed one.
- Repetitions take the next of a rotating number of argument sets, whose weights together exceed ``OVERFLOW`` times the
  L2: as in decoding, every weight comes from memory. All numbers are random: zeros can run faster than data does.
- The yardstick is measured on the same card: a read-only stream over a buffer many times the L2.
- Nothing is timed before ``relative_error`` held what it wrote against float64, in memory that was poisoned before.

No clock, limit or mode of the card is ever set; ``snapshot`` records them.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import pynvml
import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.model.loop.graphs import no_garbage_collection
from kangaroo_kernels.reference.noise import gumbel_rows
from kangaroo_kernels.reference.sample_head import filter_logits
from kangaroo_kernels.reference.top1_head import confidence_of, lm_head

OVERFLOW = 4
"""The argument sets' weights together are larger than so many times the L2."""

REPLAY_US = 2000.0
"""A replay lasts at least so long: its launch and its events take a few microseconds."""

LEAST_US = 2.0
"""No launch is faster, however few its bytes."""

ROUNDS = 30
"""Timed replays."""

WARM_UP_SECONDS = 0.05
"""Of replays before them, in which the clocks rise."""

# ---- the card


class Card(NamedTuple):
    """What a GPU says about itself.

    Attributes:
        l2_bytes: of its L2 cache.
        shared_bytes: the most shared memory of a program.
        capability: compute capability times ten.
    """

    name: str
    multiprocessors: int
    l2_bytes: int
    shared_bytes: int
    capability: int


def read_card(device: torch.device) -> Card:
    """Ask a CUDA device."""
    gpu = torch.cuda.get_device_properties(device)
    capability = 10 * gpu.major + gpu.minor
    shared_bytes = getattr(gpu, "shared_memory_per_block_optin", gpu.shared_memory_per_block)
    return Card(gpu.name, gpu.multi_processor_count, gpu.L2_cache_size, shared_bytes, capability)


THROTTLE_REASONS = {
    1 << 0: "idle",
    1 << 1: "application clocks",
    1 << 2: "software power cap",
    1 << 3: "hardware slowdown",
    1 << 4: "sync boost",
    1 << 5: "software thermal slowdown",
    1 << 6: "hardware thermal slowdown",
    1 << 7: "hardware power brake",
    1 << 8: "display clocks",
}
"""NVML's bits."""


def throttle_reasons(bits: int) -> list[str]:
    """The names of NVML's bits; one without a name as its number."""
    set_bits = [1 << place for place in range(bits.bit_length()) if bits >> place & 1]
    return [THROTTLE_REASONS.get(bit, hex(bit)) for bit in set_bits]


@lru_cache(maxsize=8)
def _nvml_handle(device: torch.device) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def snapshot(device: torch.device) -> dict[str, Any]:
    """Name, driver, clocks, power, temperature and throttle reasons at this moment; None for what NVML does not say."""
    try:
        handle = _nvml_handle(device)
    except pynvml.NVMLError as error:
        return {"name": torch.cuda.get_device_name(device), "nvml": str(error)}

    def read(query: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return query(*arguments)
        except pynvml.NVMLError:
            return None

    def watts(milliwatts: int | None) -> float | None:
        return None if milliwatts is None else milliwatts / 1000

    reasons = read(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return {
        "name": torch.cuda.get_device_name(device),
        "driver": read(pynvml.nvmlSystemGetDriverVersion),
        "sm_mhz": read(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "sm_mhz_max": read(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": read(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "memory_mhz_max": read(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "power_w": watts(read(pynvml.nvmlDeviceGetPowerUsage, handle)),
        "power_limit_w": watts(read(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
        "temperature_c": read(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": None if reasons is None else throttle_reasons(reasons),
    }


class EnergyMeter:
    """Energy that a card takes, from NVML's counter. It moves a few times a second, so several decodes are added up.

    Args:
        device: a GPU; None measures nothing.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._handle: Any = None
        self._millijoules, self._tokens = 0, 0
        if device is None:
            return
        try:
            self._handle = _nvml_handle(device)
            self._read()
        except pynvml.NVMLError:  # an old card, or a container that hides it
            self._handle = None

    def _read(self) -> int:
        if self._handle is None:
            return 0
        millijoules: int = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return millijoules

    def begin(self, tokens: int) -> None:
        """Count from here, where ``tokens`` are there already."""
        self._from = self._read(), tokens

    def end(self, tokens: int) -> None:
        """Count to here."""
        millijoules, before = self._from
        self._millijoules += self._read() - millijoules
        self._tokens += tokens - before

    @property
    def joules_per_token(self) -> float | None:
        """Of all between the beginnings and the ends; None where the card does not say."""
        if self._handle is None or not self._millijoules or not self._tokens:
            return None
        return self._millijoules / 1000 / self._tokens


# ---- time


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


def repetitions_for(sets: int, least_us: float, replay_us: float = REPLAY_US) -> int:
    """Calls a graph: every set equally often, and ``replay_us`` if a call takes ``least_us``."""
    rounds = -(-replay_us // (sets * max(least_us, LEAST_US)))
    return sets * max(1, int(rounds))


class Replays:
    """A CUDA graph of ``repetitions`` calls, in the order of ``calls`` and again from the first, warmed up.

    Args:
        calls: each launches the same work on arguments of its own, and works on any stream; they are kept, and with
            them the memory that the graph reads.
        repetitions: calls a replay.
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
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
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
        milliseconds: float = self.start.elapsed_time(self.end)
        return milliseconds / 1e3 / self.repetitions


def time_graph(calls: Sequence[Callable[[], object]], repetitions: int, rounds: int = ROUNDS) -> Quantiles:
    """Capture, warm up, and time ``rounds`` replays."""
    replays = Replays(calls, repetitions)
    return quantiles([replays.seconds() for _ in range(rounds)])


# ---- the yardstick

VECTOR = 4
"""32-bit integers of the 16 bytes that a thread loads at a time."""


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
    """A way to read a buffer.

    Attributes:
        num_warps: of a program.
        loads: of 16 bytes that a thread has under way.
        programs: a multiprocessor; 0 for a program a chunk.
    """

    num_warps: int
    loads: int
    programs: int

    @property
    def chunk(self) -> int:
        """Integers that a program reads at a time."""
        return 32 * self.num_warps * VECTOR * self.loads


STREAMS = tuple(
    Stream(warps, loads, programs) for warps in (4, 8) for loads in (4, 8, 16) for programs in (0, 4, 8, 16)
)


def read_stream(source: Tensor, stream: Stream, multiprocessors: int) -> Tensor:
    """Read ``source`` ``[count]`` int32 once, ``count`` a multiple of the chunk: the programs' sums, int32."""
    chunks = source.numel() // stream.chunk
    assert chunks * stream.chunk == source.numel() < 2**31
    programs = min(chunks, stream.programs * multiprocessors) if stream.programs else chunks
    sums = torch.empty(programs, dtype=torch.int32, device=source.device)
    block = stream.chunk // stream.loads
    read_stream_kernel[(programs,)](
        source, sums, source.numel(), BLOCK=block, LOADS=stream.loads, num_warps=stream.num_warps
    )
    return sums


def wrapped_sum(values: Tensor) -> int:
    """The sum of int32 ``values`` modulo 2^32."""
    return int(values.sum(dtype=torch.int64)) % (1 << 32)


class Ceiling(NamedTuple):
    """What a card's memory gives, in 10^9 bytes a second, and how it was measured.

    Attributes:
        read: the fastest read-only stream.
        copy: from device to device, bytes read and bytes written.
        buffer_bytes: that were read.
        stream: the fastest one's settings.
    """

    read: float
    copy: float
    buffer_bytes: int
    stream: Stream


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
    wanted = wrapped_sum(source)

    def measure(stream: Stream, rounds: int) -> float:
        if wrapped_sum(read_stream(source, stream, card.multiprocessors)) != wanted:
            raise RuntimeError(f"the stream {stream} did not read every integer once.")
        repetitions = repetitions_for(1, buffer_bytes / 5e6)  # at 5 TB/s: few enough on any card
        return time_graph([lambda: read_stream(source, stream, card.multiprocessors)], repetitions, rounds).p50

    fastest = min(STREAMS, key=lambda stream: measure(stream, 5))
    read = buffer_bytes / measure(fastest, ROUNDS) / 1e3
    halves = source.chunk(2)
    copied = time_graph([lambda: halves[0].copy_(halves[1])], repetitions_for(1, buffer_bytes / 5e6)).p50
    return Ceiling(read, buffer_bytes / copied / 1e3, buffer_bytes, fastest)


# ---- right before fast

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a launcher and of its reference, as ``workloads`` makes them."""

HEADS = ("top1_head", "sample_head")

ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative errors beyond which nothing is timed: several roundings of the dtype."""


def launcher(op: str) -> Callable[..., Any]:
    """The kernel's."""
    function: Callable[..., Any] = getattr(import_module(f"kangaroo_kernels.{op}"), op)
    return function


def reference(op: str) -> Callable[..., Any]:
    """The operation in PyTorch."""
    function: Callable[..., Any] = getattr(import_module(f"kangaroo_kernels.reference.{op}"), op)
    return function


def row_operands(op: str) -> tuple[int, ...]:
    """Which arguments have a row a token in flight."""
    return (0, 2) if op == "linear_residual" else (0,)


def first_rows(op: str, arguments: Arguments, rows: int) -> Arguments:
    """Arguments of the first ``rows`` tokens in flight."""
    positional, named = arguments
    cut = row_operands(op)
    return tuple(value[:rows] if index in cut else value for index, value in enumerate(positional)), named


def first_results(op: str, results: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The same of what ``written`` gave for all; an appended cache has its rows in the second dimension."""
    return [each[:, :rows] if op == "qkv_rope" and index else each[:rows] for index, each in enumerate(results)]


def on_the_host(arguments: Arguments) -> Arguments:
    """Arguments with positions and seeds as numbers: PyTorch would ask the device for them at every call."""

    def number(value: Any) -> Any:
        is_one = isinstance(value, Tensor) and value.dtype == torch.int64 and value.numel() == 1
        return int(value) if is_one else value

    positional, named = arguments
    return tuple(map(number, positional)), {name: number(value) for name, value in named.items()}


def _tensors(op: str, result: Any, arguments: Arguments) -> Iterator[Tensor]:
    """A result's tensors, then the rows of the caches that the operation appends."""
    yield from (result if isinstance(result, tuple) else (result,))
    if op == "qkv_rope":
        x, *_, k_cache, v_cache, position = arguments[0]
        first, last = int(position), int(position) + x.shape[0]
        yield from (k_cache[:, first:last], v_cache[:, first:last])


def written(op: str, function: Callable[..., Any], arguments: Arguments, takes_out: bool = True) -> tuple[Tensor, ...]:
    """Copies of all that a call writes, into poisoned memory where the function has ``out``."""
    positional, named = arguments
    result = function(*positional, **named)
    if takes_out:
        for tensor in _tensors(op, result, arguments):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        result = function(*positional, **named, out=result)
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in _tensors(op, result, arguments))


def same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two results of ``written`` are equal to the last bit: a zero's sign counts."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(one.view(integers[one.element_size()]), other.view(integers[other.element_size()]))
        for one, other in zip(ours, theirs, strict=True)
    )


def relative_error(op: str, got: tuple[Tensor, ...], arguments: Arguments, same_noise: bool = True) -> float:
    """How far ``got`` (of ``written``) is from the reference in float64; infinity for a NaN or an impossible token.

    It is the largest |got - truth| / |truth| over what was written. For a head it is the confidences' distance, or how
    far below the best score the chosen tokens' are, over the largest score, whichever is more: a near tie may go either
    way. Without ``same_noise`` a sampled token says nothing but that it is one.
    """
    positional, named = arguments
    wide = tuple(
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in positional
    )
    if op in HEADS:
        errors = _head_errors(op, got, (wide, named), same_noise)
    else:
        truth = written(op, reference(op), (wide, named), takes_out=False)
        errors = [_distance(ours, exact) for ours, exact in zip(got, truth, strict=True)]
    return max((error if error == error else float("inf") for error in errors), default=float("inf"))  # noqa: PLR0124


def _distance(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def _head_errors(op: str, got: tuple[Tensor, ...], arguments: Arguments, same_noise: bool) -> list[float]:
    (x, norm_weight, weight, *rest), named = arguments
    logits = lm_head(x, norm_weight, weight, eps=named["eps"])
    token, confidence = got
    if not bool(((token >= 0) & (token < logits.shape[1])).all()):
        return [float("inf")]
    distance = _distance(confidence, confidence_of(logits))
    if op == "top1_head":
        scores = logits
    elif same_noise:
        rows, vocab_size = logits.shape
        noise = gumbel_rows(int(named["seed"]) % (1 << 64), 0, int(rest[0]), rows, vocab_size, logits.device)
        scores = filter_logits(logits, named["temperature"], None, None) + noise
    else:
        return [distance]
    lost = scores.amax(dim=-1) - scores.gather(-1, token[:, None])[:, 0]
    return [distance, float(lost.max() / scores.abs().max())]
