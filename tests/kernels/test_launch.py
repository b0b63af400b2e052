"""What the launchers share: one signature with the reference, and one clear sentence for what a kernel cannot take."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from kernel_inputs import ROW_STRIDES, drawer, framed, same_bits
from pretended_gpus import pretended_gpus
from torch import Tensor

from kangaroo_kernels.operation import OPERATIONS, Inputs
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.shared.launch import aligned_rows, check_current, device_count, device_seed, launch_options
from kangaroo_kernels.shared.tiles import K_STEP_BYTES, elements

TESTS = Path(__file__).resolve().parent.parent

ROWS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CAPACITY, OUTPUTS, INNER, VOCAB = 3, 24, 4, 2, 8, 20, 17, 22, 37
WEIGHT_ROWS = {
    "qkv_rope": (HEADS + 2 * KV_HEADS) * HEAD_DIM,
    "linear_residual": OUTPUTS,
    "gate_up": 2 * INNER,
}
NAMES = [name for name, operation in OPERATIONS.items() if operation.example is not None]
OF_ROWS = [
    name for name in NAMES if name not in ("look_up", "weigh", "accept", "rank", "grow", "walk", "straighten", "commit")
]


def launcher(name: str) -> Callable[..., Any]:
    return OPERATIONS[name].launcher


def arguments(name: str, device: torch.device, rows: int = ROWS) -> dict[str, Any]:
    """What an operation takes, by name."""
    torch.manual_seed(0)
    operation = OPERATIONS[name]
    inputs = Inputs(rows, CAPACITY, HEADS, KV_HEADS, HEAD_DIM, torch.float32, device)
    args, kwargs = operation.example(inputs, WEIGHT_ROWS.get(name, VOCAB), HIDDEN)
    return inspect.signature(operation.reference).bind(*args, **kwargs).arguments


@pytest.mark.parametrize("name", OPERATIONS)
def test_launcher_and_reference_have_one_signature(name):
    ours, theirs = (
        [(part.name, part.kind, part.default) for part in inspect.signature(function).parameters.values()]
        for function in (launcher(name), OPERATIONS[name].reference)
    )
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_launcher_and_reference_take_these_arguments(name, device):
    """Or the refusals below would say nothing."""
    ours, theirs = (arguments(name, device) for _ in range(2))
    ours["returned"], theirs["returned"] = launcher(name)(**ours), OPERATIONS[name].reference(**theirs)
    for part, value in ours.items():  # what is written to, too
        torch.testing.assert_close(value, theirs[part])


# ---- refusals


@pytest.mark.parametrize("rows", [0, 17, 40])
@pytest.mark.parametrize("name", OF_ROWS)
def test_one_to_sixteen_rows(name, rows, device):
    with pytest.raises(ValueError, match=rf"^{name} takes 1 to 16 rows, got {rows}; its reference takes any number\.$"):
        launcher(name)(**arguments(name, device, rows))


@pytest.mark.parametrize("name", OF_ROWS)
def test_dtypes(name, device):
    given = arguments(name, device)
    first = next(iter(set(given) & {"x", "q"}))
    given[first] = given[first].double()
    with pytest.raises(TypeError, match=rf"^{name} takes float32, float16 or bfloat16, got torch.float64.$"):
        launcher(name)(**given)


def every_other(x: Tensor) -> Tensor:
    """The same numbers, with a stride of 2 along the last dimension."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def on_meta(x: Tensor) -> Tensor:
    return x.to("meta")


def transposed(weight: Tensor) -> PackedWeight:
    return PackedWeight(weight, None, Layout.TRANSPOSED)


Refusal = tuple[str, Callable[[Any], Any], type[Exception] | tuple[type[Exception], ...], str]
"""Which argument, what is done to it, the error, and its words."""

PROJECTIONS: list[Refusal] = [
    (
        "x",
        lambda x: x[:, 1:],
        ValueError,
        r"x is \[3, 23\] and the weight \[\d+, 24\]; they must be \[M, K\], \[N, K\]",
    ),
    ("x", lambda x: x[..., None], ValueError, r"x is \[3, 24, 1\] and the weight"),
    ("x", lambda x: x[0, :12], ValueError, r"x is \[12\] and the weight"),
    ("x", lambda x: x.flatten(), ValueError, r"x is \[72\] and the weight \[\d+, 24\]; they must be"),
    ("x", lambda x: x[0, 0], ValueError, r"x is \[\] and the weight \[\d+, 24\]; they must be"),
    ("weight", lambda weight: weight[None], ValueError, r"and the weight \[1, \d+, 24\]; they must be"),
    ("weight", every_other, ValueError, "the weight's rows have stride 2 along K; it must be 1"),
    ("weight", Tensor.half, TypeError, r"x is torch.float32 on .*, the weight torch.float16 on .*; they must agree"),
    ("weight", on_meta, TypeError, "the weight torch.float32 on meta; they must agree"),
    ("weight", transposed, ValueError, r"packed as TRANSPOSED; the kernels read Layout\.ROWS"),
]
NORMS: list[Refusal] = [
    ("norm_weight", lambda norm: norm[1:], ValueError, r"the norm's weight is \[23\]; it must be \[24\], contiguous"),
    ("norm_weight", lambda norm: norm[None], ValueError, r"the norm's weight is \[1, 24\]; it must be \[24\]"),
    ("norm_weight", every_other, ValueError, r"the norm's weight is \[24\]; it must be \[24\], contiguous"),
    ("norm_weight", Tensor.half, TypeError, "the norm's weight torch.float16 on .*; they must agree"),
    ("norm_weight", on_meta, TypeError, "the norm's weight torch.float32 on meta; they must agree"),
]
OUTPUTS_OF_TWO_DIMENSIONS: list[Refusal] = [
    ("out", lambda out: out[0, 0], ValueError, r"out is \[\] torch.float32 on \S+; it must be \[3, (17|22)\] t"),
    (
        "out",
        lambda out: out[:2],
        ValueError,
        r"out is \[2, (\d+)\] .*; it must be \[3, \1\] torch.float32 on \S+, last stride 1",
    ),
    ("out", lambda out: out[:, 1:], ValueError, r"; it must be \[3, (17|22)\] torch.float32"),
    ("out", lambda out: out[None], ValueError, r"out is \[1, 3, (\d+)\] .*; it must be \[3, \1\]"),
    ("out", Tensor.half, ValueError, r"torch.float16 on \S+, last stride 1; it must be .* torch.float32"),
    ("out", every_other, ValueError, "last stride 2; it must be .* last stride 1"),
]
RESIDUALS: list[Refusal] = [
    ("residual", lambda residual: residual[:2], ValueError, r"\[2, 17\].* must be \[3, 17\]"),
    ("residual", lambda residual: residual[:, 1:], ValueError, r"\[3, 16\].* must be \[3, 17\]"),
    ("residual", Tensor.half, ValueError, "torch.float16.* must be .* torch.float32"),
    ("residual", every_other, ValueError, "last stride 2; it must be .* last stride 1"),
]
FLAGS: list[Refusal] = [
    ("active", Tensor.long, TypeError, r"active is \[1\] torch.int64 on \S+; it must be \[1\] torch.int32 on"),
    ("active", lambda active: active[:0], TypeError, r"active is \[0\] torch.int32 on"),
    ("active", lambda active: active.expand(2), TypeError, r"active is \[2\] torch.int32 on"),
    ("active", on_meta, TypeError, r"active is \[1\] torch.int32 on meta; it must be \[1\] torch.int32 on (cpu|cuda)"),
]
POSITIONS: list[Refusal] = [
    ("position", lambda _: 2.0, (TypeError, ValueError), r"position is 2\.0; it must be a whole number"),
    ("position", lambda _: True, (TypeError, ValueError), r"position is True; it must be a whole number"),
    ("position", lambda _: torch.tensor([2.5]), TypeError, r"position is \[1\] torch.float32 on cpu; it must be \[1\]"),
    (
        "position",
        lambda _: torch.tensor([2]).int(),
        TypeError,
        r"position is \[1\] torch.int32 on cpu; it must be \[1\]",
    ),
    ("position", lambda _: torch.tensor([2, 3]), TypeError, r"position is \[2\] torch.int64 on cpu; it must be \[1\]"),
    ("position", lambda _: torch.tensor([2], device="meta"), TypeError, r"position is \[1\] torch.int64 on meta; it"),
]
CACHES: list[Refusal] = [
    refusal
    for part in ("k_cache", "v_cache")
    for refusal in (
        (part, Tensor.half, TypeError, "x is torch.float32 on .*, the cache torch.float16 on .*; they must agree"),
        (part, on_meta, TypeError, "the cache torch.float32 on meta; they must agree"),
        (part, every_other, ValueError, "the cache has stride 2 along its last dimension; it must be 1"),
        (part, lambda cache: cache[0, 0, 0], ValueError, r"the cache is \[\]; without a block table .* \[H_kv, T, D\]"),
        (part, lambda cache: cache[None], ValueError, r"\[1, 2, 20, 8\]; without a block table .* \[H_kv, T, D\]"),
        (part, lambda cache: cache[:, 1:], ValueError, r"\[2, 19, 8\].* two caches of H_kv heads of size D"),
        (part, lambda cache: cache[1:], ValueError, r"\[1, 20, 8\].* two caches of H_kv heads of size D"),
    )
]
HEADS_OF_ROWS: list[Refusal] = [
    ("weight", lambda weight: weight[1:], ValueError, r"the weight has 63 rows.* must be \(H \+ 2 \* H_kv\) \* D rows"),
    ("weight", lambda weight: weight[: 2 * KV_HEADS * HEAD_DIM], ValueError, "the weight has 32 rows"),
    ("out", lambda out: out[:, 1:], ValueError, r"out is \[3, 3, 8\].* must be \[3, 4, 8\] torch.float32"),
    ("out", lambda out: out.flatten(1), ValueError, r"out is \[3, 32\].* must be \[3, 4, 8\]"),
    ("out", Tensor.half, ValueError, "torch.float16.* must be .* torch.float32"),
    ("out", every_other, ValueError, "last stride 2; it must be .* last stride 1"),
    ("out", lambda out: torch.cat((out, out), 2)[..., :8], ValueError, "out has stride 16 from head to head; .* be 8"),
    ("table", lambda table: table[..., 1:], ValueError, r"the table is \[20, 1, 3\] .*; make it with rope_table"),
    ("table", every_other, ValueError, r"the table is \[20, 1, 4\] torch.complex64; make it with rope_table"),
    ("table", on_meta, TypeError, r"x is on (cpu|cuda:\d), the table on meta; they must agree"),
    ("table", torch.angle, ValueError, r"the table is \[20, 1, 4\] torch.float32; make it with rope_table"),
]
CASES = [
    *(("qkv_rope", *case) for case in PROJECTIONS + NORMS + CACHES + HEADS_OF_ROWS + POSITIONS + FLAGS),
    *(("gate_up", *case) for case in PROJECTIONS + NORMS + OUTPUTS_OF_TWO_DIMENSIONS + FLAGS),
    *(("linear_residual", *case) for case in PROJECTIONS + RESIDUALS + OUTPUTS_OF_TWO_DIMENSIONS + FLAGS),
    *((name, *case) for name in ("attention", "sample_head") for case in POSITIONS + FLAGS),
    *(("top1_head", *case) for case in FLAGS),
]


@pytest.mark.parametrize(("name", "part", "change", "error", "message"), CASES, ids=[f"{c[0]}: {c[4]}" for c in CASES])
def test_refusals(name, part, change, error, message, device):
    given = arguments(name, device)
    given["active"] = torch.ones(1, dtype=torch.int32, device=device)
    given["out"] = launcher(name)(**given)
    given[part] = change(given[part])
    with pytest.raises(error, match=f"^the weight is {message}" if "Layout" in message else f"^{name}: .*{message}"):
        launcher(name)(**given)


BLOCKS: list[Refusal] = [
    ("k_cache", lambda cache: cache[0], ValueError, r"\[2, 4, 8\]; with a block .* \[blocks, H_kv, block_size, D\]"),
    ("v_cache", lambda cache: cache[0], ValueError, r"\[2, 4, 8\]; with a block .* \[blocks, H_kv, block_size, D\]"),
    ("v_cache", lambda cache: cache[:, :, 1:], ValueError, r"\[5, 2, 4, 8\] and \[5, 2, 3, 8\]; they must be"),
    ("block_table", Tensor.long, TypeError, r"the block table is \[5\] torch.int64 on .* one contiguous row of int32"),
    ("block_table", lambda table: table[None], TypeError, r"the block table is \[1, 5\] torch.int32 on .* must be one"),
    ("block_table", every_other, TypeError, r"the block table is \[5\] torch.int32 on .* one contiguous row"),
    ("block_table", on_meta, TypeError, r"the block table is \[5\] torch.int32 on meta; .* of int32 on (cpu|cuda)"),
    ("block_table", lambda _: None, ValueError, r"the cache is \[5, 2, 4, 8\]; without a block table it must be"),
]


@pytest.mark.parametrize("name", ["qkv_rope", "attention"])
@pytest.mark.parametrize(("part", "change", "error", "message"), BLOCKS, ids=[c[3] for c in BLOCKS])
def test_refusals_of_paged_caches(part, change, error, message, name, device):
    given = arguments(name, device)
    draw = drawer(1, torch.float32, device)
    given |= {"k_cache": draw(5, KV_HEADS, 4, HEAD_DIM), "v_cache": draw(5, KV_HEADS, 4, HEAD_DIM)}
    given["block_table"] = torch.arange(5, dtype=torch.int32, device=device)
    launcher(name)(**given)
    given[part] = change(given[part])
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        launcher(name)(**given)


# ---- where kernels run


def run(code: str, **environment: str | None) -> None:
    """Run ``code`` in a new Python that finds the tests' modules; a variable that is None is taken away."""
    inherited = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    merged = {name: value for name, value in {**inherited, **environment}.items() if value is not None}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=merged, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit status {done.returncode} after:\n{done.stdout}\n{done.stderr[-3000:]}"


def test_without_the_interpreter_tensors_on_the_cpu_are_refused():
    run(
        """
import sys
import torch
sys.path.insert(0, "tests/kernels")
from test_launch import NAMES, arguments, launcher
for name in NAMES:
    print(name, flush=True)
    try:
        launcher(name)(**arguments(name, torch.device("cpu")))
    except RuntimeError as error:
        assert str(error).startswith(f"{name} got tensors on the CPU"), error
        assert "set TRITON_INTERPRET=1" in str(error), error
    else:
        raise AssertionError(f"{name} ran")
""",
        TRITON_INTERPRET=None,
    )


def test_nothing_beyond_an_operand_is_touched():
    """Every operand lies at an edge of the memory there is, in turns at its end and at its start."""
    run(
        """
import torch
from kernel_inputs import drawer, guarded
from kangaroo_kernels.gate_up import gate_up
from kangaroo_kernels.linear_residual import linear_residual
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.qkv_rope import qkv_rope

def kept(part):
    return guarded(part, at_end)

def number(value, dtype):
    return kept(torch.tensor([value], dtype=dtype))

# a width of x that is whole words of 16 bytes: the launcher passes x itself on
for dtype, at_end, (rows, hidden) in [
    (dtype, at_end, size)
    for dtype in (torch.float32, torch.float16)
    for at_end in (True, False)
    for size in ((3, 72), (16, 264))
]:
    draw = drawer(0, dtype, torch.device("cpu"))
    active = number(1, torch.int32)
    x, norm = kept(draw(rows, hidden)), kept(draw(hidden))
    for outputs in (1, 16, 33):
        print(dtype, at_end, rows, hidden, outputs, flush=True)
        weight = PackedWeight(kept(draw(outputs, hidden)), kept(draw(outputs)), Layout.ROWS)
        linear_residual(x, weight, kept(draw(rows, outputs)), active=active, out=kept(draw(rows, outputs)))
        print("linear_residual", flush=True)
        weight = PackedWeight(kept(draw(2 * outputs, hidden)), kept(draw(2 * outputs)), Layout.ROWS)
        gate_up(x, norm, weight, eps=1e-5, active=active, out=kept(draw(rows, outputs)))
        print("gate_up", flush=True)
    for block_size in (0, 4):  # exactly as many positions as there are
        heads, kv_heads, size, capacity = 3, 2, 10, 16
        first = capacity - rows if at_end else 0
        count = (heads + 2 * kv_heads) * size
        weight = PackedWeight(kept(draw(count, hidden)), kept(draw(count)), Layout.ROWS)
        shape = (4, kv_heads, 4, size) if block_size else (kv_heads, capacity, size)
        angles = torch.rand(first + rows, 1, size // 2)
        phases = kept(torch.view_as_real(torch.polar(torch.ones_like(angles), angles)))
        blocks = torch.tensor([1, 2, 0, 3] if at_end else [0, 2, 3, 1], dtype=torch.int32)
        if not at_end:
            blocks = blocks[: -(-rows // 4)]
        qkv_rope(
            x, norm, weight, phases, kept(draw(*shape)), kept(draw(*shape)), number(first, torch.int64), eps=1e-5,
            block_table=kept(blocks) if block_size else None, active=active, out=kept(draw(rows, heads, size)),
        )
        print("qkv_rope", block_size, flush=True)
""",
        CUDA_VISIBLE_DEVICES="",
        TRITON_INTERPRET="1",
    )


def test_the_edge_of_the_memory_is_one():
    """What the test above rests on: a read one element further ends the process, and nothing nearer does."""
    run(
        """
import ctypes
import os
import signal
import torch
from kernel_inputs import guarded

for at_end, beyond in ((True, 12), (False, -1)):
    x = guarded(torch.arange(12.0).view(3, 4), at_end)
    assert x.sum() == 66
    child = os.fork()
    if child == 0:
        ctypes.c_float.from_address(x.data_ptr() + 4 * beyond).value
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), (at_end, status)
    assert os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS), (at_end, status)
"""
    )


# ---- rows for one binary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [80, 257])
@pytest.mark.parametrize("layout", ROW_STRIDES)
def test_aligned_rows_keep_their_numbers(layout, hidden, dtype, device):
    x = drawer(0, dtype, device)(4, hidden)
    rows = aligned_rows(ROW_STRIDES[layout](x))
    assert same_bits(rows, x)
    assert rows.data_ptr() % 16 == 0
    assert rows.stride(1) == 1
    # Triton compiles for strides that are multiples of 16 and for others
    assert (rows.stride(0) % 16 == 0) == (hidden % 16 == 0)


def test_aligned_rows_are_not_copied_for_nothing(device):
    wide = drawer(0, torch.float16, device)(8, 160)
    for x in (wide, wide[2:5], wide[:, 80:], wide[::2], wide[3:4], wide[:, 16:17].contiguous()):
        assert aligned_rows(x) is x
    odd = drawer(0, torch.float16, device)(8, 72)
    assert aligned_rows(odd) is odd
    assert aligned_rows(odd[1:]) is not odd
    assert aligned_rows(odd[1:]).data_ptr() == odd[1:].data_ptr()


def test_a_step_is_512_bytes():
    """The order of the sums, and so every bit, hangs on it."""
    pointers = [SimpleNamespace(dtype=tl.pointer_type(dtype)) for dtype in (tl.float32, tl.float16, tl.bfloat16)]
    assert [elements(K_STEP_BYTES.value, pointer) for pointer in pointers] == [128, 256, 256]


# ---- where Triton launches


def test_operands_on_another_gpu_than_the_current_one_are_refused(monkeypatch):
    """Triton would launch on the current one: at best it finds that it cannot read them."""
    with pretended_gpus(monkeypatch, current=0):
        check_current(torch.device("cuda:0"))
        with pytest.raises(RuntimeError, match=r"^the operands are on cuda:1, but the current GPU is cuda:0, .*\(1\)"):
            launch_options(SimpleNamespace(device=torch.device("cuda:1")))
        with torch.cuda.device(1):
            check_current(torch.device("cuda:1"))
    check_current(torch.device("cpu"))


# ---- numbers for the device


@pytest.mark.parametrize("value", [0, 1, 17, 65535, 65536, 131071, 131072, 1 << 20, 1 << 40, (1 << 63) - 1])
def test_an_int_becomes_a_tensor_on_the_device(value, device):
    scalar = device_count(value, device)
    assert (scalar.dtype, scalar.shape, scalar.device.type) == (torch.int64, (1,), device.type)
    assert int(scalar) == value
    assert device_count(value, device).data_ptr() == scalar.data_ptr()  # nothing is uploaded again


def test_small_numbers_stay_where_they_are(device):
    """A captured graph has their addresses, whatever comes after it on that GPU or on another one."""
    numbers = [device_count(1 << bits, device) for bits in (0, 16, 17, 18, 19)]
    kept = [number.data_ptr() for number in numbers]
    del numbers
    for bits in range(16, 20):
        for other in (torch.device("meta"), device):
            device_count(1 << bits, other)
            device_count(1, torch.device("meta"))
    assert [device_count(1 << bits, device).data_ptr() for bits in (0, 16, 17, 18, 19)] == kept


def test_a_number_without_bound_takes_no_memory(device, monkeypatch):
    """Counting up to it would."""
    sizes = []
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *args, **settings: sizes.append(args[0]) or arange(*args, **settings))
    device_count(12_345_678_901, device)
    device_count(1 << 20, device)
    assert not sizes


def test_numbers_of_numpy_are_numbers(device):
    assert int(device_count(np.int64(70_001), device)) == 70_001
    assert int(device_seed(np.uint64((1 << 63) + 5), device)) == 5 - (1 << 63)


def test_a_tensor_stays_the_callers_own(device):
    position = torch.tensor([5], device=device)
    assert device_count(position, device) is position


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0xDEADBEEFCAFEF00D])
def test_a_seed_keeps_its_64_bits(seed, device):
    scalar = device_seed(seed, device)
    assert (scalar.dtype, scalar.shape, scalar.device.type) == (torch.int64, (1,), device.type)
    assert int(scalar) % (1 << 64) == seed


def test_frames_notice(device):
    """What the kernels' tests rest on."""
    frame = framed(torch.ones(2, 3, device=device))
    assert frame.frame_is_untouched()
    frame.inner.fill_(7)
    assert frame.frame_is_untouched()
    for row, column in ((0, 0), (1, 4), (1, 8), (3, 5)):
        touched = framed(torch.ones(2, 3, device=device))
        touched.buffer[row, column] = 1
        assert not touched.frame_is_untouched(), (row, column)


@pytest.mark.parametrize("name", ["qkv_rope", "attention"])
@pytest.mark.parametrize("position", [-1, CAPACITY - 2, CAPACITY, 1 << 40])
def test_a_position_without_room_is_refused(name, position, device):
    """Beyond the cache lies the next head's first row."""
    given = arguments(name, device)
    given["position"] = position
    with pytest.raises(ValueError, match=f"position {position} with 3 rows is outside of the {CAPACITY} positions"):
        launcher(name)(**given)


def test_a_position_on_the_device_beyond_the_cache_writes_nothing(device):
    given = arguments("qkv_rope", device)
    before = given["k_cache"].clone(), given["v_cache"].clone()
    for position in (CAPACITY, CAPACITY + 5, -3):
        launcher("qkv_rope")(**given | {"position": torch.tensor([position], device=device)})
    assert torch.equal(given["k_cache"], before[0])
    assert torch.equal(given["v_cache"], before[1])


def bad_biases(rows: int) -> dict[str, torch.Tensor]:
    return {
        "strided": torch.randn(2 * rows)[::2],
        "short": torch.randn(rows - 1),
        "of another dtype": torch.randn(rows).half(),
        "of two dimensions": torch.randn(rows, 1),
    }


@pytest.mark.parametrize("name", ["qkv_rope", "linear_residual", "gate_up"])
@pytest.mark.parametrize("kind", bad_biases(2))
def test_a_bias_that_does_not_fit_is_refused(name, kind, device):
    given = arguments(name, device)
    weight = given["weight"]
    given["weight"] = PackedWeight(weight, bad_biases(weight.shape[0])[kind].to(device), Layout.ROWS)
    with pytest.raises(ValueError, match=r"the bias is .* it must be \[\d+\] torch.float32 on \S+, stride 1"):
        launcher(name)(**given)


@pytest.mark.parametrize("caches", [(0, CAPACITY, HEAD_DIM), (KV_HEADS, CAPACITY, 0)])
def test_caches_of_no_heads_are_refused(caches, device):
    given = arguments("qkv_rope", device)
    given["k_cache"] = given["v_cache"] = torch.zeros(caches, device=device)
    with pytest.raises(ValueError, match=r"^qkv_rope: the weight has 64 rows.* two caches of H_kv heads of size D"):
        launcher("qkv_rope")(**given)


def test_gate_and_up_are_as_many(device):
    given = arguments("gate_up", device)
    given["weight"] = given["weight"][:-1]
    with pytest.raises(ValueError, match="as many for gate as for up"):
        launcher("gate_up")(**given)


def test_an_infinite_value_stays_alone(device):
    """Values are not turned: an infinity among them must not reach its neighbour as 0 times infinity."""
    given = arguments("qkv_rope", device)
    bias = torch.zeros(given["weight"].shape[0], device=device)
    bias[-1] = float("inf")  # the last value's
    given["weight"] = PackedWeight(given["weight"], bias, Layout.ROWS)
    launcher("qkv_rope")(**given)
    position = int(given["position"])
    written = given["v_cache"][-1, position : position + 3]
    assert torch.isinf(written[:, -1]).all()
    assert torch.isfinite(written[:, :-1]).all()
