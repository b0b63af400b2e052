"""``look_up``: the longest match of the text's end, found by trying every place."""

import random

import pytest
import torch
from side_by_side import side_by_side
from torch import Tensor

from kangaroo_kernels.contract import Match
from kangaroo_kernels.look_up import PLACES
from kangaroo_kernels.look_up import look_up as kernel
from kangaroo_kernels.reference.look_up import look_up as reference

EITHER = pytest.mark.parametrize("look_up", [reference, kernel], ids=["reference", "kernel"])
LEAST, LONGEST = 3, 15


def row(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def by_hand(tokens: list[int], most: int) -> tuple[list[int], int]:
    """Every token that is wanted, and the length of the match."""
    matched, place = 0, len(tokens) - 1
    for at in range(len(tokens)):
        same = 0
        while same < min(at, LONGEST) and tokens[at - 1 - same] == tokens[-1 - same]:
            same += 1
        if same >= matched:
            matched, place = same, at
    again = tokens[place:]
    return [again[index % len(again)] for index in range(most)], matched if matched >= LEAST else 0


def check(look_up, tokens: list[int], most: int, device: torch.device) -> int:
    """What is found, whatever lies beside the text, the length as a number and on the device; the match's length."""
    wanted, matched = by_hand(tokens, most)
    for token, length in ((tokens[-1], len(tokens)), (-1, row([len(tokens)], device))):
        beside = [token] * (LONGEST + 1)
        text = row(beside + tokens + beside, device)[LONGEST + 1 :]
        found = look_up(text, length, most, LEAST)
        assert found.tokens.tolist() == wanted
        assert found.matched.tolist() == [matched]
    return matched


@EITHER
@pytest.mark.parametrize("vocab", [1, 2, 3, 4])
def test_the_longest_match_and_of_several_the_last(device, look_up, vocab):
    """A text may be shorter than a match."""
    dice, longest = random.Random(vocab), 0
    for length in [*range(1, 20), *range(20, 90, 17)]:
        for most in (0, 1, 5, 15):
            tokens = [dice.randrange(vocab) for _ in range(length)]
            longest = max(longest, check(look_up, tokens, most, device))
    assert longest > LEAST


@EITHER
def test_places_of_several_programs(device, look_up):
    """Matches on either side of a tile's end and across it, in the first tile and the last; equal ones in several."""
    dice = random.Random(0)
    phrase, length = [7, 3, 9, 1, 8, 2], 2 * PLACES + 40
    for places in ([0], [PLACES - 3], [PLACES - 6], [PLACES], [4, PLACES + 5], [2 * PLACES + 9], [3, 2 * PLACES - 2]):
        tokens = [dice.randrange(10, 5000) for _ in range(length)] + phrase
        for place in places:
            tokens[place : place + 6] = phrase
        assert check(look_up, tokens, 15, device) == 6
    assert check(look_up, [5] * length, 15, device) == LONGEST  # all places match, the last one wins
    assert check(look_up, [1, 2, 3, 4, 5] * (length // 5), 15, device) == LONGEST
    assert check(look_up, list(range(length)), 15, device) == 0


@EITHER
def test_a_text_that_fills_its_memory(device, look_up):
    for length in (1, 2, PLACES - 1, PLACES, PLACES + 1):
        tokens = [*range(length - 8), 0, 1, 2, 3, 0, 1, 2, 3][-length:]
        found = look_up(row(tokens, device), length, 9, LEAST)
        assert (found.tokens.tolist(), int(found.matched)) == by_hand(tokens, 9)
        assert int(found.matched) == 4 or length < 8


@EITHER
def test_the_drafts_overlap_the_end(device, look_up):
    """A period that is shorter than the draft is gone through again."""
    found = look_up(row([9, 1, 2, 1, 2, 1, 2], device), 7, 9, LEAST)
    assert found.tokens.tolist() == [1, 2] * 4 + [1]
    assert found.matched.tolist() == [4]


@EITHER
def test_flags_say_which_drafts_are_made(device, look_up):
    """Nothing else is written; where nothing shall be drafted, no flag is up."""
    text = row([1, 2, 3, 4, 0, 1, 2, 3, 4], device)
    for most, first, least, wanted in (
        (6, 1, 3, [1, 1, 1, 1, 0, 0]),
        (2, 1, 3, [1, 1]),
        (6, 0, 3, [0] * 6),
        (6, 1, 5, [0] * 6),
        (0, 1, 3, []),
    ):
        flags = row([first, *[1] * (most - 1), *[7] * 3][: most + 3], device, torch.int32)
        behind = flags[most:].tolist()
        out = Match.empty(most, device)
        found = look_up(text, 9, most, least, flags=flags, out=out)
        assert flags.tolist() == wanted + behind
        assert found.matched.data_ptr() == out.matched.data_ptr()
        assert found.matched.tolist() == [4 if least <= 4 else 0]
        assert out.tokens.tolist() == [0, 1, 2, 3, 4, 0][:most]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs programs side by side by itself")
@pytest.mark.usefixtures("guarded_workspaces")
def test_any_program_may_be_the_last(device):
    """The meeting place is as before, and serves texts of any length one after the other."""
    dice, arrivals = random.Random(1), torch.zeros(2, dtype=torch.int64, device=device)
    text = row([dice.randrange(3) for _ in range(4 * PLACES)], device)
    for order in range(5):
        length = row([dice.choice((1, 900, PLACES + 1, 3 * PLACES, 4 * PLACES))], device)
        wanted = reference(text, length, 15, LEAST)
        with side_by_side(order) as switches:
            found = kernel(text, length, 15, LEAST, arrivals=arrivals)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
        assert arrivals.tolist() == [0, 0]
        assert switches[0] > 4


@EITHER
def test_what_does_not_fit_is_said(device, look_up):
    text = row([1, 2, 3], device)
    for given, more, words in (
        ((text.int(), 3, 2, 3), {}, r"look_up: text is \[3\] torch.int32"),
        ((text[:0], 0, 2, 3), {}, r"look_up: text is \[0\]"),
        ((text, 4, 2, 3), {}, "look_up: length is 4; it must be from 1 to the text's room, 3"),
        ((text, 3, 16, 3), {}, "look_up: most is 16; it must be a whole number from 0 to 15"),
        ((text, 3, 2, 0), {}, "look_up: least is 0; it must be a whole number from 1 to 15"),
        ((text, 3, 3, 3), {"flags": row([1, 0, 0], device, torch.int32)}, r"flags is \[3\]; 3 drafts have \[4"),
        ((text, 3, 1, 3), {"flags": text}, r"look_up: flags is \[3\] torch.int64"),
        ((text, 3, 1, 3), {"arrivals": text}, r"look_up: arrivals is \[3\]"),
        ((text, 3, 1, 3), {"out": Match.empty(2, device)}, r"look_up: tokens is \[2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            look_up(*given, **more)
    with pytest.raises(TypeError, match="look_up: length is"):
        look_up(text, row([3], device, torch.int32), 1, 3)
