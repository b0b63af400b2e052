"""``straighten``: put the rows of the path that the target took where those of a chain would lie.

    store[:, position + i] = store[:, position + path[i]]    for i = 0, 1, ...

A path that begins with rows 0, 1, 2, ... is straight so far, and nothing moves. Bytes moved: twice the rows that move.
"""

from torch import Tensor

from kangaroo_kernels.shared.checks import check_straighten


def straighten(path: Tensor, position: int | Tensor, store: Tensor) -> None:
    """Move the rows of a path, in place.

    Args:
        path: ``[M]`` int64 from ``walk``: ascending, ``path[i] >= i``, and at most 16.
        position: where the root's row lies; a tensor ``[1]`` int64 for a kernel that must not ask the host.
        store: ``[B, T, K]``, rows contiguous along K: keys and values of any number of layers and heads, or hidden
            states.

    Raises:
        ValueError: a tensor of another shape, dtype or device; a position without room for the path.
    """
    check_straighten(path, position, store)
    first = int(position)
    for place, row in enumerate(path.tolist()):
        if row != place:
            store[:, first + place] = store[:, first + row]
