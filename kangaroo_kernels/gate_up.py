"""``gate_up`` in Triton: RMSNorm, the gate and up projections, ``silu(gate) * up``; the reference has the formula.

A program owns ``BLOCK_N`` columns of the output and streams their gate and up rows together, so neither gate nor up is
ever written. Bytes moved: ``2 * I * K`` elements of weight, once; ``x`` comes from the L2.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.launch_config import launch_config
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import fetch_ahead, follow
from kangaroo_kernels.shared.launch import aligned_rows, check_operands, check_out, launch_options, weight_and_bias
from kangaroo_kernels.shared.operands import Linear, Matrix, Norm
from kangaroo_kernels.shared.tiles import BLOCK_M, add_bias, norm_project, skipped


@triton.jit
def gate_up_tile(tile, x, norm, w, out, BLOCK_N: tl.constexpr):
    """All rows of columns ``tile * BLOCK_N ..`` of ``out``; ``w`` has the gate rows first."""
    I = out.cols
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # gate and up rows alternate: one tile and one product give both halves of a column, in the same thread
    pairs = tl.arange(0, 2 * BLOCK_N)
    owned = tl.minimum(tile * BLOCK_N + pairs // 2, I - 1) + pairs % 2 * I
    acc = norm_project(x, norm, w, owned, 2 * BLOCK_N)
    gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
    if w.bias_ptr is not None:
        gate = add_bias(gate, w.bias_ptr, cols, I)
        up = add_bias(up, w.bias_ptr + I, cols, I)
    rows = tl.arange(0, BLOCK_M)
    mask = (rows[:, None] < out.rows) & (cols[None, :] < I)
    values = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out.ptr + rows[:, None] * out.row_stride + cols[None, :], values.to(out.ptr.dtype.element_ty), mask=mask)


@stable_key
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["active_ptr"])
def gate_up_kernel(
    x_ptr,  # [M, K]
    norm_ptr,  # [K]
    w_ptr,  # [2 * I, K], gate rows first
    bias_ptr,  # [2 * I] or None
    out_ptr,  # [M, I]
    active_ptr,  # [1] int32 or None
    M,
    I,
    K,
    x_row_stride,
    w_row_stride,
    out_row_stride,
    eps,
    BLOCK_N: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns all rows of ``BLOCK_N`` columns of ``out``."""
    fetch_ahead(w_ptr, w_row_stride, I, K, active_ptr, BLOCK_N, CHAINED)
    # Triton makes a constant of an I that is 1; the cast makes a tensor of it
    fetch_ahead(w_ptr + tl.cast(I, tl.int64) * w_row_stride, w_row_stride, I, K, active_ptr, BLOCK_N, CHAINED)
    follow(CHAINED)
    if skipped(active_ptr):
        return
    gate_up_tile(
        tl.program_id(0),
        Matrix(x_ptr, M, K, x_row_stride),
        Norm(norm_ptr, eps),
        Linear(w_ptr, bias_ptr, 2 * I, K, w_row_stride),
        Matrix(out_ptr, M, I, out_row_stride),
        BLOCK_N,
    )


def gate_up(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    *,
    eps: float,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The MLP up to its down projection; arguments and result as for ``reference.gate_up``."""
    matrix, bias = weight_and_bias(weight)
    check_operands("gate_up", x, norm_weight, matrix, active)
    if matrix.shape[0] % 2:
        raise ValueError(f"gate_up: the weight has {matrix.shape[0]} rows; it must have as many for gate as for up.")
    inner = matrix.shape[0] // 2
    x = aligned_rows(x)
    out = check_out("gate_up", out, (x.shape[0], inner), x)
    config = launch_config("gate_up", inner, matrix.shape[1], x)
    gate_up_kernel[(triton.cdiv(inner, config.block_n),)](
        x,
        norm_weight,
        matrix,
        bias,
        out,
        active,
        x.shape[0],
        inner,
        matrix.shape[1],
        x.stride(0),
        matrix.stride(0),
        out.stride(0),
        eps,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x),
    )
    return out
