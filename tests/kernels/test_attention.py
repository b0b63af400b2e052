import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from kangaroo_kernels.attention_ref import MANY_ROWS, attention


def formula(q: Tensor, keys: Tensor, values: Tensor, position: int, scale: float) -> Tensor:
    """One row, one head, one sum at a time; in float64 the truth."""
    rows, heads, head_dim = q.shape
    group = heads // keys.shape[0]
    out = q.new_empty(rows, heads, head_dim)
    for row in range(rows):
        for head in range(heads):
            seen = slice(0, position + row + 1)
            scores = scale * (keys[head // group, seen] @ q[row, head])
            out[row, head] = torch.softmax(scores, dim=0) @ values[head // group, seen]
    return out.flatten(1)


def inputs(
    rows: int, heads: int, kv_heads: int, head_dim: int, position: int, spare: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values; what lies beyond the last row's position is NaN."""
    generator = torch.Generator().manual_seed(seed)
    length = position + rows
    q = torch.randn(rows, heads, head_dim, generator=generator)
    keys, values = (torch.randn(kv_heads, length + spare, head_dim, generator=generator) for _ in range(2))
    keys[:, length:] = values[:, length:] = float("nan")
    return q, keys, values


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("position", [0, 1, 37])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2), (6, 1), (1, 1), (3, 3)])
def test_formula(heads, kv_heads, position, rows):
    q, keys, values = inputs(rows, heads, kv_heads, 16, position)
    truth = formula(q.double(), keys.double(), values.double(), position, 0.25)
    ours = attention(q, keys, values, position, scale=0.25)
    assert_within_budget(ours, truth, formula(q, keys, values, position, 0.25), slack=4)


@pytest.mark.parametrize("rows", [MANY_ROWS - 1, MANY_ROWS, MANY_ROWS + 13])
@pytest.mark.parametrize("position", [0, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_many_rows(heads, kv_heads, position, rows):
    q, keys, values = inputs(rows, heads, kv_heads, 8, position)
    truth = formula(q.double(), keys.double(), values.double(), position, 0.3)
    ours = attention(q, keys, values, position, scale=0.3)
    assert_within_budget(ours, truth, formula(q, keys, values, position, 0.3), slack=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 80])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_low_precision(heads, kv_heads, rows, dtype):
    q, keys, values = (part.to(dtype) for part in inputs(rows, heads, kv_heads, 32, 11))
    truth = formula(q.double(), keys.double(), values.double(), 11, 32**-0.5)
    ours = attention(q, keys, values, 11, scale=32**-0.5)
    assert_within_budget(ours, truth, formula(q, keys, values, 11, 32**-0.5), slack=2)


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("layout", ["token major", "fused", "wide rows"])
def test_strides(layout, heads, kv_heads, rows):
    """A caller's own cache, queries that are a view of the fused projection: the numbers decide, not where they lie."""
    position, head_dim = 6, 8
    q, keys, values = inputs(rows, heads, kv_heads, head_dim, position)
    wanted = attention(q, keys, values, position, scale=0.4)
    if layout == "token major":
        keys, values = (part.transpose(0, 1).contiguous().transpose(0, 1) for part in (keys, values))
    elif layout == "fused":
        both = torch.stack((keys, values), dim=2)
        keys, values = both[:, :, 0], both[:, :, 1]
        fused = torch.full((rows, heads + 2 * kv_heads, head_dim), float("nan"))
        fused[:, :heads] = q
        q = fused[:, :heads]
    else:
        keys, values = (torch.cat((part, torch.full_like(part, float("nan"))), dim=2) for part in (keys, values))
        keys, values = keys[..., :head_dim], values[..., :head_dim]
    truth = formula(q.double(), keys.double(), values.double(), position, 0.4)
    assert_within_budget(attention(q, keys, values, position, scale=0.4), truth, wanted, slack=4)


@pytest.mark.parametrize("rows", [1, 2, 16, 80])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_nothing_beyond_a_rows_own_position_is_read(heads, kv_heads, rows):
    """Noise of any size there, bit for bit without effect; NaN in the rows in flight reaches none before them."""
    position = 9
    q, keys, values = inputs(rows, heads, kv_heads, 16, position)
    wanted = attention(q, keys, values, position, scale=0.25)
    for spoil in (100 * torch.randn(kv_heads, 5, 16), torch.full((kv_heads, 5, 16), float("inf"))):
        keys[:, position + rows :] = values[:, position + rows :] = spoil
        assert torch.equal(attention(q, keys, values, position, scale=0.25), wanted)
    if rows > 1:
        keys[:, position + rows - 1] = 100 * torch.randn(kv_heads, 16)
        values[:, position + rows - 1] = 100 * torch.randn(kv_heads, 16)
        spoiled = attention(q, keys, values, position, scale=0.25)
        torch.testing.assert_close(spoiled[:-1], wanted[:-1], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(spoiled[-1], wanted[-1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_rows_at_once_are_rows_one_by_one(heads, kv_heads):
    q, keys, values = inputs(16, heads, kv_heads, 16, 5)
    whole = attention(q, keys, values, 5, scale=0.25)
    for row in range(16):
        single = attention(q[row : row + 1], keys, values, 5 + row, scale=0.25)
        torch.testing.assert_close(single[0], whole[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 70])
def test_inputs_are_left_alone(rows):
    q, keys, values = inputs(rows, 4, 2, 16, 3, spare=0)
    before = [part.clone() for part in (q, keys, values)]
    for _ in range(2):  # the causal mask is kept from call to call
        attention(q, keys, values, 3, scale=0.25)
    assert all(torch.equal(part, kept) for part, kept in zip((q, keys, values), before, strict=True))
