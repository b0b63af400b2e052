"""``straighten`` in Triton: move the rows of the path that the target took to where those of a chain would lie.

A program owns one of B and a chunk of K: it reads all rows of the path before it writes any. Where the path is straight
it reads nothing but the path. Bytes moved: twice the rows that move.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_straighten
from kangaroo_kernels.shared.launch import device_count, launch_options, require_interpreter
from kangaroo_kernels.shared.tiles import BLOCK_M

COLUMNS = 256
"""The most columns of a program's tile: 8 KB of 16 rows in 16 bits."""


@stable_key
@triton.jit(do_not_specialize=["M", "T"], do_not_specialize_on_alignment=["path_ptr", "position_ptr"])
def straighten_kernel(
    path_ptr,  # [M] int64
    position_ptr,  # [1] int64
    store_ptr,  # [B, T, K]
    M,
    T,
    K,
    batch_stride,
    row_stride,
    BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program moves ``BLOCK_K`` columns of one of B."""
    follow(CHAINED)
    rows = tl.arange(0, BLOCK_M)
    path = tl.load(path_ptr + rows, mask=rows < M, other=0).to(tl.int32)
    moves = (rows < M) & (path != rows)
    if tl.max(moves.to(tl.int32), axis=0) == 0:
        return
    position = tl.load(position_ptr)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    base_ptr = store_ptr + tl.program_id(0).to(tl.int64) * batch_stride + cols[None, :]
    inside = position + tl.maximum(path, rows) < T
    mask = (moves & inside)[:, None] & (cols < K)[None, :]
    moved = tl.load(base_ptr + (position + path)[:, None] * row_stride, mask=mask)
    tl.debug_barrier()  # everything is read before anything is written
    tl.store(base_ptr + (position + rows)[:, None] * row_stride, moved, mask=mask)


def straighten(path: Tensor, position: int | Tensor, store: Tensor) -> None:
    """Move the rows of a path, in place; arguments as for ``reference.straighten``."""
    require_interpreter("straighten", store)
    check_straighten(path, position, store)
    batch, capacity, width = store.shape
    block = min(COLUMNS, triton.next_power_of_2(width))
    straighten_kernel[(batch, triton.cdiv(width, block))](
        path,
        device_count(position, store.device),
        store,
        path.shape[0],
        capacity,
        width,
        store.stride(0),
        store.stride(1),
        BLOCK_K=block,
        num_warps=4,
        **launch_options(store),
    )
