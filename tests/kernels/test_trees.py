"""Rows that are a tree: each has what it would have at the end of a chain of its own; on the kernels, to the bit."""

import random

import pytest
import torch
from torch import Tensor
from trees import CHAIN, STAR, TWO_BRANCHES, masks_of, path_of, shapes

from kangaroo_kernels import attention as attention_kernel
from kangaroo_kernels import qkv_rope as qkv_rope_kernel
from kangaroo_kernels import sample_head as sample_head_kernel
from kangaroo_kernels.reference import ancestors
from kangaroo_kernels.reference import attention as attention_reference
from kangaroo_kernels.reference import qkv_rope as qkv_rope_reference
from kangaroo_kernels.reference import sample_head as sample_head_reference
from kangaroo_kernels.reference.qkv_rope import rope_table
from kangaroo_kernels.shared.splits import count_splits

NAN = float("nan")
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 1, 16, 24
ATTENTION = pytest.mark.parametrize("op", [attention_reference, attention_kernel], ids=["reference", "kernel"])
QKV_ROPE = pytest.mark.parametrize("op", [qkv_rope_reference, qkv_rope_kernel], ids=["reference", "kernel"])
SAMPLE_HEAD = pytest.mark.parametrize("op", [sample_head_reference, sample_head_kernel], ids=["reference", "kernel"])
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def hold(op: object, ours: Tensor, wanted: Tensor) -> None:
    """Equal bits on a kernel; a reference may add in another order."""
    if "reference" in op.__name__:
        torch.testing.assert_close(ours, wanted, rtol=2e-3 if ours.dtype == torch.float16 else 1e-5, atol=1e-3)
    else:
        assert torch.equal(ours, wanted)


def draw(seed: int, dtype: torch.dtype, device: torch.device, *sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def test_bits_say_who_stands_where():
    parents = (0, 0, 1, 3, 2)
    masks = masks_of(parents)
    assert masks.tolist() == [1, 0b11, 0b101, 0b1011, 0b11011, 0b100101]
    assert ancestors.depths(masks).tolist() == [0, 1, 1, 2, 3, 2]
    assert [ancestors.rows_ahead(masks[row:]) for row in range(6)] == list(range(6))
    assert ancestors.seen_rows(masks)[4].nonzero().flatten().tolist() == path_of(parents, 4) == [0, 1, 3, 4]


# ---- attention


@ATTENTION
@HALVES
@pytest.mark.parametrize("root", [0, 60, 115, 250])
def test_a_row_attends_as_in_a_chain(device, op, dtype, root):
    """At the seams of tiles and splits; what lies behind the tree is NaN."""
    dice = random.Random(root)
    for parents in shapes(dice, 8)[::2] + shapes(dice, 8)[6:]:
        rows = len(parents) + 1
        q, keys, values = draw(rows, dtype, device, (rows, HEADS, HEAD_DIM), *[(KV_HEADS, root + 19, HEAD_DIM)] * 2)
        keys[:, root + rows :] = values[:, root + rows :] = NAN
        ours = op.attention(q, keys, values, root, scale=0.25, ancestors=masks_of(parents, device))
        for row in {rows - 1, dice.randrange(rows)}:
            path = path_of(parents, row)
            slots = [*range(root), *(root + each for each in path)]
            chain = (keys[:, slots], values[:, slots])
            wanted = op.attention(q[row : row + 1], *chain, root + len(path) - 1, scale=0.25)
            hold(op, ours[row : row + 1], wanted)


@ATTENTION
def test_rows_of_a_tree_in_parts(device, op):
    """As drafting runs them: the rows of the tree before the first one in flight are in the cache."""
    dice, root = random.Random(3), 120
    for parents in shapes(dice, 11)[4:]:
        rows, masks = len(parents) + 1, masks_of(parents, device)
        q, keys, values = draw(1, torch.float32, device, (rows, 2, 16), (1, root + rows, 16), (1, root + rows, 16))
        whole = op.attention(q, keys, values, root, scale=0.25, ancestors=masks)
        first = dice.randrange(rows)
        last = dice.randint(first + 1, rows)
        flight = slice(first, last)
        where = torch.tensor([root + first], device=device)
        hold(op, op.attention(q[flight], keys, values, where, scale=0.25, ancestors=masks[flight]), whole[flight])


@ATTENTION
def test_a_chain_may_say_so(device, op):
    """Its masks change no bit; a bound that leaves one split does not, either."""
    q, keys, values = draw(2, torch.float32, device, (16, 2, 16), (1, 140, 16), (1, 140, 16))
    for root in (40, 120):
        wanted = op.attention(q, keys, values, root, scale=0.25)
        hold(op, op.attention(q, keys, values, root, scale=0.25, ancestors=masks_of(CHAIN, device)), wanted)
        bound = {"max_length": max(128, root + 16), "ancestors": masks_of(STAR, device)}
        hold(
            op,
            op.attention(q, keys, values, root, scale=0.25, **bound),
            op.attention(q, keys, values, root, scale=0.25, ancestors=bound["ancestors"]),
        )


@pytest.mark.parametrize("group", [1, 7])
def test_packed_rows_and_blocks_of_a_paged_cache(device, group):
    """More packed rows than a program takes, and slots that a block table scatters."""
    root, size = 130, 16
    for parents in shapes(random.Random(group), 8)[2::2]:
        rows, masks = len(parents) + 1, masks_of(parents, device)
        heads = 2 * group
        q, keys, values = draw(group, torch.float16, device, (rows, heads, 16), (2, 160, 16), (2, 160, 16))
        ours = attention_kernel.attention(q, keys, values, root, scale=0.25, ancestors=masks)
        table = torch.randperm(160 // size, generator=torch.Generator().manual_seed(1))
        pools = []
        for cache in (keys, values):
            pool = torch.empty(160 // size, 2, size, 16, dtype=cache.dtype, device=device)
            pool[table] = cache.view(2, -1, size, 16).transpose(0, 1)
            pools.append(pool)
        blocks = table.int().to(device)
        paged = attention_kernel.attention(q, *pools, root, scale=0.25, ancestors=masks, block_table=blocks)
        assert torch.equal(paged, ours)
        for row in (0, rows - 1):
            path = path_of(parents, row)
            slots = [*range(root), *(root + each for each in path)]
            chain = q[row : row + 1], keys[:, slots], values[:, slots]
            wanted = attention_kernel.attention(*chain, root + len(path) - 1, scale=0.25)
            assert torch.equal(ours[row : row + 1], wanted)


def test_seams_are_crossed():
    """Or the tests above would not see the merge."""
    assert [count_splits(root + 16) for root in (0, 60, 115, 250)] == [1, 1, 2, 3]


# ---- qkv_rope


@QKV_ROPE
@HALVES
def test_rows_are_turned_by_their_places_and_kept_in_order(device, op, dtype):
    for parents in shapes(random.Random(5), 7)[::2]:
        rows, root, capacity = len(parents) + 1, 9, 40
        table = rope_table(1e4 ** -torch.linspace(0, 1, 4), capacity).to(device)
        x, norm, weight = draw(rows, dtype, device, (rows, HIDDEN), (HIDDEN,), (64, HIDDEN))
        caches = [torch.full((2, capacity, 8), NAN, dtype=dtype, device=device) for _ in range(2)]
        masks = masks_of(parents, device)
        first = rows // 3  # in two parts, the second from a position on the device
        q = torch.cat(
            [
                op.qkv_rope(
                    x[part], norm, weight, table, *caches, where, eps=1e-5, ancestors=masks[part].contiguous()
                ).clone()
                for part, where in (
                    (slice(0, max(first, 1)), root),
                    (slice(max(first, 1), None), torch.tensor([root + max(first, 1)], device=device)),
                )
                if len(x[part])
            ]
        )
        for row in range(rows):
            alone = [torch.full((2, capacity, 8), NAN, dtype=dtype, device=device) for _ in range(2)]
            place = root + len(path_of(parents, row)) - 1
            wanted = op.qkv_rope(x[row : row + 1], norm, weight, table, *alone, place, eps=1e-5)
            hold(op, q[row : row + 1], wanted)
            for cache, own in zip(caches, alone, strict=True):
                hold(op, cache[:, root + row], own[:, place])
        for cache in caches:
            assert cache[:, :root].isnan().all()
            assert cache[:, root + rows :].isnan().all()


# ---- sample_head


@SAMPLE_HEAD
@pytest.mark.parametrize("filters", [{}, {"top_k": 9}, {"top_p": 0.8}], ids=str)
def test_siblings_are_followed_by_the_noise_of_one_position(device, op, filters):
    for parents in shapes(random.Random(7), 8)[::3]:
        rows = len(parents) + 1
        x, norm, weight = draw(rows, torch.float32, device, (rows, HIDDEN), (HIDDEN,), (97, HIDDEN))
        settings = {"eps": 1e-5, "temperature": 2.0, "seed": 11, **filters}
        ours = op.sample_head(x, norm, weight, 20, ancestors=masks_of(parents, device), **settings)
        for row in range(rows):
            place = 20 + len(path_of(parents, row)) - 1
            wanted = op.sample_head(x[row : row + 1], norm, weight, place, **settings)
            assert int(ours.token[row]) == int(wanted.token)
            hold(op, ours.confidence[row : row + 1], wanted.confidence)


# ---- refusals


@pytest.mark.parametrize("op", [attention_reference, attention_kernel], ids=["reference", "kernel"])
@pytest.mark.parametrize(
    "bad", [torch.ones(2, dtype=torch.int32), torch.ones(3), torch.ones(6, dtype=torch.int32)[::2]], ids=str
)
def test_masks_that_do_not_fit(device, op, bad):
    q, keys, values = draw(1, torch.float32, device, (3, 4, 16), (2, 9, 16), (2, 9, 16))
    with pytest.raises(ValueError, match=r"attention: ancestors is .*; it must be \[3\] torch.int32"):
        op.attention(q, keys, values, 4, scale=0.25, ancestors=bad.to(device))


@pytest.mark.parametrize("first", [0, 3])
def test_a_tree_over_a_float16_cache(first):
    """The reference converts the cache as it is read; ``first`` rows of the tree are there already."""
    generator = torch.Generator().manual_seed(first)
    masks = masks_of(TWO_BRANCHES)[first:]
    q, *caches = (
        torch.randn(*shape, generator=generator) for shape in ((len(masks), 6, 16), (2, 230, 16), (2, 230, 16))
    )
    halves = [cache.half() for cache in caches]
    wanted = attention_reference.attention(
        q, *(cache.float() for cache in halves), 200 + first, scale=0.25, ancestors=masks
    )
    got = attention_reference.attention(q, *halves, 200 + first, scale=0.25, ancestors=masks)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
