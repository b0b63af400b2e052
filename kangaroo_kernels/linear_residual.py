"""``linear_residual`` in Triton: the output or down projection plus the residual stream, or a projection alone.

A program owns ``BLOCK_N`` columns of the output. Bytes moved: ``N * K`` elements of weight, once.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.launch_config import launch_config
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import fetch_ahead, follow
from kangaroo_kernels.shared.launch import aligned_rows, check_operands, check_out, launch_options, weight_and_bias
from kangaroo_kernels.shared.operands import Linear, Matrix
from kangaroo_kernels.shared.tiles import BLOCK_M, add_bias, project, skipped


@triton.jit
def linear_residual_tile(tile, x, w, residual, out, BLOCK_N: tl.constexpr):
    """All rows of columns ``tile * BLOCK_N ..`` of ``out``."""
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    owned = tl.minimum(cols, w.rows - 1)  # the last tile's columns beyond the end repeat the last one
    acc = project(x, w, owned, BLOCK_N)
    if w.bias_ptr is not None:
        acc = add_bias(acc, w.bias_ptr, cols, w.rows)
    rows = tl.arange(0, BLOCK_M)
    mask = (rows[:, None] < out.rows) & (cols[None, :] < out.cols)
    if residual.ptr is not None:
        residual_ptrs = residual.ptr + rows[:, None] * residual.row_stride + cols[None, :]
        stream = tl.load(residual_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        acc = acc + stream.to(tl.float32)
    tl.store(out.ptr + rows[:, None] * out.row_stride + cols[None, :], acc.to(out.ptr.dtype.element_ty), mask=mask)


@stable_key
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["active_ptr"])
def linear_residual_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    out_ptr,  # [M, N], may be the residual itself
    active_ptr,  # [1] int32 or None
    M,
    N,
    K,
    x_row_stride,
    w_row_stride,
    residual_row_stride,
    out_row_stride,
    BLOCK_N: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program owns all rows of ``BLOCK_N`` columns of ``out``."""
    fetch_ahead(w_ptr, w_row_stride, N, K, active_ptr, BLOCK_N, CHAINED)
    follow(CHAINED)
    if skipped(active_ptr):
        return
    linear_residual_tile(
        tl.program_id(0),
        Matrix(x_ptr, M, K, x_row_stride),
        Linear(w_ptr, bias_ptr, N, K, w_row_stride),
        Matrix(residual_ptr, M, N, residual_row_stride),
        Matrix(out_ptr, M, N, out_row_stride),
        BLOCK_N,
    )


def linear_residual(
    x: Tensor,
    weight: Weight,
    residual: Tensor | None,
    *,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project and add; arguments and result as for ``reference.linear_residual``."""
    matrix, bias = weight_and_bias(weight)
    check_operands("linear_residual", x, None, matrix, active)
    x = aligned_rows(x)
    shape = (x.shape[0], matrix.shape[0])
    if residual is not None:
        check_out("linear_residual", residual, shape, x, name="residual")
    out = check_out("linear_residual", out, shape, x)
    config = launch_config("linear_residual", matrix.shape[0], matrix.shape[1], x)
    linear_residual_kernel[(triton.cdiv(matrix.shape[0], config.block_n),)](
        x,
        matrix,
        bias,
        residual,
        out,
        active,
        x.shape[0],
        matrix.shape[0],
        matrix.shape[1],
        x.stride(0),
        matrix.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x),
    )
    return out
