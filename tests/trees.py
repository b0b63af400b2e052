"""Random trees of drafts, what follows from their parents, and their rows beside the same rows of chains."""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels import attention, qkv_rope, sample_head
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.reference.qkv_rope import rope_table
from kangaroo_kernels.workloads import ModelShape

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


# ---- rows of a tree and of chains: pairs of results, which on a kernel have the same bits

NAN = float("nan")
SMALL = ModelShape("small", 24, 0, 2, 1, 16, 97, 1)
"""For Triton's interpreter."""

Pairs = Iterator[tuple[Tensor, Tensor]]


def draw(seed: int, dtype: torch.dtype, device: torch.device, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers, drawn where they will live."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]


def in_blocks(cache: Tensor, table: Tensor, size: int) -> Tensor:
    """A contiguous cache ``[H_kv, T, D]`` as a paged one whose blocks lie where ``table`` says."""
    heads, capacity, head_dim = cache.shape
    pool = cache.new_empty(capacity // size, heads, size, head_dim)
    pool[table] = cache.view(heads, -1, size, head_dim).transpose(0, 1)
    return pool


def attended(
    op: Any,
    shape: ModelShape,
    parents: Sequence[int],
    root: int,
    dtype: torch.dtype,
    device: torch.device,
    rows: Iterable[int],
    block_size: int = 0,
) -> Pairs:
    """``attention`` of these rows; what lies behind the tree is NaN. With a block size the tree's cache is paged."""
    count, granule = len(parents) + 1, block_size or 1
    capacity = (root + count + 18) // granule * granule
    cache = shape.kv_heads, capacity, shape.head_dim
    q, keys, values = draw(count, dtype, device, (count, shape.heads, shape.head_dim), cache, cache)
    keys[:, root + count :] = values[:, root + count :] = NAN
    caches, more, scale = (keys, values), {}, shape.head_dim**-0.5
    if block_size:
        table = torch.randperm(capacity // block_size, generator=torch.Generator().manual_seed(1)).to(device)
        caches, more = tuple(in_blocks(each, table, block_size) for each in caches), {"block_table": table.int()}
    ours = op.attention(q, *caches, root, scale=scale, ancestors=masks_of(parents, device), **more)
    for row in rows:
        path = path_of(parents, row)
        slots = [*range(root), *(root + each for each in path)]
        chain = q[row : row + 1], keys[:, slots], values[:, slots]
        yield ours[row : row + 1], op.attention(*chain, root + len(path) - 1, scale=scale)


def rotated(
    op: Any, shape: ModelShape, parents: Sequence[int], root: int, dtype: torch.dtype, device: torch.device
) -> Pairs:
    """``qkv_rope`` of all rows, in two parts, the second from a position on the device: queries, keys and values."""
    count, hidden, masks = len(parents) + 1, shape.hidden, masks_of(parents, device)
    capacity, (heads, kv_heads, head_dim) = root + count + 15, shape[3:6]
    table = rope_table(1e4 ** -torch.linspace(0, 1, head_dim // 2), capacity).to(device)
    columns = (heads + 2 * kv_heads) * head_dim
    x, norm, weight = draw(count, dtype, device, (count, hidden), (hidden,), (columns, hidden))
    weight *= hidden**-0.5

    def run(part: slice, place: int | Tensor, caches: Tensor, **more: Tensor) -> Tensor:
        return op.qkv_rope(x[part], norm, weight, table, *caches, place, eps=1e-5, **more)

    def empty() -> Tensor:
        return torch.full((2, kv_heads, capacity, head_dim), NAN, dtype=dtype, device=device)

    first, caches = max(count // 3, 1), empty()
    parts = [(slice(0, first), root), (slice(first, None), torch.tensor([root + first], device=device))]
    parts = [(part, place) for part, place in parts if len(x[part])]
    q = torch.cat([run(part, place, caches, ancestors=masks[part].contiguous()).clone() for part, place in parts])
    for row in range(count):
        alone, place = empty(), root + len(path_of(parents, row)) - 1
        yield q[row : row + 1], run(slice(row, row + 1), place, alone)
        yield caches[:, :, root + row], alone[:, :, place]
    untouched = caches[:, :, [*range(root), *range(root + count, capacity)]]
    assert untouched.isnan().all()


def sampled(
    op: Any, shape: ModelShape, parents: Sequence[int], dtype: torch.dtype, device: torch.device, **filters: float
) -> Pairs:
    """``sample_head`` of all rows: tokens and confidences."""
    count, hidden = len(parents) + 1, shape.hidden
    x, norm, weight = draw(count, dtype, device, (count, hidden), (hidden,), (shape.vocab_size, hidden))
    weight *= hidden**-0.5
    settings = {"eps": 1e-5, "temperature": 2.0, "seed": 11, **filters}
    ours = op.sample_head(x, norm, weight, 20, ancestors=masks_of(parents, device), **settings)
    for row in range(count):
        place = 20 + len(path_of(parents, row)) - 1
        wanted = op.sample_head(x[row : row + 1], norm, weight, place, **settings)
        yield ours.token[row : row + 1], wanted.token
        yield ours.confidence[row : row + 1], wanted.confidence


def hold_bits(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    trees: Iterable[Sequence[int]],
    roots: Sequence[int] = (0, 60, 115, 1000, 4090),
) -> None:
    """The kernels give every row of these trees, contiguous and paged, the bits that it has in a chain."""
    for parents in trees:
        for root, block_size in product(roots, (0, 16)):
            every = range(len(parents) + 1)
            for ours, wanted in attended(attention, shape, parents, root, dtype, device, every, block_size):
                assert torch.equal(ours, wanted), ("attention", parents, root, block_size)
        for ours, wanted in rotated(qkv_rope, shape, parents, roots[-1], dtype, device):
            assert torch.equal(ours, wanted), ("qkv_rope", parents)
        for ours, wanted in sampled(sample_head, shape, parents, dtype, device):
            assert torch.equal(ours, wanted), ("sample_head", parents)
