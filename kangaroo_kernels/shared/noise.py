"""The noise of ``reference.noise`` in registers: the same bits, a function of seed, stream, position and token."""

import triton
import triton.language as tl


@triton.jit
def gumbel_tile(seed, stream, positions, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Standard Gumbel noise for ``positions`` [BLOCK_M] and BLOCK_N tokens from ``first`` on, both multiples of 4."""
    return gumbel_words(seed, stream, positions, first // 4 + tl.arange(0, BLOCK_N // 4), BLOCK_M, BLOCK_N)


@triton.jit
def gumbel_words(seed, stream, positions, words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for any fours of tokens: ``words`` [BLOCK_N / 4] are the first token of each, divided by 4."""
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), dtype=tl.uint32)
    c0 = zero + words[None, :].to(tl.uint32)
    c1 = zero + positions[:, None].to(tl.uint32)
    b0, b1, b2, b3 = tl.philox(seed, c0, c1, zero + stream.to(tl.uint32), zero)
    # token % 4 picks the word, so the four lie side by side
    return gumbel_from(tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), (BLOCK_M, BLOCK_N)))


@triton.jit
def gumbel_of(seed, stream, positions, tokens, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for any ``tokens`` [BLOCK_N], four times as much work a token."""
    zero = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.uint32)
    c0 = zero + (tokens // 4)[None, :].to(tl.uint32)
    c1 = zero + positions[:, None].to(tl.uint32)
    b0, b1, b2, b3 = tl.philox(seed, c0, c1, zero + stream.to(tl.uint32), zero)
    word = (tokens % 4)[None, :]
    return gumbel_from(tl.where(word < 2, tl.where(word == 0, b0, b1), tl.where(word == 2, b2, b3)))


@triton.jit
def gumbel_from(bits):
    """Standard Gumbel noise from random uint32."""
    u = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(u))
