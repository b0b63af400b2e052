"""Bits of the ``ancestors`` of rows that are a tree, on the device; ``reference/ancestors.py`` says what they mean."""

import triton
import triton.language as tl

from kangaroo_kernels.contract import MAX_ROWS

ROWS = tl.constexpr(MAX_ROWS)


@triton.jit
def count_bits(mask):
    """How many of the lowest 16 bits are set: in pairs, fours and eights side by side."""
    pairs = mask - ((mask >> 1) & 0x5555)
    fours = (pairs & 0x3333) + ((pairs >> 2) & 0x3333)
    eights = (fours + (fours >> 4)) & 0x0F0F
    return (eights + (eights >> 8)) & 0x1F


@triton.jit
def rows_ahead(mask):
    """The number of the highest of 16 bits: for the first row in flight, the rows of the tree that lie before it."""
    mask |= mask >> 1
    mask |= mask >> 2
    mask |= mask >> 4
    mask |= mask >> 8
    return count_bits(mask) - 1


@triton.jit
def slots_of(positions, root, path):
    """Where the cache holds the positions of the text along a path, the rows of which are the bits of ``path``.

    Before the root a position is its own slot; beyond the path's end it is not looked for.
    """
    slots = positions
    place = root
    for row in tl.static_range(ROWS):
        on_path = (path >> row) & 1
        slots = tl.where((on_path != 0) & (positions == place), root + row, slots)
        place += on_path
    return slots


@triton.jit
def places_of(rows, M, ancestors_ptr):
    """How far behind the first row each of ``rows`` stands in the text: of a tree, siblings stand side by side."""
    places = rows
    if ancestors_ptr is not None:
        places = count_bits(tl.load(ancestors_ptr + rows, mask=rows < M, other=1)) - 1
    return places
