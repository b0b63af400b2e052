"""Where a position lies in a KV cache, contiguous or paged: the same arithmetic for ``qkv_rope`` and ``attention``.

Contiguous caches are ``[H_kv, T, D]``; paged ones ``[blocks, H_kv, block_size, D]`` with a block table
``[T / block_size]`` int32: position p is slot ``p % block_size`` of block ``block_table[p // block_size]``. The stride
along D is 1; all other strides are free.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CONTIGUOUS = 0
"""Stands for the block size of a cache that has no blocks."""


@triton.jit
def row_offsets(positions, mask, cache, table_ptr, BLOCK_SIZE: tl.constexpr):
    """Elements from a head's first row to the rows of ``positions``; 64-bit, as caches may exceed 2^31 elements."""
    if BLOCK_SIZE == 0:
        offsets = positions.to(tl.int64) * cache.row_stride
    else:
        block = tl.load(table_ptr + positions // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
        offsets = block * cache.block_stride + (positions % BLOCK_SIZE).to(tl.int64) * cache.row_stride
    return offsets


class CacheLayout(NamedTuple):
    """The strides of a cache, in elements, and its block size.

    Attributes:
        kv_heads: ``H_kv``.
        capacity: positions it holds.
        block_stride: from block to block; 0 for a contiguous cache.
        head_stride: from head to head.
        row_stride: from position to position within a block.
        block_size: positions per block; ``CONTIGUOUS`` if there are no blocks.
    """

    kv_heads: int
    capacity: int
    block_stride: int
    head_stride: int
    row_stride: int
    block_size: int


def cache_layout(op: str, cache: Tensor, block_table: Tensor | None, x: Tensor) -> CacheLayout:
    """Read the strides of ``cache`` and check it against what the kernels assume.

    Raises:
        ValueError: another number of dimensions than the block table asks for, or a stride along D that is not 1.
        TypeError: another dtype or device than those of ``x``, or a block table that is not int32 there.
    """
    if cache.dtype != x.dtype or cache.device != x.device:
        raise TypeError(
            f"{op}: x is {x.dtype} on {x.device}, the cache {cache.dtype} on {cache.device}; they must agree."
        )
    if cache.ndim and cache.stride(-1) != 1:
        raise ValueError(f"{op}: the cache has stride {cache.stride(-1)} along its last dimension; it must be 1.")
    if block_table is None:
        if cache.ndim != 3:
            raise ValueError(f"{op}: the cache is {list(cache.shape)}; without a block table it must be [H_kv, T, D].")
        return CacheLayout(cache.shape[0], cache.shape[1], 0, cache.stride(0), cache.stride(1), CONTIGUOUS)
    if cache.ndim != 4:
        raise ValueError(
            f"{op}: the cache is {list(cache.shape)}; with a block table it must be [blocks, H_kv, block_size, D]."
        )
    is_row = block_table.ndim == 1 and block_table.stride(0) == 1
    if not is_row or block_table.dtype != torch.int32 or block_table.device != x.device:
        raise TypeError(
            f"{op}: the block table is {list(block_table.shape)} {block_table.dtype} on {block_table.device}; "
            f"it must be one contiguous row of int32 on {x.device}."
        )
    size = cache.shape[2]
    blocks, heads, rows = cache.stride()[:3]
    return CacheLayout(cache.shape[1], len(block_table) * size, blocks, heads, rows, size)
