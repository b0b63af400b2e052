"""``grow``: the best candidates become rows, wherever they hang; kernel and reference grow the same trees."""

import random

import pytest
import torch

from kangaroo_kernels import grow as grow_kernel
from kangaroo_kernels.contract import LEAST_SHARE, MAX_ROWS, NO_TOKEN, Hint, Ranked, Tree
from kangaroo_kernels.reference.grow import grow as grow_reference

GROW = pytest.mark.parametrize("grow", [grow_reference, grow_kernel.grow], ids=["reference", "kernel"])


class Grown:
    """A tree and what was said about its latest rows."""

    def __init__(self, grow, device, rows=MAX_ROWS, threshold=0.0, hint=None) -> None:
        self.grow, self.device, self.tree = grow, device, Tree.root(rows, device)
        self.threshold = torch.tensor([threshold], device=device)
        self.hint = None
        if hint is not None:
            tokens, matched, sure = hint
            numbers = torch.tensor(tokens + [0] * (MAX_ROWS - len(tokens))), torch.tensor([matched])
            self.hint = Hint(*(each.to(device) for each in (*numbers, torch.tensor([sure]))))

    def add(self, first, tokens, confidences, count, active=1):
        """``count`` rows; returns whether each is a draft, and whether one of them is sure."""
        ranked = Ranked(torch.tensor(tokens, device=self.device), torch.tensor(confidences, device=self.device))
        numbers = torch.tensor([active, 1], dtype=torch.int32, device=self.device)
        flags = torch.full((count,), 7, dtype=torch.int32, device=self.device)
        asked = {"hint": self.hint, "active": numbers[:1], "flags": flags, "following": numbers[1:]}
        self.grow(self.tree, ranked, first, count, self.threshold, **asked)
        return flags.tolist(), int(numbers[1])

    def rows(self, name, first, last):
        return getattr(self.tree, name)[first:last].tolist()


@GROW
def test_the_best_candidates_become_rows_wherever_they_hang(device, grow):
    tree = Grown(grow, device)
    assert tree.add(0, [[10, 11, 12, 13]], [[0.5, 0.3, 0.1, 0.01]], 2) == ([1, 1], 1)
    shares = [[0.4, 0.1, 0.02, 0.01], [0.9, 0.05, 0.02, 0.01]]  # of 0.5 and of 0.3
    assert tree.add(1, [[20, 21, 22, 23], [30, 31, 32, 33]], shares, 3) == ([1, 1, 1], 1)
    assert tree.rows("tokens", 1, 6) == [10, 11, 30, 20, 12]
    assert tree.rows("confidences", 1, 6) == pytest.approx([0.5, 0.3, 0.9, 0.4, 0.1])
    assert tree.rows("shares", 1, 6) == pytest.approx([0.5, 0.3, 0.27, 0.2, 0.1])
    assert tree.rows("ancestors", 0, 6) == [1, 0b11, 0b101, 0b1101, 0b10011, 0b100001]
    assert tree.add(3, [[40], [41], [42]], [[0.0]] * 3, 2) == ([1, 0], 1)
    assert tree.rows("tokens", 6, 8) == [21, NO_TOKEN]  # 0.05, behind row 1; what is left is below the least share


@GROW
def test_padding_follows_the_row_before_it(device, grow):
    """So it adds no leaf to the tree, and nobody comes to it: no model says its token."""
    tree = Grown(grow, device)
    assert tree.add(0, [[10, 11]], [[0.9, 0.05]], 3) == ([1, 1, 0], 1)
    assert tree.rows("tokens", 1, 4) == [10, 11, NO_TOKEN]
    assert tree.rows("ancestors", 0, 4) == [1, 0b11, 0b101, 0b1101]
    nothing = float("nan"), float("inf")
    assert tree.add(1, [[20, 21]] * 3, [nothing] * 3, 2, active=0) == ([0, 0], 0)
    assert tree.rows("ancestors", 4, 6) == [0b11101, 0b111101]


@GROW
def test_unsure_rows_have_no_candidates(device, grow):
    """But the newest token; and where no new row is sure, nothing follows."""
    tree = Grown(grow, device, threshold=0.5)
    assert tree.add(0, [[10, 11, 12]], [[0.5, 0.49, float("nan")]], 3) == ([1, 1, 0], 1)
    assert tree.add(1, [[20], [21], [22]], [[0.4], [0.9], [0.9]], 3) == ([1, 0, 0], 0)
    assert tree.rows("tokens", 4, 5) == [20]
    assert tree.rows("ancestors", 4, 5) == [0b10011]


@GROW
def test_of_equal_shares_the_first_is_taken(device, grow):
    tree = Grown(grow, device)
    tree.add(0, [[10, 11, 12, 13]], [[0.25] * 4], 2)
    tree.add(1, [[20, 21], [22, 23]], [[1.0, 0.5], [1.0, 0.5]], 4)
    assert tree.rows("tokens", 1, 7) == [10, 11, 12, 13, 20, 22]


@GROW
def test_looked_up_tokens_are_candidates(device, grow):
    """One behind the other, as far as they are expected, and one candidate where the drafter has the same token."""
    tree = Grown(grow, device, hint=([40, 41, 42, 43], 3, 0.5))
    assert tree.add(0, [[10, 11]], [[0.7, 0.2]], 3)[0] == [1, 1, 1]
    assert tree.rows("tokens", 1, 4) == [10, 40, 11]
    assert tree.add(1, [[20, 21], [22, 41], [23, 24]], [[0.01, 0.0], [0.1, 0.3], [0.0, 0.0]], 4)[0] == [1, 1, 0, 0]
    assert tree.rows("tokens", 4, 6) == [41, 22]  # 41 once, as sure as lookup says
    assert tree.rows("ancestors", 4, 6) == [0b10101, 0b100101]
    assert tree.rows("confidences", 4, 6) == pytest.approx([0.5, 0.1])
    assert tree.add(4, [[30]] * 4, [[0.0]] * 4, 2)[0] == [1, 0]
    assert tree.rows("tokens", 8, 9) == [42]
    assert tree.add(8, [[32]] * 2, [[0.0]] * 2, 1)[0] == [0], "only three were expected"


@GROW
def test_a_looked_up_token_is_one_candidate(device, grow):
    """``rank`` repeats the last token of the vocabulary where a top-k or top-p leaves no others."""
    tree = Grown(grow, device, hint=([9], 1, 0.3))
    assert tree.add(0, [[10, 9, 9, 9]], [[0.6, 0.0, 0.0, 0.0]], 3) == ([1, 1, 0], 1)
    assert tree.rows("tokens", 1, 3) == [10, 9]


@GROW
def test_the_least_share_is_worth_a_row(device, grow):
    """Compared as float32, as which shares are kept."""
    tree = Grown(grow, device)
    below = torch.nextafter(torch.tensor(LEAST_SHARE), torch.tensor(0.0)).item()
    assert tree.add(0, [[10, 11]], [[LEAST_SHARE, below]], 2) == ([1, 0], 1)


def random_rounds(dice):
    """How many rows each round adds, and how many candidates there are behind a row."""
    counts, left = [], 15
    while left and len(counts) < 6:
        counts.append(dice.randint(1, min(4, left)))
        left -= counts[-1]
    return counts, dice.randint(1, 4)


def test_kernel_and_reference_grow_the_same_trees(device):
    """Random trees, with ties, NaNs, rounds that do not take place, and hints."""
    dice, drafts, hinted = random.Random(0), 0, 0
    for _ in range(60):
        counts, width = random_rounds(dice)
        hint = dice.choice((None, ([dice.randrange(6) for _ in range(15)], dice.randint(0, 15), dice.random())))
        trees = [
            Grown(grow, device, 1 + sum(counts), threshold=dice.choice((0.0, 0.3)), hint=hint)
            for grow in (grow_reference, grow_kernel.grow)
        ]
        trees[1].threshold = trees[0].threshold
        first, rows, active = 0, 1, 1
        for count in counts:
            tokens = [dice.sample(range(6), width) for _ in range(rows)]
            chances = (0.5, 0.25, 0.1, float("nan"), 0.9)
            confidences = [[dice.choice(chances) for _ in range(width)] for _ in range(rows)]
            active = active and dice.random() < 0.9
            said = [tree.add(first, tokens, confidences, count, int(active)) for tree in trees]
            assert said[0] == said[1]
            first, rows, active = first + rows, count, active and said[0][1]
            drafts += sum(said[0][0])
            for name in ("tokens", "ancestors", "confidences", "shares", "said"):
                assert trees[1].rows(name, 1, first + rows) == trees[0].rows(name, 1, first + rows), name
        hinted += hint is not None and max(trees[0].rows("said", 1, first + rows)) > 1
    assert drafts > 200
    assert hinted > 5


@GROW
def test_what_does_not_fit_is_said(device, grow):
    tree = Grown(grow, device, rows=6)
    for tokens, confidences, first, count, words in (
        ([[1]] * 3, [[0.5]] * 3, 1, 3, "3 rows from 1 on and 3 new ones; they must fit into the tree's 6"),
        ([[1]], [[0.5]], 0, 5, "1 to 4 new ones at once"),
        ([[1] * 5], [[0.5] * 5], 0, 1, "it must have 1 to 4 a row"),
        ([[1]], [[1]], 0, 1, "the ranked confidences is"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            tree.add(first, tokens, confidences, count)
    with pytest.raises(ValueError, match="the hint has 3 tokens; a tree of 6 rows needs 5"):
        grow(
            tree.tree,
            Ranked(torch.ones(1, 1, dtype=torch.int64, device=device), torch.ones(1, 1, device=device)),
            0,
            1,
            tree.threshold,
            hint=Hint(*(torch.ones(size, dtype=torch.int64, device=device) for size in (3, 1)), tree.threshold),
        )
