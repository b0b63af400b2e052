"""Where the splits of ``attention`` lie: at absolute positions, the short ones first.

A short context then fills the card, and the partial sums of a long one stay small beside the cache.
"""

import triton
import triton.language as tl

# Positions of a split, and how many such splits there are: part of the contract (docs/kernels.md) and never tuned.
SHORT = tl.constexpr(128)
SHORT_SPLITS = tl.constexpr(32)
MIDDLE = tl.constexpr(256)
MIDDLE_SPLITS = tl.constexpr(48)
LONG = tl.constexpr(1024)


def count_splits(length: int) -> int:
    """How many splits the first ``length`` positions take."""
    short: int = SHORT.value * SHORT_SPLITS.value
    middle: int = MIDDLE.value * MIDDLE_SPLITS.value
    count: int = triton.cdiv(min(length, short), SHORT.value)
    count += triton.cdiv(max(0, min(length - short, middle)), MIDDLE.value)
    count += triton.cdiv(max(0, length - short - middle), LONG.value)
    return count


@triton.jit
def count_splits_of(length):
    """``count_splits`` on the device."""
    short = tl.minimum(length, SHORT * SHORT_SPLITS)
    middle = tl.minimum(tl.maximum(length - SHORT * SHORT_SPLITS, 0), MIDDLE * MIDDLE_SPLITS)
    long = tl.maximum(length - SHORT * SHORT_SPLITS - MIDDLE * MIDDLE_SPLITS, 0)
    return tl.cdiv(short, SHORT) + tl.cdiv(middle, MIDDLE) + tl.cdiv(long, LONG)


@triton.jit
def first_position(split):
    """Where a split begins."""
    short = tl.minimum(split, SHORT_SPLITS)
    middle = tl.minimum(tl.maximum(split - SHORT_SPLITS, 0), MIDDLE_SPLITS)
    long = tl.maximum(split - SHORT_SPLITS - MIDDLE_SPLITS, 0)
    return short * SHORT + middle * MIDDLE + long * LONG
