"""The model of bandwidth: its arithmetic, and that today's kernels are expected to reach the goals."""

import sys
from collections import Counter
from importlib import import_module
from types import SimpleNamespace

import pytest
from compiling import ROOT, printed_by

sys.path.insert(0, str(ROOT / "tools"))
model, cards, sass = (import_module(name) for name in ("bandwidth_model", "kangaroo_kernels.cards", "sass"))
_, H100, H200 = cards.CARDS
COMMAND = "tools/bandwidth_model.py", "--model", "1B", "--json"
TILE = 16 * 512
"""Bytes of a step of 16 weight rows."""

GIVEN = model.ASSUMPTIONS._replace(turn=0)


def seconds(programs, steps=8, card=H200, depth=8.0, instructions=70, chain=4, shared=100 << 10):
    loop = sass.Loop(Counter({16: 8}), Counter(), depth, instructions, chain)
    code = SimpleNamespace(registers=64, static_shared=0, loops=(loop,))
    launch = SimpleNamespace(
        kernel="linear_residual_kernel",
        constants={"BLOCK_N": 16},
        programs=programs,
        threads=128,
        num_warps=4,
        dynamic_shared=shared,
        code=code,
    )
    return model.seconds_of(launch, card, steps, GIVEN)


@pytest.mark.parametrize("card", [H100, H200])
@pytest.mark.parametrize("waves", [1, 3])
def test_where_nothing_else_binds_it_takes_the_bytes_time(card, waves):
    """Two programs an SM; every wave as long as its bytes."""
    programs = 2 * 132 * waves
    took, bound = seconds(programs, card=card)
    assert (took, bound) == (pytest.approx(programs * 8 * TILE / card.bandwidth), "memory")


@pytest.mark.parametrize(
    ("bound", "settings", "step"),
    [
        ("chain", {"chain": 64}, 64 * 33 / 1.7e9),
        ("flight", {"depth": 1.5}, 1e-6 / 1.5),
        ("issue", {"instructions": 4000}, 2 * 4000 * 4 / (4 * 1.7e9)),
    ],
)
def test_what_binds_decides(bound, settings, step):
    assert seconds(2 * 132, **settings) == (pytest.approx(8 * step), bound)


def test_a_wave_that_is_not_full_leaves_the_memory_to_few():
    """One program more than fit at once: it alone is a wave, as fast as a program can be."""
    full, _ = seconds(2 * 132)
    assert seconds(2 * 132 + 1)[0] == pytest.approx(full + 8 * 1e-6 / 8)


def test_no_loop_is_slower_than_the_memory():
    """Of the smallest model's matrices, whose grids are the smallest; its down projection reaches 70 % on an H200."""
    found = {(each["matrix"], each["card"]): each for each in printed_by(*COMMAND)}
    assert len(found) == 5 * 2
    assert {each["bound"] for each in found.values()} == {"memory"}
    assert all(0.3 < each["share"] < each["chained"] < 1 for each in found.values())
    assert found["down", "H200"]["share"] >= 0.70
