"""Which tokens top-k and top-p keep: those of the reference, down to the last bit of a logit."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.reference.sample_head import filter_logits
from kangaroo_kernels.shared.filters import FILTERED, GROUP, group, groups_in, kept_of, largest_of, order_bits
from kangaroo_kernels.shared.launch import device_number
from kangaroo_kernels.shared.operands import Groups

NAN, INFINITY = float("nan"), float("inf")


def draw_logits(vocab_size: int) -> Tensor:
    return 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))


# ---- the order of logits


SPECIAL = [0.0, 1.0, 2.0**-126, 1e-30, 0.1, 1.5, 3.0, 65504.0, 1e30, 3.4028235e38, INFINITY]


@triton.jit
def order_kernel(value_ptr, out_ptr, count: tl.constexpr):
    offs = tl.arange(0, count)
    tl.store(out_ptr + offs, order_bits(tl.load(value_ptr + offs)).to(tl.int64))


def order_of(values: Tensor, device: torch.device) -> Tensor:
    out = torch.full((len(values),), -1, device=device)
    order_kernel[(1,)](values.to(device), out, len(values))
    return out.cpu()


def random_floats(count: int, seed: int) -> Tensor:
    """Of any exponent: random bits, NaN and subnormal numbers (which a GPU may flush) taken out."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed))
    values = bits.to(torch.int32).view(torch.float32)
    return torch.where(values.isnan() | (values.abs() < 2.0**-126), 0.0, values)


def test_order_bits_sort_as_the_numbers_do(device):
    specials = torch.tensor([sign * value for value in SPECIAL for sign in (1, -1)])
    close = torch.nextafter(specials[specials.abs() > 2.0**-126], torch.tensor(0.0))  # differ in the last bit
    values = torch.cat((specials, close, random_floats(4096 - len(specials) - len(close), 0)))
    order = order_of(values, device)
    assert 0 <= int(order.min()) <= int(order.max()) < 2**32
    by_value = values.argsort(stable=True)
    rises = values[by_value].diff() > 0
    rises |= (values[by_value][1:] == INFINITY) & (values[by_value][:-1] < INFINITY)
    rises |= (values[by_value][:-1] == -INFINITY) & (values[by_value][1:] > -INFINITY)
    assert torch.equal(order[by_value].diff() > 0, rises)
    assert torch.equal(order[by_value].diff() == 0, ~rises)


def test_order_bits_of_zeros_and_nans(device):
    """The two zeros are one number; a NaN, of either sign and any payload, is as large as infinity."""
    assert len(set(order_of(torch.tensor([0.0, -0.0]), device).tolist())) == 1
    bits = [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x00400000, -0x007FFFFF, -1]  # a negative one has its sign bit set
    nans = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    values = torch.cat((nans, torch.tensor([INFINITY, 3.4028235e38])))
    order = order_of(values, device)
    assert len(set(order[:7].tolist())) == 1
    assert order[0] > order[7]
    assert order_of(torch.tensor([-INFINITY, -3.4028235e38]), device).diff() > 0


# ---- the sets that are kept


@triton.jit(do_not_specialize=["size"])
def kept_kernel(logits_ptr, largest_ptr, mass_ptr, listed_ptr, out_ptr, temperature_ptr, top_k_ptr, top_p_ptr, size):
    groups = Groups(largest_ptr, None, mass_ptr, listed_ptr, groups_in(size))
    temperature = tl.load(temperature_ptr)
    kept, listed = kept_of(logits_ptr, size, groups, largest_of(groups), temperature, top_k_ptr, top_p_ptr)
    tl.store(out_ptr, kept.to(tl.int64))
    tl.store(out_ptr + 1, listed.to(tl.int64))


def search(
    logits: Tensor, device: torch.device, top_k: int | None, top_p: float | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Which of ``logits`` [V] the kernels' filters keep, and the groups that they listed."""
    size = len(logits)
    padded = torch.cat((logits, torch.full((99,), INFINITY))).to(device)  # what follows a row is another row
    row, degrees = padded[None, :size], device_number(temperature, device)
    groups = group(row, None, degrees, with_sums=False, with_masses=top_k is None)
    out = torch.full((2,), -1, device=device)
    k = None if top_k is None else torch.tensor([top_k], device=device)
    p = None if top_p is None else device_number(top_p, device)
    kept_kernel[(1,)](row, groups.largest, groups.masses, groups.listed, out, degrees, k, p, size)
    order = order_of(torch.cat((logits, torch.zeros(triton.next_power_of_2(size) - size))), device)[:size]
    kept, count = out.tolist()
    return order >= kept, groups.listed[0, :count].cpu()


def kept_by_kernels(
    logits: Tensor, device: torch.device, top_k: int | None, top_p: float | None, temperature: float = 1.0
) -> Tensor:
    """Which of ``logits`` [V] are kept. All of them lie in the groups that are listed, each once and in order."""
    kept, listed = search(logits, device, top_k, top_p, temperature)
    assert (listed.diff() > 0).all()
    assert set((kept & (logits != -INFINITY)).nonzero()[:, 0].div(GROUP.value, rounding_mode="floor").tolist()) <= set(
        listed.tolist()
    )
    return kept


def kept_by_reference(logits: Tensor, top_k: int | None, top_p: float | None, temperature: float = 1.0) -> Tensor:
    return filter_logits(logits[None], temperature, top_k, top_p)[0] > -INFINITY


def coarse(logits: Tensor) -> Tensor:
    """On a grid with many ties, zeros of both signs among them."""
    return (logits * 2).round() / 2


@pytest.mark.parametrize(
    ("vocab_size", "change", "top_k"),
    [
        *((67, change, top_k) for change in (torch.clone, coarse) for top_k in (1, 2, 20, 66)),
        *((67, change, 5) for change in (lambda logits: -logits.abs(), lambda logits: 1e-30 * logits)),
        *((size, coarse, top_k) for size in (4096, 4097) for top_k in (1, 4095)),
        *((9000, coarse, top_k) for top_k in (3, 4500, 8999)),
        (2, torch.clone, 1),
    ],
)
def test_top_k_keeps_what_the_reference_keeps(device, vocab_size, change, top_k):
    logits = change(draw_logits(vocab_size))
    assert torch.equal(kept_by_kernels(logits, device, top_k, None), kept_by_reference(logits, top_k, None))


@pytest.mark.parametrize(
    ("vocab_size", "change", "top_k", "top_p", "temperature"),
    [
        *((67, change, None, top_p, 0.7) for change in (torch.clone, coarse) for top_p in (1e-30, 0.2, 0.5, 0.93)),
        *(
            (67, change, top_k, top_p, 3.0)
            for change in (torch.clone, coarse)
            for top_k, top_p in ((10, 0.8), (2, 0.6))
        ),
        *((4097, change, None, 0.5, 1.0) for change in (torch.clone, coarse)),
        (9000, coarse, 6000, 0.9, 2.0),
        *((size, torch.clone, None, top_p, 1.0) for size in (1, 2) for top_p in (0.4, 0.99)),
    ],
)
def test_top_p_keeps_what_the_reference_keeps(device, vocab_size, change, top_k, top_p, temperature):
    logits = change(draw_logits(vocab_size))
    kept = kept_by_kernels(logits, device, top_k, top_p, temperature)
    assert torch.equal(kept, kept_by_reference(logits, top_k, top_p, temperature))


@pytest.mark.parametrize("top_k", [1, 2, 33, 34])
@pytest.mark.parametrize("first", [1, 2])
def test_logits_that_differ_in_the_last_bit(device, first, top_k):
    """One more or fewer is kept: the search goes down to it, of both parities."""
    steps = torch.randperm(67, generator=torch.Generator().manual_seed(0)) + first
    logits = 1 + steps * 2.0**-23
    assert torch.equal(kept_by_kernels(logits, device, top_k, None), kept_by_reference(logits, top_k, None))
    share = (top_k - 0.5) / 67
    kept = kept_by_kernels(logits, device, None, share)
    assert torch.equal(kept, kept_by_reference(logits, None, share))
    assert int(kept.sum()) == top_k


def test_top_p_that_is_reached_exactly(device):
    """Half of the probability is the first token's: it alone is kept."""
    logits = torch.tensor([-0.6931472, 0.0, -0.6931472])  # 1/2, 1, 1/2
    assert kept_by_reference(logits, None, 0.5).tolist() == [False, True, False]
    assert kept_by_kernels(logits, device, None, 0.5).tolist() == [False, True, False]


@pytest.mark.parametrize("chosen", [0, 1])
def test_kernel_keeps_all_that_tie_with_the_last(device, chosen):
    logits = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.0])
    settings = [(2, None), (4, None), (None, 0.75), (2, 0.8), (None, 0.9)]
    alone = [(1, None), (None, 0.6), (4, 0.1), (1, 0.99)]
    for top_k, top_p in (settings, alone)[chosen]:
        kept = kept_by_kernels(logits, device, top_k, top_p).tolist()
        assert kept == ([True] * 4 + [False], [False, True, False, False, False])[chosen]
    assert kept_by_kernels(torch.zeros(8), device, None, 0.25).all()
    assert kept_by_kernels(torch.tensor([-0.0, 0.0, -1.0]), device, 1, None).tolist() == [True, True, False]


@pytest.mark.parametrize("top_k", [1, 3, 5, 50])
def test_top_k_among_infinite_logits(device, top_k):
    """As many as are finite, fewer than k, or more: what pads the last chunk of a row is none of them."""
    logits = torch.full((67,), -INFINITY)
    logits[[3, 9, 40]] = torch.tensor([1.0, -2.0, 0.5])
    kept = kept_by_kernels(logits, device, top_k, None)
    assert torch.equal(kept & (logits > -INFINITY), kept_by_reference(logits, top_k, None))
    logits[[5, 66]] = INFINITY
    for fewest in (1, 2, 4):
        kept = kept_by_kernels(logits, device, fewest, None)
        assert torch.equal(kept, kept_by_reference(logits, fewest, None))


# ---- groups


@pytest.mark.parametrize("top_k", [1, 7, 128, 129])
def test_as_many_groups_are_listed_as_tokens_are_kept(device, top_k):
    """Those with the largest logits of all groups, whatever else they hold."""
    logits = draw_logits(9000)
    kept, listed = search(logits, device, top_k, None)
    assert torch.equal(kept, kept_by_reference(logits, top_k, None))
    tops = torch.cat((logits, torch.full((-len(logits) % GROUP.value,), -INFINITY))).view(-1, GROUP.value).amax(dim=1)
    assert listed.tolist() == sorted(tops.topk(top_k).indices.tolist())


def likely(size: int, places: list[int]) -> Tensor:
    """Nearly all of the probability lies in these places, each below the one before."""
    logits = -30 - 0.001 * torch.arange(size)
    logits[places] = -0.1 * torch.arange(len(places))
    return logits


EDGES = [0, 31, 32, 63, 4095, 4096, 8191]


@pytest.mark.parametrize("size", [8192, 8193, 8223, 8224])
@pytest.mark.parametrize(("top_k", "top_p"), [(4, None), (None, 0.6), (6, 0.7)])
def test_tokens_at_the_ends_of_groups(device, size, top_k, top_p):
    """The last group whole, or of one token; the likeliest token is its last."""
    logits = likely(size, [size - 1, *EDGES[:-1]])
    kept, listed = search(logits, device, top_k, top_p)
    assert torch.equal(kept, kept_by_reference(logits, top_k, top_p))
    assert kept[size - 1]
    assert 2 <= len(listed) <= 6


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.7), (5, 0.5)])
def test_more_groups_than_a_program_takes_at_a_time(device, top_k, top_p):
    size = FILTERED.value * GROUP.value + 40
    logits = likely(size, [size - 1, 5, size - 9, 70_000, size - 33, 131_071])
    kept, listed = search(logits, device, top_k, top_p)
    assert torch.equal(kept, kept_by_reference(logits, top_k, top_p))
    assert len(listed) <= 6
    assert set(listed.tolist()) >= {0, (size - 1) // GROUP.value}


@pytest.mark.parametrize("level", [0.0, -7.5, 1e30])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (150, None), (None, 0.01), (None, 0.99), (20, 0.5)])
def test_equal_logits_are_kept_together(device, level, top_k, top_p):
    """Whatever is wanted of them; those below are left out where that is fewer than all of these."""
    logits = torch.full((4200,), level)
    logits[::3] = -INFINITY
    kept, listed = search(logits, device, top_k, top_p)
    assert torch.equal(kept, logits == level)
    assert len(listed) == -(-len(logits) // GROUP.value)


@pytest.mark.parametrize("top_k", [1, 32, 33, 4000, 4999, 5000, 5001])
def test_any_k_up_to_the_row_and_beyond(device, top_k):
    """More than there are groups, and more than a program takes at a time."""
    logits = draw_logits(5000)
    assert torch.equal(kept_by_kernels(logits, device, top_k, None), kept_by_reference(logits, top_k, None))


@pytest.mark.parametrize("top_p", [1.0, INFINITY])
def test_a_share_of_all(device, top_p):
    """On the device it is a number like any other; what carries no weight in the sum may be left out."""
    logits = draw_logits(5000)
    shares = torch.softmax(logits.double(), dim=0)
    kept = kept_by_kernels(logits, device, None, top_p)
    assert float(shares[~kept].sum()) < 1e-6
    assert kept.all() or top_p == 1.0


@pytest.mark.parametrize(("top_k", "top_p"), [(2, None), (None, 0.5), (2, 0.5)])
def test_groups_of_nothing_but_minus_infinity_are_not_listed(device, top_k, top_p):
    logits = torch.full((9000,), -INFINITY)
    assert len(search(logits, device, top_k, top_p)[1]) == 0
    logits[8000] = -3.0
    kept, listed = search(logits, device, top_k, top_p)
    assert listed.tolist() == [8000 // GROUP.value]
    assert kept[8000]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of them
@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (2, None), (None, 0.5), (2, 0.5)])
def test_nan_and_infinity_are_kept(device, top_k, top_p):
    """Among the largest of top-k; in a sum of theirs there is no share, and top-p keeps what it is given."""
    for value in (NAN, INFINITY):
        logits = draw_logits(5000)
        logits[4321] = value
        kept, listed = search(logits, device, top_k, top_p)
        assert kept[4321]
        assert 4321 // GROUP.value in listed
        assert int(kept.sum()) == (top_k or 5000)
