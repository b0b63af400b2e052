"""What the launchers share: they check arguments against what the kernels assume, and never wait for the device."""

from functools import cache, lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from kangaroo_kernels.contract import MAX_ROWS, seed_bits
from kangaroo_kernels.packed_weight import Layout, PackedWeight, Weight
from kangaroo_kernels.shared.chain import chain
from kangaroo_kernels.shared.checks import check_one, check_tensor, is_whole

COUNTED = 1 << 20
"""Numbers of at least this size, such as a length that means "no limit", are kept on the device one by one."""

UNFUSED = {"enable_fp_fusion": False}
"""Every kernel is compiled so: no multiplication and addition become one instruction that rounds once. The compiler
would fuse a sum of two products now with the one, now with the other, and variants of a kernel would differ in bits."""

VECTOR_BYTES = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def launch_options(x: Tensor) -> dict[str, Any]:
    """What every launch on the device of ``x`` is given beside its configuration."""
    check_current(x.device)
    return UNFUSED | chain(x)


def check_current(device: torch.device) -> None:
    """Raise for a GPU that is not the current one: Triton launches there, wherever the operands lie."""
    if device.type == "cuda" and device.index != (current := torch.cuda.current_device()):
        raise RuntimeError(
            f"the operands are on {device}, but the current GPU is cuda:{current}, and Triton launches there; call the "
            f"operation within torch.cuda.device({device.index})."
        )


def check_rows(op: str, x: Tensor) -> None:
    """Raise unless the kernels take the rows and the dtype of ``x`` ``[M, ...]`` and can run where it lies."""
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"{op} takes 1 to {MAX_ROWS} rows, got {x.shape[0]}; its reference takes any number.")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op} takes float32, float16 or bfloat16, got {x.dtype}.")
    require_interpreter(op, x)


def require_interpreter(op: str, x: Tensor) -> None:
    """Raise for tensors on the CPU unless Triton's interpreter is on."""
    if x.device.type == "cpu" and not knobs.runtime.interpret:
        raise RuntimeError(
            f"{op} got tensors on the CPU, where Triton's interpreter runs it: set TRITON_INTERPRET=1 in the "
            "environment before Python starts, or call its reference."
        )


def check_flag(op: str, active: Tensor | None, device: torch.device) -> None:
    """Raise unless a drafting step's flag is ``[1]`` int32 on ``device``, or there is none."""
    if active is not None:
        check_one(op, "active", active, torch.int32, device)


def check_operands(
    op: str, x: Tensor, norm_weight: Tensor | None, matrix: Tensor, active: Tensor | None = None
) -> None:
    """Raise unless ``x`` ``[M, K]``, the norm's ``[K]`` and the matrix ``[N, K]`` fit each other and the kernels."""
    if x.ndim != 2 or matrix.ndim != 2 or x.shape[1] != matrix.shape[1]:
        raise ValueError(
            f"{op}: x is {list(x.shape)} and the weight {list(matrix.shape)}; they must be [M, K], [N, K]."
        )
    check_rows(op, x)
    if matrix.stride(1) != 1:
        raise ValueError(f"{op}: the weight's rows have stride {matrix.stride(1)} along K; it must be 1.")
    if norm_weight is not None and (norm_weight.shape != x.shape[1:] or norm_weight.stride(0) != 1):
        raise ValueError(
            f"{op}: the norm's weight is {list(norm_weight.shape)}; it must be [{x.shape[1]}], contiguous."
        )
    for name, operand in (("norm's weight", norm_weight), ("weight", matrix)):
        if operand is not None and (operand.dtype != x.dtype or operand.device != x.device):
            raise TypeError(
                f"{op}: x is {x.dtype} on {x.device}, the {name} {operand.dtype} on {operand.device}; they must agree."
            )
    check_flag(op, active, x.device)


def aligned_rows(x: Tensor) -> Tensor:
    """``x`` ``[M, K]`` itself, or a copy where its address or row stride would make Triton compile another binary.

    Rows from the middle of a buffer may begin at any address when K is odd; the contract (docs/kernels.md) asks for one
    binary for them all.
    """
    stride, width = x.stride(0), x.shape[1]
    same_class = stride == width or stride % VECTOR_BYTES == width % VECTOR_BYTES == 0
    if x.stride(1) == 1 and same_class and x.data_ptr() % VECTOR_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def check_out(op: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor, name: str = "out") -> Tensor:
    """``out`` if it has ``shape`` and the dtype and device of ``like``, a new tensor if it is None."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    check_tensor(op, name, out, shape, like.dtype, like.device)
    return out


def weight_and_bias(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """The row-major matrix and the bias of a weight that the kernels can read."""
    if not isinstance(weight, PackedWeight):
        return weight, None
    if weight.layout is not Layout.ROWS:
        raise ValueError(f"the weight is packed as {weight.layout.name}; the kernels read Layout.ROWS.")
    matrix, bias = weight.rows, weight.bias
    if bias is not None:
        wanted = (matrix.shape[0],)
        if bias.shape != wanted or bias.stride(0) != 1 or (bias.dtype, bias.device) != (matrix.dtype, matrix.device):
            raise ValueError(
                f"the bias is {list(bias.shape)} {bias.dtype} on {bias.device}, stride {bias.stride()}; "
                f"for this weight it must be {list(wanted)} {matrix.dtype} on {matrix.device}, stride 1."
            )
    return matrix, bias


def check_position(op: str, position: int | Tensor, rows: int, room: int, device: torch.device) -> None:
    """Raise where a position that the host knows leaves no room for ``rows``; on the device, kernels mask."""
    if isinstance(position, Tensor):
        check_one(op, "position", position, torch.int64, device)
    elif not is_whole(position):
        raise TypeError(f"{op}: position is {position!r}; it must be a whole number, or [1] int64 on {device}.")
    elif not 0 <= position <= room - rows:
        raise ValueError(
            f"{op}: position {position} with {rows} rows is outside of the {room} positions that the cache holds."
        )


@cache
def _counting(length: int, device: torch.device) -> Tensor:
    """Kept for good: a captured graph has its address. There are five lengths, of 16 MB together on a device."""
    return torch.arange(length, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _kept_count(value: int, device: torch.device) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def device_count(value: int | Tensor, device: torch.device) -> Tensor:
    """A count or position as ``[1]`` int64 on the device: the caller's, or a slice of 0, 1, 2, ... kept there."""
    if isinstance(value, Tensor):
        return value
    value = index(value)
    if value >= COUNTED:
        return _kept_count(value, device)
    return _counting(1 << max(16, value.bit_length()), device)[value : value + 1]


def device_number(value: float | Tensor, device: torch.device) -> Tensor:
    """A threshold, temperature or share as ``[1]`` float32 on the device: the caller's tensor, or one kept there."""
    return value if isinstance(value, Tensor) else _kept_number(value, device)


@lru_cache(maxsize=64)
def _kept_number(value: float, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=device)  # on the device: no copy from the host


def device_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """A 64-bit seed as ``[1]`` int64 on the device, bit for bit: the caller's tensor, or one kept there."""
    return seed if isinstance(seed, Tensor) else _kept_count(seed_bits(seed), device)
