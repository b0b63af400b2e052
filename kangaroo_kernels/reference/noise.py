"""Counter-based Gumbel noise: a pure function of seed, stream, position and token.

    bits = philox4x32_10(key=seed, counter=(token // 4, position, stream, 0))[token % 4]
    u = ((bits >> 9) + 0.5) / 2^23;  gumbel = -log(-log(u))

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) is the generator of ``tl.philox``, so a
kernel can make the same bits in registers. ``argmax(logits / T + gumbel)`` is a sample of ``softmax(logits / T)``
(Gumbel-max). With the same noise, drafter and target agree the more often, the more alike their distributions are.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS

ROUNDS = 10
BLOCK = 8
"""Positions whose noise is made at a time: about as many as a step looks at."""
KEPT = 20
"""Blocks that are kept, each of 32 bytes a token of the vocabulary: those of ten texts that take turns, two each (of
five with rejection sampling, which has two streams)."""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: Tensor, seed: int) -> Tensor:
    """Ten rounds of Philox-4x32.

    Args:
        counter: ``[4, ...]`` int64, each below 2^32.
        seed: the 64-bit key.

    Returns:
        ``[4, ...]`` int64, each below 2^32.
    """
    multiplier = torch.tensor(_MULTIPLIERS, device=counter.device).view(2, *[1] * (counter.ndim - 1))
    even, odd = counter[0::2], counter[1::2]
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(ROUNDS):
        product = even * multiplier  # wraps modulo 2^64; the shift below copies the sign, the mask takes it off again
        low, high = product & _MASK, (product >> 32) & _MASK
        keys = torch.tensor(key, device=counter.device).view_as(multiplier)
        even, odd = high.flip(0) ^ odd ^ keys, low.flip(0)
        key = [(part + weyl) & _MASK for part, weyl in zip(key, _WEYL, strict=True)]
    return torch.stack((even, odd), dim=1).flatten(0, 1)


def uniform(seed: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """Uniform numbers in the open interval (0, 1), 23 bits each.

    Args:
        seed: 64-bit.
        stream: tells apart the uses of one position.
        positions: ``[P]`` int64.
        count: numbers per position.

    Returns:
        ``[P, count]`` float32.
    """
    words = torch.arange((count + 3) // 4, device=positions.device).expand(len(positions), -1)
    counter = torch.stack(
        (words, positions[:, None].expand_as(words), torch.full_like(words, stream), torch.zeros_like(words))
    )
    bits = philox4x32(counter, seed).permute(1, 2, 0).flatten(1)[:, :count]
    return ((bits >> 9).float() + 0.5) / (1 << 23)  # 23 bits and a half: one bit more would round up to 1


def gumbel(seed: int, stream: int, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, ``[P, vocab_size]`` float32; arguments as for ``uniform``."""
    return uniform(seed, stream, positions, vocab_size).log_().neg_().log_().neg_()


@lru_cache(maxsize=KEPT)
def _gumbel_block(seed: int, stream: int, block: int, vocab_size: int, device: torch.device) -> Tensor:
    positions = torch.arange(block * BLOCK, (block + 1) * BLOCK, device=device)
    return gumbel(seed, stream, positions, vocab_size)


def gumbel_rows(seed: int, stream: int, position: int, rows: int, vocab_size: int, device: torch.device) -> Tensor:
    """``gumbel`` for ``position, position + 1, ...``: ``[rows, vocab_size]``, not to be written to.

    It is made in blocks that are kept: drafting, verification and rejected steps ask for the same positions again.
    """
    if rows > MAX_ROWS:  # a prefill, whose noise is not asked for again
        return gumbel(seed, stream, torch.arange(position, position + rows, device=device), vocab_size)
    first, last = position // BLOCK, (position + rows - 1) // BLOCK
    blocks = [_gumbel_block(seed, stream, block, vocab_size, device) for block in range(first, last + 1)]
    noise = blocks[0] if first == last else torch.cat(blocks)
    return noise[position - first * BLOCK : position - first * BLOCK + rows]
