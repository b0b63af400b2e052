"""``walk`` and ``straighten``: plain decoding over the rows of a tree, and the tree's rows as a chain's afterwards."""

import random

import pytest
import torch
from torch import Tensor
from trees import CHAIN, masks_of, path_of, shapes

from kangaroo_kernels import straighten as straighten_kernel
from kangaroo_kernels import walk as walk_kernel
from kangaroo_kernels.contract import Walk
from kangaroo_kernels.reference.accept import accept
from kangaroo_kernels.reference.straighten import straighten as straighten_reference
from kangaroo_kernels.reference.walk import walk as walk_reference

WALK = pytest.mark.parametrize("walk", [walk_reference, walk_kernel.walk], ids=["reference", "kernel"])
STRAIGHTEN = pytest.mark.parametrize(
    "straighten", [straighten_reference, straighten_kernel.straighten], ids=["reference", "kernel"]
)
NAN = float("nan")
LENGTH = 7


def says(path: tuple[int, ...]) -> int:
    """What a target says after some tokens: always the same, one of three tokens."""
    return random.Random(str(path)).randrange(3)


def a_step(dice: random.Random, parents: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Drafts that are often right, no two siblings alike, and the target's token after each row."""
    behind: list[tuple[int, ...]] = [()]
    for row, parent in enumerate(parents):
        token = says(behind[parent]) if dice.random() < 0.6 else dice.randrange(3)
        behind.append((*behind[parent], 50 + row if (*behind[parent], token) in behind else token))
    return [path[-1] for path in behind[1:]], [says(path) for path in behind]


def row(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


@WALK
def test_each_path_as_a_chain_of_its_own_gives_the_same_tokens(device, walk):
    """The best of them; stop tokens inside a branch and the limit inside a branch are ``accept``'s own."""
    dice, agreed, longest = random.Random(0), 0, 0
    for parents in shapes(dice, 120):
        drafts, target = a_step(dice, parents)
        stops = row(dice.sample(range(3), dice.choice((0, 0, 1))), device)
        limit = LENGTH + dice.randint(0, 9)
        found = walk(row(drafts, device), row(target, device), masks_of(parents, device), stops, LENGTH, limit)
        accepted, reached, stopped = found.decision.tolist()
        best = None
        for leaf in range(len(parents) + 1):
            path = path_of(parents, leaf)
            chain = row([drafts[each - 1] for each in path[1:]], device), row([target[each] for each in path], device)
            decided = accept(*chain, stops, LENGTH, limit).tolist()
            text = chain[1][: decided[1] - LENGTH].tolist()
            if best is None or decided[0] > best[0]:
                best = (decided[0], decided[1], decided[2], text)
        assert (accepted, reached, stopped, found.tokens[: reached - LENGTH].tolist()) == best
        rows = found.path.tolist()
        assert rows[accepted + 1 :] == list(range(accepted + 1, len(rows)))
        assert rows[: accepted + 1] == path_of(parents, rows[accepted])
        agreed, longest = agreed + accepted, max(longest, accepted)
    assert agreed > 150
    assert longest > 4


@WALK
def test_a_chain_is_accepts(device, walk):
    dice = random.Random(1)
    for _ in range(30):
        drafts, target = a_step(dice, CHAIN)
        given = row(drafts, device), row(target, device)
        confidence = torch.tensor([NAN if dice.random() < 0.1 else 1.0 for _ in target], device=device)
        where = row([1], device), row([LENGTH], device), row([LENGTH + 6], device)
        wanted = accept(*given, *where, confidence=confidence)
        out = Walk.empty(16, device)
        found = walk(*given, masks_of(CHAIN, device), *where, confidence=confidence, out=out)
        assert found.decision.tolist() == wanted.tolist()
        assert all(each.data_ptr() == kept.data_ptr() for each, kept in zip(found, out, strict=True))
        assert found.path.tolist() == list(range(16))
        assert found.tokens.tolist() == target


@WALK
def test_a_row_whose_logits_are_not_finite_ends_its_path(device, walk):
    """Elsewhere in the tree it does no harm."""
    parents, drafts, target = (0, 0, 2, 3), [5, 6, 7, 8], [6, 9, 7, 8, 1]
    for spoiled, wanted in ((0, []), (1, [6, 7, 8, 1]), (2, [6]), (3, [6, 7]), (4, [6, 7, 8])):
        confidence = torch.ones(5, device=device)
        confidence[spoiled] = NAN
        given = row(drafts, device), row(target, device), masks_of(parents, device), row([], device)
        found = walk(*given, LENGTH, 99, confidence=confidence)
        assert found.tokens[: int(found.decision[1]) - LENGTH].tolist() == wanted


@WALK
def test_of_siblings_with_one_token_the_first_is_taken_and_padding_never(device, walk):
    given = row([4, 4, -1, -1], device), row([4, 4, 4, 4, 4], device), masks_of((0, 0, 1, 3), device)
    assert walk(*given, row([], device), LENGTH, 99).path.tolist() == [0, 1, 2, 3, 4]
    given = row([3, 4, 4, -1], device), row([4, 4, 4, 4, 4], device), masks_of((0, 0, 0, 2), device)
    assert walk(*given, row([], device), LENGTH, 99).path.tolist() == [0, 2, 2, 3, 4]


@STRAIGHTEN
@pytest.mark.parametrize("width", [1, 24, 300])
def test_rows_of_a_path_lie_as_a_chains(device, straighten, width):
    dice = random.Random(width)
    for parents in shapes(dice, 12):
        path = path_of(parents, dice.randint(0, len(parents)))
        rows = [*path, *range(len(path), len(parents) + 1)]
        root = dice.randint(0, 5)
        wide = torch.randn(3, 24, width + 2, generator=torch.Generator().manual_seed(width)).to(device)
        store = wide[..., 1:-1]
        before = wide.clone()
        where = root if dice.random() < 0.5 else row([root], device)
        straighten(row(rows, device), where, store)
        wanted = before[..., 1:-1].clone()
        wanted[:, root : root + len(rows)] = before[:, [root + each for each in rows], 1:-1]
        before[..., 1:-1] = wanted
        assert torch.equal(wide, before)


@STRAIGHTEN
def test_nothing_moves_beyond_the_store(device, straighten):
    store = torch.randn(2, 6, 8, device=device)
    with pytest.raises(ValueError, match="straighten: position 4 with 3 rows is outside of the 6 of the store"):
        straighten(row([0, 2, 2], device), 4, store)
    with pytest.raises(ValueError, match=r"straighten: the path is \[3\], the store \[2, 6\]"):
        straighten(row([0, 2, 2], device), 0, store[..., 0])


@WALK
def test_what_does_not_fit_is_said(device, walk):
    given = row([1], device), row([1, 2], device), masks_of((0,), device), row([], device)
    for place, bad, words in (
        (0, row([1, 1], device), r"walk: target is \[2\] .*; it must be \[3\]"),
        (1, row([1], device), r"walk: target is \[1\] .*; it must be \[2\]"),
        (2, torch.ones(2, device=device), r"walk: ancestors is \[2\] torch.float32"),
        (3, torch.ones(1, dtype=torch.int32, device=device), "walk: stop_tokens is"),
    ):
        with pytest.raises(ValueError, match=words):
            walk(*[bad if index == place else each for index, each in enumerate(given)], LENGTH, 99)
    with pytest.raises(ValueError, match="walk: limit is 6; it must not be below the length, 7"):
        walk(*given, LENGTH, 6)
