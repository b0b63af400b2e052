import math

import pytest
import torch
import triton
import triton.language as tl
from chi_square import REJECTED, p_value, uniform_p_value
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.reference.noise import BLOCK, _gumbel_block, gumbel, gumbel_rows, philox4x32, uniform
from kangaroo_kernels.shared.launch import device_seed
from kangaroo_kernels.shared.noise import gumbel_tile

WORD = 1 << 32


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, wanted):
    """The vectors of the authors' own library, Random123 (``kat_vectors``, philox4x32 10)."""
    words = torch.tensor([int(word, 16) for word in counter.split()])
    low, high = (int(word, 16) for word in key.split())
    bits = philox4x32(words, low | high << 32)
    assert [f"{word:08x}" for word in bits.tolist()] == wanted.split()


def philox_of_integers(counter: list[int], seed: int) -> list[int]:
    """The same in Python's own integers, from the paper's definition."""
    key = [seed % WORD, seed // WORD]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second // WORD ^ counter[1] ^ key[0],
            second % WORD,
            first // WORD ^ counter[3] ^ key[1],
            first % WORD,
        ]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


@given(counter=st.lists(st.integers(0, WORD - 1), min_size=4, max_size=4), seed=st.integers(0, 2**64 - 1))
def test_any_counter_and_key(counter, seed):
    bits = philox4x32(torch.tensor(counter), seed)
    assert bits.tolist() == philox_of_integers(counter, seed)
    many = torch.tensor(counter)[:, None, None].expand(4, 2, 3)
    assert torch.equal(philox4x32(many, seed), bits[:, None, None].expand(4, 2, 3))


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 7),
    position=st.integers(0, 2**31),
    count=st.integers(1, 40),
    data=st.data(),
)
def test_a_number_depends_on_seed_stream_position_and_token_alone(seed, stream, position, count, data):
    """Not on how many were asked for, nor on what came with it."""
    token = data.draw(st.integers(0, count - 1))
    before = data.draw(st.integers(0, min(position, 20)))
    positions = torch.arange(position - before, position + data.draw(st.integers(1, 20)))
    single = uniform(seed, stream, torch.tensor([position]), token + 1)[0, token]
    assert uniform(seed, stream, positions, count)[before, token] == single
    bits = philox_of_integers([token // 4, position, stream, 0], seed)[token % 4]
    assert float(single) == pytest.approx(bits / WORD, abs=2.0**-23)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 67, 1003])
def test_gumbel_is_the_double_logarithm_bit_for_bit_wherever_it_is_computed(count):
    """Vectorised loops have tails; a number must not depend on whether it fell into one."""
    positions = torch.arange(50)
    whole = gumbel(3, 1, positions, count)
    assert whole.shape == (50, count)
    assert whole.dtype == torch.float32
    for position in range(50):
        assert torch.equal(gumbel(3, 1, positions[position : position + 1], count)[0], whole[position])
    assert torch.equal(gumbel(3, 1, positions[7:19], count), whole[7:19])
    if count > 5:
        assert torch.equal(gumbel(3, 1, positions, count - 3), whole[:, :-3])
    exact = -torch.log(-torch.log(uniform(3, 1, positions, count).double()))
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_uniform(seed):
    numbers = uniform(seed, 0, torch.arange(300), 401)
    assert uniform_p_value(numbers.flatten()) > REJECTED
    assert uniform_p_value(numbers.t().flatten()) > REJECTED
    last_bits = (numbers[numbers < 0.5] * (1 << 23)).long() % 64  # no coarse grid, and no bit stuck
    assert p_value(last_bits.bincount(minlength=64), torch.full((64,), 1 / 64)) > REJECTED


def test_gumbel_distribution():
    noise = gumbel(0, 0, torch.arange(300), 401).flatten().double()
    assert uniform_p_value(torch.exp(-torch.exp(-noise))) > REJECTED
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * math.pi / math.sqrt(6 * len(noise)))


def test_streams_seeds_and_positions_differ():
    seen = {
        tuple(uniform(seed, stream, torch.tensor([position]), 4)[0].tolist())
        for seed in (0, 1, 2**32, 2**63)
        for stream in (0, 1, 2)
        for position in (0, 1, 2**20)
    }
    assert len(seen) == 4 * 3 * 3


@pytest.mark.parametrize(("position", "token"), [(1229, 2648), (5043, 2766), (6880, 2054)])
def test_the_interval_is_open_at_the_largest_number(position, token):
    """Where all of a number's bits are set, rounding up to 1 would make its noise infinite: a token nobody can beat."""
    at = torch.tensor([position])
    bits = philox_of_integers([token // 4, position, 0, 0], 0)[token % 4]
    assert bits >> 8 == (1 << 24) - 1
    assert 0.999999 < float(uniform(0, 0, at, token + 1)[0, token]) < 1
    assert 10 < float(gumbel(0, 0, at, token + 1)[0, token]) < 30


def test_the_interval_is_open_at_the_smallest_number():
    numbers = uniform(0, 0, torch.arange(2048, 4096), 4096)
    assert 0 < float(numbers.min()) < 2.0**-21
    assert torch.isfinite(gumbel(0, 0, torch.arange(2048, 2100), 4096)).all()


# ---- the blocks that are kept


@given(
    seed=st.sampled_from([0, 5, 2**63]),
    stream=st.integers(0, 2),
    position=st.integers(0, 3 * BLOCK) | st.integers(2**16, 2**31 - 100),
    rows=st.integers(1, 2 * BLOCK + 3),
    count=st.sampled_from([1, 5, 12]),
)
def test_kept_blocks_hold_the_same_noise(seed, stream, position, rows, count):
    """Whatever was asked before: a row of a block, rows of two, more than a block."""
    wanted = gumbel(seed, stream, torch.arange(position, position + rows), count)
    assert torch.equal(gumbel_rows(seed, stream, position, rows, count, torch.device("cpu")), wanted)


@pytest.mark.parametrize("position", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK - 7])
@pytest.mark.parametrize("rows", [1, 7, 8, 16, BLOCK, BLOCK + 1])
def test_rows_may_cross_blocks(position, rows):
    wanted = gumbel(3, 1, torch.arange(position, position + rows), 9)
    for _ in range(2):  # made, and kept
        assert torch.equal(gumbel_rows(3, 1, position, rows, 9, torch.device("cpu")), wanted)


def test_a_block_is_made_once_and_only_if_a_row_is_in_it():
    """What a prefill asks for, more rows than a step has, is not kept."""
    for position, rows, made in (
        (0, BLOCK, 1),
        (3, 5, 0),
        (BLOCK - 1, 2, 1),
        (BLOCK, BLOCK, 0),
        (7 * BLOCK, MAX_ROWS, MAX_ROWS // BLOCK),
        (20 * BLOCK, MAX_ROWS + 1, 0),
    ):
        before = _gumbel_block.cache_info().misses
        gumbel_rows(77, 5, position, rows, 9, torch.device("cpu"))
        assert _gumbel_block.cache_info().misses - before == made


def test_texts_side_by_side_keep_their_noise():
    """Ten texts take turns step by step; each makes each of its blocks once."""
    _gumbel_block.cache_clear()
    for position in range(0, 40 * BLOCK, 3):
        for seed in range(10):
            gumbel_rows(seed, 0, position, 7, 9, torch.device("cpu"))
    assert _gumbel_block.cache_info().misses == 10 * (1 + (position + 6) // BLOCK)


def test_keys_of_kept_blocks_are_told_apart():
    seen = [
        gumbel_rows(seed, stream, position, 1, count, torch.device("cpu"))
        for seed in (0, 1)
        for stream in (0, 1)
        for position in (0, BLOCK)
        for count in (6, 7)
    ]
    assert len({tuple(noise[0, :6].tolist()) for noise in seen}) == 8
    assert [noise.shape[1] for noise in seen] == [6, 7] * 8


# ---- in registers


@triton.jit(do_not_specialize=["stream"])
def gumbel_kernel(out_ptr, seed_ptr, position_ptr, stream, first, rows: tl.constexpr, cols: tl.constexpr):
    positions = tl.load(position_ptr) + tl.arange(0, rows)
    noise = gumbel_tile(tl.load(seed_ptr), stream, positions, first, rows, cols)
    tl.store(out_ptr + tl.arange(0, rows)[:, None] * cols + tl.arange(0, cols)[None, :], noise)


def in_registers(
    device: torch.device, seed: int, stream: int, position: int, first: int, rows: int = 16, count: int = 32
) -> Tensor:
    out = torch.full((rows, count), float("nan"), device=device)
    where = torch.tensor([position], device=device)
    gumbel_kernel[(1,)](out, device_seed(seed, device), where, stream, first, rows, count)
    return out.cpu()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize(
    ("stream", "position", "first"),
    [(0, 0, 0), (1, 25, 32), (2, 2**16 - 8, 4096), (7, 2**16 + 3, 128_000), (0, 2**31 - 40, 4)],
)
def test_a_kernel_makes_the_same_noise(device, seed, stream, position, first):
    noise = in_registers(device, seed, stream, position, first)
    wanted = gumbel(seed, stream, torch.arange(position, position + 16), first + 32)[:, first:]
    torch.testing.assert_close(noise, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("position", "token"), [(749, 1981), (3016, 357), (1229, 2648), (5043, 2766), (6880, 2054)])
def test_a_kernel_makes_the_ends_of_the_interval(device, position, token):
    """Where all 23 bits are 0 or 1, a last bit of the uniform number is much of its noise."""
    first = token // 32 * 32
    noise = in_registers(device, 0, 0, position, first, rows=1)[0, token - first]
    wanted = gumbel(0, 0, torch.tensor([position]), token + 1)[0, token]
    assert not -2.8 < float(wanted) < 16
    torch.testing.assert_close(noise, wanted, rtol=1e-6, atol=1e-6)


def test_a_kernels_noise_does_not_depend_on_its_tile(device):
    """A token's noise is the same bits in a tile of a drafting head, of a verifying one, and of the filter."""
    whole = in_registers(device, 9, 1, 100, 0, rows=16, count=128)
    for rows, first, count in ((1, 0, 128), (1, 64, 32), (4, 32, 64), (16, 4, 8)):
        tile = in_registers(device, 9, 1, 100, first, rows=rows, count=count)
        assert torch.equal(tile, whole[:rows, first : first + count])
    assert torch.equal(in_registers(device, 9, 1, 107, 0, rows=1, count=128)[0], whole[7])
