import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from kangaroo_kernels.packed_weight import PackedWeight
from kangaroo_kernels.qkv_rope_ref import interleave_rope, qkv_rope, rope_table

EPS = 1e-5


def inv_freq(head_dim: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)


def rotate(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """transformers' ``apply_rotary_pos_emb`` on ``[M, H, D]`` in half-split order."""
    positions = torch.arange(position, position + len(x), dtype=frequencies.dtype)
    angles = torch.cat((positions[:, None] * frequencies,) * 2, dim=-1)[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def formula(x: Tensor, norm: Tensor, parts: list[Tensor], biases: list[Tensor], position: int) -> list[Tensor]:
    """Queries, keys, values ``[M, heads, D]`` in the checkpoint's own order of rows; in float64 the truth."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    head_dim = 8
    out = [(normed @ part.t() + bias).view(len(x), -1, head_dim) for part, bias in zip(parts, biases, strict=True)]
    frequencies = inv_freq(head_dim).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return [rotate(out[0], position, frequencies), rotate(out[1], position, frequencies), out[2]]


def reorder(x: Tensor) -> Tensor:
    """``[M, H, D]`` from the checkpoint's order of a head's elements to ours."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def inputs(rows: int, heads: int, kv_heads: int, biased: bool, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(rows)
    hidden, head_dim = 24, 8

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    parts = [draw(count * head_dim, hidden) for count in (heads, kv_heads, kv_heads)]
    biases = [draw(len(part)) if biased else torch.zeros(len(part), dtype=dtype) for part in parts]
    packed = PackedWeight(
        torch.cat((interleave_rope(parts[0], head_dim), interleave_rope(parts[1], head_dim), parts[2])),
        torch.cat((interleave_rope(biases[0], head_dim), interleave_rope(biases[1], head_dim), biases[2]))
        if biased
        else None,
    )
    return draw(rows, hidden), 1 + draw(hidden) / 5, parts, biases, packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16, 70])
@pytest.mark.parametrize("position", [0, 1, 33])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_formula(heads, kv_heads, position, rows, biased, dtype):
    x, norm, parts, biases, packed = inputs(rows, heads, kv_heads, biased, dtype)
    capacity = position + rows + 3
    k_cache, v_cache = (torch.full((kv_heads, capacity, 8), float("nan"), dtype=dtype) for _ in range(2))
    before = x.clone()
    q = qkv_rope(x, norm, packed, rope_table(inv_freq(8), capacity), k_cache, v_cache, position, eps=EPS)
    truth = formula(x.double(), norm.double(), [p.double() for p in parts], [b.double() for b in biases], position)
    plain = formula(x, norm, parts, biases, position)
    written = slice(position, position + rows)
    slack = 32 if dtype == torch.float32 else 2  # angles: a float32 position times a float32 frequency
    assert_within_budget(q, reorder(truth[0]), reorder(plain[0]), slack)
    assert_within_budget(k_cache[:, written].transpose(0, 1), reorder(truth[1]), reorder(plain[1]), slack)
    assert_within_budget(v_cache[:, written].transpose(0, 1), truth[2], plain[2], slack)
    for cache in (k_cache, v_cache):  # nothing else is written
        assert cache[:, :position].isnan().all()
        assert cache[:, position + rows :].isnan().all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_cache_of_other_strides(rows):
    x, norm, _, _, packed = inputs(rows, 4, 2, False, torch.float32)
    table = rope_table(inv_freq(8), 40)
    ours = [torch.zeros(2, 30, 8) for _ in range(2)]
    q = qkv_rope(x, norm, packed, table, *ours, 7, eps=EPS)
    theirs = [torch.zeros(30, 2, 8).transpose(0, 1), torch.zeros(2, 30, 2, 8)[:, :, 1]]
    assert torch.equal(qkv_rope(x, norm, packed, table, *theirs, 7, eps=EPS), q)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_scores_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 4, 2, generator=generator).double() for _ in range(2))
    table = torch.polar(
        torch.ones(200, 1, 4).double(), torch.arange(200).double()[:, None, None] * inv_freq(8).double()
    )

    def score(query_position: int, key_position: int) -> float:
        turned = [
            torch.view_as_real(torch.view_as_complex(part) * table[at : at + 1])
            for part, at in ((q, query_position), (k, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(19, 7) == pytest.approx(score(119, 107), abs=1e-10)
    ours = rope_table(inv_freq(8), 200)
    torch.testing.assert_close(ours.to(torch.complex128), table, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scaling", [1.0, 1.5])
def test_table(scaling):
    table = rope_table(inv_freq(16), 50, scaling)
    assert table.shape == (50, 1, 8)
    assert table.dtype == torch.complex64
    angle = 49 * float(inv_freq(16)[3])
    wanted = torch.polar(torch.tensor(scaling).double(), torch.tensor(angle).double())
    assert abs(complex(table[49, 0, 3]) - complex(wanted)) < 1e-5
    assert torch.equal(table[:10], rope_table(inv_freq(16), 10, scaling))  # a longer table has the same phases


@pytest.mark.parametrize("head_dim", [2, 4, 6, 64])
def test_interleaving_puts_each_pair_side_by_side(head_dim):
    rows = torch.arange(3 * head_dim)
    mixed = interleave_rope(rows, head_dim).view(3, head_dim // 2, 2)
    assert torch.equal(mixed[..., 1] - mixed[..., 0], torch.full((3, head_dim // 2), head_dim // 2))
    assert torch.equal(mixed.flatten().sort().values, rows)
    matrix = torch.randn(3 * head_dim, 5)
    assert torch.equal(interleave_rope(matrix, head_dim), matrix[interleave_rope(rows, head_dim)])
