"""Random trees of drafts, and what follows from their parents."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS

CHAIN = tuple(range(MAX_ROWS - 1))
STAR = (0,) * (MAX_ROWS - 1)
TWO_BRANCHES = (0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)


def random_parents(dice: random.Random, drafts: int) -> tuple[int, ...]:
    """The row that each draft follows, 0 for the newest token; bushy or lanky by turns."""
    reach = dice.choice((1, 2, 4, MAX_ROWS))
    return tuple(dice.randint(max(0, row - reach), row) for row in range(drafts))


def shapes(dice: random.Random, count: int) -> list[tuple[int, ...]]:
    """So many trees of all sizes, the extreme ones first."""
    some = [CHAIN, STAR, TWO_BRANCHES, (), (0,), (0, 0)]
    return some + [random_parents(dice, dice.randint(1, MAX_ROWS - 1)) for _ in range(count - len(some))]


def path_of(parents: Sequence[int], row: int) -> list[int]:
    """The rows from the root to ``row``."""
    return [*path_of(parents, parents[row - 1]), row] if row else [0]


def masks_of(parents: Sequence[int], device: torch.device | None = None) -> Tensor:
    """``ancestors`` of a tree, ``[R + 1]`` int32."""
    masks = [sum(1 << each for each in path_of(parents, row)) for row in range(len(parents) + 1)]
    return torch.tensor(masks, dtype=torch.int32, device=device)
