"""Rows in flight that are a tree, and what the bits of their ``ancestors`` say.

Row m lies in slot ``position + m`` of the cache, whatever its place in the text. Bit j of ``ancestors[m]`` says that
row j of the tree is row m itself or stands before it on the way from the root. Row m is its own highest bit, so the
highest bit of the first row says how many rows of the tree lie before the rows in flight. The number of bits is the
row's place in the text: the root has one. A chain has 1, 3, 7, 15, ...

A tree with fewer rows than there is room for is filled up with rows that follow the one before them: a path that grows
costs ``attention`` nothing, and a token that no model says (-1) keeps ``walk`` away from them.
"""

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS


def seen_rows(ancestors: Tensor) -> Tensor:
    """``[M, MAX_ROWS]`` bool: which rows of the tree each row sees."""
    return (ancestors[:, None] >> torch.arange(MAX_ROWS, device=ancestors.device) & 1).bool()


def depths(ancestors: Tensor) -> Tensor:
    """``[M]`` int64: how far behind the root each row stands in the text."""
    return seen_rows(ancestors).sum(dim=1) - 1


def rows_ahead(ancestors: Tensor) -> int:
    """How many rows of the tree lie before the first one in flight."""
    return int(ancestors[0]).bit_length() - 1
