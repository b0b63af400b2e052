"""How rows attend to tiles of positions: those of a chain one tile after the other, those of a tree path by path.

Rows of a tree share the tiles before the tree. The tiles that reach into it are gone through once for each path from
the root to a leaf, keys and values gathered in the order of the text, and each row takes part in one path. So it adds
up what a row of a chain would, in the same tiles, and has the same bits, wherever the rows of its path lie.
"""

import triton
import triton.language as tl

from kangaroo_kernels.shared.ancestors import count_bits, rows_ahead, slots_of
from kangaroo_kernels.shared.cache_layout import row_offsets

TILE_BYTES = tl.constexpr(128)
"""A tile has as many positions as elements fill this many bytes: 64, or 32 in float32. Part of the contract."""


@triton.jit
def attend(tile, sight, queries, scale, heads, caches, columns, so_far):
    """A tile of positions: the maximum, denominator and sum ``so_far`` of each row, moved on.

    Args:
        tile: where the cache holds the positions; the positions; which of them are written.
        sight: a position, and how far beyond it each row sees. A row that sees none of the tile keeps its three
            numbers, to the bit.
        queries: ``[BLOCK_R, BLOCK_D]``.
        scale: of the scores, times log2(e).
        heads: where the head's keys and values begin.
        caches: the bundle.
        columns: those of D, and which of them there are.
        so_far: maximum, denominator and sum.
    """
    slots, positions, written = tile
    position, rows = sight
    k_head_ptr, v_head_ptr = heads
    dims, dim_mask = columns
    best, denominator, acc = so_far
    mask = written[:, None] & dim_mask[None, :]  # memory beyond may hold NaN, and 0 * NaN is NaN
    k_rows = row_offsets(slots, written, caches.k, caches.table_ptr, caches.BLOCK_SIZE)
    k_ptrs = k_head_ptr + k_rows[:, None] + dims[None, :]
    k = tl.load(k_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
    seen = positions[None, :] <= position + rows[:, None]
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, axis=1))
    # for a row that has seen nothing yet, -inf - -inf would be NaN; with pivot 0 it stays exactly as it is
    pivot = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp2(best - pivot)
    weights = tl.exp2(scores - pivot[:, None])
    v_rows = row_offsets(slots, written, caches.v, caches.table_ptr, caches.BLOCK_SIZE)
    v_ptrs = v_head_ptr + v_rows[:, None] + dims[None, :]
    v = tl.load(v_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    denominator = denominator * fade + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return higher, denominator, acc


@triton.jit
def attend_to_a_tree(
    bounds, flight, ancestors_ptr, query, heads, caches, columns, so_far, BLOCK_T: tl.constexpr, STAGES: tl.constexpr
):
    """All tiles of a split, for rows of a tree; ``query``, ``heads``, ``caches``, ``columns`` as for ``attend``.

    Args:
        bounds: where the split begins and ends; where the slots that are written end.
        flight: the first row's slot, the row in flight of each packed row, and M.
        ancestors_ptr: ``[M]`` int32.
        so_far: maximum, denominator and sum of rows that have seen nothing.
        BLOCK_T: positions of a tile.
        STAGES: as for ``attention_split``.
    """
    start, end, length = bounds
    slot, rows, M = flight
    queries, scale = query
    best, denominator, acc = so_far
    ahead = rows_ahead(tl.load(ancestors_ptr))
    root = slot - ahead
    shared = root // BLOCK_T * BLOCK_T  # where the first tile begins that reaches into the tree
    for first in tl.range(start, tl.minimum(end, shared), BLOCK_T, num_stages=STAGES):
        positions = first + tl.arange(0, BLOCK_T)
        tile, sight = (positions, positions, positions < root), (root, rows)
        best, denominator, acc = attend(tile, sight, queries, scale, heads, caches, columns, (best, denominator, acc))
    parents = 0
    for row in range(M):
        parents |= tl.load(ancestors_ptr + row) ^ (1 << (ahead + row))
    # tiles and leaves in one loop: two loops, one inside the other, keep more values alive than there are registers;
    # a tile or two leave a pipeline nothing to do but to take some, too
    begin, done = tl.maximum(start, shared), 0
    for turn in tl.range(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_T) * M, num_stages=1, disable_licm=True):
        leaf, first = turn % M, begin + turn // M * BLOCK_T
        path = tl.load(ancestors_ptr + leaf)
        reached = root + count_bits(path)
        done = tl.where(leaf == 0, 0, done)
        if ((parents >> (ahead + leaf)) & 1 == 0) & (first < reached):
            positions = first + tl.arange(0, BLOCK_T)
            slots = slots_of(positions, root, path)
            tile = slots, positions, (positions < reached) & (slots < length)
            depths = count_bits(path & ((2 << (ahead + rows)) - 1)) - 1  # of the rows that lie on the path
            takes_part = ((path & ~done) >> (ahead + rows)) & 1 != 0
            sight = root, tl.where(takes_part, depths, -root - 1)
            best, denominator, acc = attend(
                tile, sight, queries, scale, heads, caches, columns, (best, denominator, acc)
            )
            done |= path
    return best, denominator, acc
