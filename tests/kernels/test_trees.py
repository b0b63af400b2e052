"""Rows that are a tree: each has what it would have at the end of a chain of its own; on the kernels, to the bit."""

import random

import pytest
import torch
from torch import Tensor
from trees import (
    CHAIN,
    SMALL,
    STAR,
    TWO_BRANCHES,
    attended,
    draw,
    hold_bits,
    masks_of,
    path_of,
    random_parents,
    rotated,
    sampled,
    shapes,
)

from kangaroo_kernels import attention as attention_kernel
from kangaroo_kernels import qkv_rope as qkv_rope_kernel
from kangaroo_kernels import sample_head as sample_head_kernel
from kangaroo_kernels.reference import ancestors
from kangaroo_kernels.reference import attention as attention_reference
from kangaroo_kernels.reference import qkv_rope as qkv_rope_reference
from kangaroo_kernels.reference import sample_head as sample_head_reference
from kangaroo_kernels.shared.splits import count_splits
from kangaroo_kernels.workloads import ModelShape

MIDDLE = [ModelShape(f"heads of {dim}", 512, 1408, 512 // dim, kv, dim, 8192, 2) for dim, kv in ((64, 2), (128, 4))]
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
        rows = {len(parents), dice.randrange(len(parents) + 1)}
        for ours, wanted in attended(op, SMALL, parents, root, dtype, device, rows):
            hold(op, ours, wanted)


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
    shape = SMALL._replace(heads=2 * group, kv_heads=2)
    for parents in shapes(random.Random(group), 8)[2::3]:
        for block_size in (0, 16):
            given = shape, parents, 130, torch.float16, device, {0, len(parents)}, block_size
            for ours, wanted in attended(attention_kernel, *given):
                assert torch.equal(ours, wanted)


def test_seams_are_crossed():
    """Or the tests above would not see the merge."""
    assert [count_splits(root + 16) for root in (0, 60, 115, 250)] == [1, 1, 2, 3]


# ---- qkv_rope


@QKV_ROPE
@HALVES
def test_rows_are_turned_by_their_places_and_kept_in_order(device, op, dtype):
    for parents in shapes(random.Random(5), 7)[::2]:
        for ours, wanted in rotated(op, SMALL, parents, 9, dtype, device):
            hold(op, ours, wanted)


# ---- sample_head


@SAMPLE_HEAD
@pytest.mark.parametrize("filters", [{}, {"top_k": 9}, {"top_p": 0.8}], ids=str)
def test_siblings_are_followed_by_the_noise_of_one_position(device, op, filters):
    for parents in shapes(random.Random(7), 8)[::3]:
        for ours, wanted in sampled(op, SMALL, parents, torch.float32, device, **filters):
            hold(op, ours, wanted)


# ---- all three, at small and middle sizes; tests/gpu has real ones


SIZES = [SMALL] + [pytest.param(each, marks=pytest.mark.gpu) for each in MIDDLE]


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: shape.name)
@torch.inference_mode()
def test_every_rows_bits(device, shape):
    if device.type == "cpu":
        hold_bits(shape, device, torch.float32, [TWO_BRANCHES[:5], random_parents(random.Random(2), 6)], (125,))
    else:
        hold_bits(shape, device, torch.bfloat16, shapes(random.Random(0), 12))


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
