"""Every operation of a decode step: the Triton kernel beside PyTorch itself, at the shapes of real models.

On a GPU, in bfloat16 (``tools/gpu_measure.py`` says how it is timed):

- ``kernel``: the launcher, in the launch configuration that it picks here.
- ``chained``: the same launched as a programmatic dependent of the kernel before it (sm_90).
- ``eager``: the reference, with PyTorch's own ``rms_norm`` in place of the one written for CPUs, and cuBLAS for the
  matrices. Attention is ``scaled_dot_product_attention`` with ``enable_gqa`` over a cache of exactly the text's length
  (``causal_lower_right`` for several rows); a sample comes from a softmax divided by exponential noise.
- ``compiled``: ``torch.compile`` of the same; RoPE without complex numbers, which it does not fuse.

The time of a round is the device time of one call, from CUDA events; pytest-benchmark shows it in its own columns. Each
result is compared with the reference in float64 before it is timed. ``-k 'Llama-3.1-8B and gate_up and not compiled'``
picks some benchmarks; all of them take some minutes, most of which is compiling.

Without a GPU only the references run, in float32 at small shapes. This shows that they work and what they cost.
"""

import time
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import ALLOWED, launcher, reference, relative_error, written
from gpu_card import read_card, snapshot
from gpu_measure import ROUNDS, Replays, quantiles, repetitions_for, sets_needed
from torch.nn.attention.bias import causal_lower_right

from kangaroo_kernels.contract import Top1
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.reference import gate_up as gate_up_ref
from kangaroo_kernels.reference import qkv_rope as qkv_rope_ref
from kangaroo_kernels.reference import top1_head as top1_head_ref
from kangaroo_kernels.reference.top1_head import confidence_of, lm_head
from kangaroo_kernels.workloads import MODELS, TINY, Settings, Workload, workloads

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SHORT = 256
"""Positions of the caches that ``qkv_rope`` appends to."""

BASELINE_ERROR = 3e-2
"""PyTorch rounds the logits to bfloat16. Where the largest lie, that is off by half of 2^-5: 1.6% of a confidence."""


class Case(NamedTuple):
    """An operation of a model; ``length`` is that of the text, and only attention depends on it."""

    model: str
    workload: Workload
    length: int

    def __str__(self) -> str:
        op, role = self.workload.op, self.workload.role
        detail = {"attention": f"-{self.length}", "linear_residual": f"-{role}"}.get(op, "")
        return f"{self.model}-{op}{detail}"


def find_cases():
    for model in MODELS if ON_GPU else (TINY,):
        for workload in workloads(model):
            lengths = (SHORT,)
            if workload.op == "attention" and ON_GPU:
                lengths = (128, 2048, 8192, *((32768,) if model.name == "Llama-3.1-8B" else ()))
            yield from (Case(model.name, workload, length) for length in lengths)


class DeviceClock:
    """The sum of the seconds that calls took on the device; pytest-benchmark reads it before and after a round."""

    def __init__(self):
        self.total = 0.0


CLOCK = DeviceClock()


def device_seconds():
    return CLOCK.total


# ---- PyTorch's own way


def library_norm(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def attention_of_pytorch(q, k_cache, v_cache, position, *, scale):
    rows, heads, _ = q.shape
    kv_heads, length, _ = k_cache.shape
    assert position + rows == length
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k_cache[None],
        v_cache[None],
        attn_mask=None if rows == 1 else causal_lower_right(rows, length),
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1).reshape(rows, -1)


def sample_of_pytorch(x, norm_weight, weight, position, *, eps, temperature, seed):
    logits = lm_head(x, norm_weight, weight, eps=eps)
    shares = torch.softmax(logits / temperature, dim=-1)
    return Top1(shares.div_(torch.empty_like(shares).exponential_()).argmax(dim=-1), confidence_of(logits))


def qkv_rope_in_real_numbers(x, norm_weight, weight, table, k_cache, v_cache, position, *, eps):
    kv_heads, _, head_dim = k_cache.shape
    rows, last = x.shape[0], position + x.shape[0]
    qkv = F.linear(library_norm(x, norm_weight, eps), weight).view(rows, -1, head_dim)
    turned, values = qkv.split((qkv.shape[1] - kv_heads, kv_heads), dim=1)
    even, odd = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table[position:last].unbind(-1)
    pairs = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    queries, keys = pairs.flatten(-2).to(x.dtype).split((turned.shape[1] - kv_heads, kv_heads), dim=1)
    k_cache[:, position:last] = keys.transpose(0, 1)
    v_cache[:, position:last] = values.transpose(0, 1)
    return queries


def pytorch_way(op, compiled):
    eager = {"attention": attention_of_pytorch, "sample_head": sample_of_pytorch}.get(op, reference(op))
    if not compiled:
        return eager
    function = qkv_rope_in_real_numbers if op == "qkv_rope" else eager
    return torch.compile(function, dynamic=False, fullgraph=op != "attention")


def on_the_host(value):
    """A position or seed as a number: PyTorch would ask the device for it at every call."""
    is_one = isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.numel() == 1
    return int(value) if is_one else value


def pytorch_arguments(op, arguments, compiled):
    positional = tuple(map(on_the_host, arguments[0]))
    named = {name: on_the_host(value) for name, value in arguments[1].items()}
    if op == "qkv_rope" and compiled:
        positional = tuple(torch.view_as_real(value) if torch.is_complex(value) else value for value in positional[:6])
        positional += (int(arguments[0][6]),)
    return positional, named


@pytest.fixture
def norm_of_pytorch(monkeypatch):
    """A function: once it is called, the references use PyTorch's norm until the benchmark ends."""

    def put():
        for module in (qkv_rope_ref, gate_up_ref, top1_head_ref):
            monkeypatch.setattr(module, "rms_norm", library_norm)

    return put


# ---- the benchmarks


@pytest.mark.benchmark(timer=device_seconds if ON_GPU else time.perf_counter)
@pytest.mark.filterwarnings("ignore")  # compilers warn about their own internals
@pytest.mark.parametrize("way", ["kernel", "chained", "eager", "compiled"] if ON_GPU else ["reference"])
@pytest.mark.parametrize("rows", [1, 8, 16] if ON_GPU else [1, 4], ids=lambda rows: f"M{rows}")
@pytest.mark.parametrize("case", list(find_cases()), ids=str)
def bench_kernels(benchmark, request, norm_of_pytorch, case, rows, way):
    torch.manual_seed(0)
    benchmark.group = f"{case}, M = {rows}" if ON_GPU else "references on the CPU"
    benchmark.extra_info |= {
        "model": case.model,
        "op": case.workload.op,
        "role": case.workload.role,
        "rows": rows,
        "length": case.length,
        "way": way,
    }
    if ON_GPU:
        with chained() if way == "chained" else nullcontext():
            on_gpu(benchmark, request.getfixturevalue("ceiling"), norm_of_pytorch, case, rows, way)
    else:
        on_cpu(benchmark, case, rows)


def on_cpu(benchmark, case, rows):
    op = case.workload.op
    arguments = case.workload.make(Settings(rows, case.length, DTYPE, DEVICE))
    error = relative_error(op, written(op, reference(op), arguments), arguments)
    require_right(benchmark, error, ALLOWED[DTYPE])
    benchmark.pedantic(reference(op), *arguments, rounds=ROUNDS, warmup_rounds=3, iterations=5)


def on_gpu(benchmark, ceiling, norm_of_pytorch, case, rows, way):
    op = case.workload.op
    settings = Settings(rows, case.length, DTYPE, DEVICE)
    bytes_moved = case.workload.bytes_moved(rows, case.length, DTYPE.itemsize)
    count = sets_needed(bytes_moved, read_card(DEVICE).l2_bytes, torch.cuda.mem_get_info(DEVICE)[0])
    sets = [case.workload.make(settings) for _ in range(count)]

    if way in ("kernel", "chained"):
        function, allowed = launcher(op), ALLOWED[DTYPE]
        error = relative_error(op, written(op, function, sets[0]), sets[0])
    else:
        compiled, allowed = way == "compiled", BASELINE_ERROR
        norm_of_pytorch()
        torch.compiler.reset()
        function = pytorch_way(op, compiled)
        given = [pytorch_arguments(op, arguments, compiled) for arguments in sets]
        got = written(op, function, given[0], takes_out=False)
        error = relative_error(op, got, sets[0], same_noise=False)
        sets = given
    require_right(benchmark, error, allowed)

    def call(arguments):
        positional, named = arguments
        return lambda: function(*positional, **named)

    repetitions = repetitions_for(count, bytes_moved / ceiling.read / 1e3)
    before = snapshot(DEVICE)
    replays = Replays([call(arguments) for arguments in sets], repetitions)

    def replay():
        CLOCK.total += replays.seconds()

    benchmark.pedantic(replay, rounds=ROUNDS)
    times = quantiles(benchmark.stats.stats.data)
    speed = bytes_moved / times.p50 / 1e3
    benchmark.extra_info |= {
        "us": times._asdict(),
        "bytes": bytes_moved,
        "gigabytes_per_second": speed,
        "ceiling_gigabytes_per_second": ceiling.read,
        "share_of_ceiling": speed / ceiling.read,
        "argument_sets": count,
        "repetitions": repetitions,
        "gpu_before": before,
        "gpu_after": snapshot(DEVICE),
    }


def require_right(benchmark, error, allowed):
    """Fail a benchmark whose result is wrong, before it is timed."""
    benchmark.extra_info["relative_error"] = error
    if not error <= allowed:
        pytest.fail(f"wrong, so not timed: relative error {error:.2g}, allowed {allowed:.2g}")
