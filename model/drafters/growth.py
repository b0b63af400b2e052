"""The shape of a tree of drafts: how many rows each round adds, and which row each follows."""

from collections.abc import Iterator, Sequence

from kangaroo_kernels.contract import MAX_CHILDREN


def widths(rows: int, rounds: int) -> Iterator[int]:
    """How many rows each round may add: ``rows`` in all, shared out evenly, the first rounds having more."""
    rounds = min(rows, rounds)
    for index in range(rounds):
        yield min(MAX_CHILDREN, rows // rounds + (index < rows % rounds))


def parents_of(ancestors: Sequence[int]) -> tuple[int, ...]:
    """The row that each row but the first follows: the highest of its ancestors beside itself."""
    return tuple((mask ^ (1 << row)).bit_length() - 1 for row, mask in enumerate(ancestors) if row)
