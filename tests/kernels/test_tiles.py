"""The order in which a projection adds along K: quarters of a step apart, then (0 + 1) + (2 + 3)."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from kangaroo_kernels.linear_residual import linear_residual
from kangaroo_kernels.qkv_rope import qkv_rope
from kangaroo_kernels.reference.qkv_rope import rope_table

PACKAGE = Path(__file__).resolve().parent.parent.parent / "kangaroo_kernels"
STEP, QUARTER = 128, 32
"""Of a float32 row."""

LARGE = 2.0**25
"""1 is lost beside it."""


@pytest.mark.parametrize(
    ("sums", "result"),
    [
        ((LARGE, 1, -LARGE, 1), 0),
        ((LARGE, -LARGE, 1, 1), 2),
        ((1, 1, LARGE, -LARGE), 2),
        ((1, LARGE, -LARGE, 1), 0),
        ((LARGE, 1, 1, -LARGE), 0),
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_quarters_are_added_in_pairs(sums, result, steps, device):
    """Each quarter's sum comes from its last step alone; the steps before leave nothing."""
    x = torch.ones(1, steps * STEP, device=device)
    weight = torch.zeros(16, steps * STEP, device=device)
    for quarter, value in enumerate(sums):
        weight[:, (steps - 1) * STEP + quarter * QUARTER] = value
    out = linear_residual(x, weight, torch.zeros(1, 16, device=device))
    assert out.tolist() == [[result] * 16]


def test_a_quarter_has_one_sum_over_all_steps(device):
    """In the order of K: what an earlier step has lost does not come back with a later one."""
    x = torch.ones(1, 3 * STEP, device=device)
    weight = torch.zeros(16, 3 * STEP, device=device)
    weight[:, 0], weight[:, STEP], weight[:, 2 * STEP] = LARGE, 1, -LARGE
    out = linear_residual(x, weight, torch.zeros(1, 16, device=device))
    assert out.tolist() == [[0] * 16]


@pytest.mark.parametrize("size", [1, 31, 33, 96, 127, 129, 300])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of NaN
def test_rows_do_not_meet_in_the_sum_of_squares(size, device):
    """The norm takes the diagonal of x @ x^T: neighbours that are infinite, or no numbers, change no bit of a row."""
    torch.manual_seed(size)
    x, norm, weight = torch.randn(3, size), torch.rand(size) + 0.5, torch.randn(24, size)
    table = rope_table(torch.arange(4.0), 4)
    outs = []
    for spoiled in (0.0, float("inf"), float("nan")):
        x[0], x[2] = spoiled, 1e30
        caches = [torch.zeros(1, 4, 8, device=device) for _ in range(2)]
        operands = [part.to(device) for part in (x, norm, weight, table)]
        outs.append(qkv_rope(*operands, *caches, 0, eps=1e-6)[1])
    wide = x[1].double()
    normed = wide * norm.double() / (wide.square().mean() + 1e-6).sqrt()
    assert (outs[0][0].norm().double() - (weight[:8].double() @ normed).norm()).abs() < 1e-5 * normed.norm()
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], outs[0])


def test_a_constant_of_the_kernels_has_one_name_and_one_value():
    """A kernel that uses two of one name has a key in Triton's cache that changes from process to process."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    found = Counter(re.findall(r"^(\w+)(?:: [\w.]+)? = tl\.constexpr\(", text, re.MULTILINE))
    assert found["CHUNK"] == 1
    assert [name for name, count in found.items() if count > 1] == []
