"""``weigh``: the surer drafts are made, and what became of the last ones counts."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kangaroo_kernels.contract import Experience, Weighed
from kangaroo_kernels.reference.weigh import weigh as reference
from kangaroo_kernels.weigh import weigh as kernel

EITHER = pytest.mark.parametrize("weigh", [reference, kernel], ids=["reference", "kernel"])
KINDS, USUAL = (3, 5, 9, 15), (0.7, 0.75, 0.85, 0.97)
NEVER = 2.0


class Text:
    """Steps of a text: what is made in each, on the device and by the lengths alone."""

    def __init__(self, weigh: Any, device: torch.device, beside: float = 1.0) -> None:
        self.weigh, self.device, self.length = weigh, device, 10
        self.experience = Experience.none(KINDS, USUAL, device)
        self.experience.beside.fill_(beside)

    def row(self, values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def step(
        self, matched: int, agreed: int = 0, thresholds: Any = (0.0,) * 15, room: int = 99, **more: Any
    ) -> Weighed:
        """Drafts after a match of that length, of which ``agreed`` will stand."""
        limit = self.length + 1 + room
        numbers = self.row([self.length]), self.row([limit])
        given = self.row([matched]), self.row(list(thresholds), torch.float32)
        found = self.weigh(*given, *numbers, self.experience, **more)
        self.length += agreed + 1
        return found

    def drafts(self, *args: Any, **more: Any) -> int:
        return int(self.step(*args, **more).made.sum())

    def sure(self, matched: int) -> float:
        """How sure such a match's tokens are; it learns nothing and drafts nothing."""
        held = Experience(*(each.clone() for each in self.experience))
        held.beside.zero_()
        numbers = self.row([self.length]), self.row([self.length + 99])
        return float(self.weigh(self.row([matched]), self.row([0.0], torch.float32), *numbers, held).sure)


@EITHER
def test_longer_matches_are_surer(device, weigh):
    text = Text(weigh, device)
    sure = [text.sure(matched) for matched in range(3, 16)]
    assert sure == sorted(sure)
    assert sure[:1] + sure[-1:] == pytest.approx([USUAL[0], USUAL[-1]])
    assert text.sure(2) == 0


@EITHER
def test_what_failed_is_tried_again_later(device, weigh):
    text = Text(weigh, device)
    assert text.drafts(4, agreed=0) == 4
    usual, after = text.sure(5), text.sure(4)
    assert usual == pytest.approx(USUAL[1])
    assert after == pytest.approx(3 * USUAL[0] / 4)  # one token was compared, and none stood
    for _ in range(30):
        text.step(0, agreed=1)
    assert after < text.sure(4) < USUAL[0]


@EITHER
def test_what_stood_is_surer(device, weigh):
    text = Text(weigh, device)
    assert text.drafts(9, agreed=9) == 9
    assert text.sure(9) == pytest.approx((3 * USUAL[2] + 9) / 12)


@EITHER
def test_the_others_drafts_are_counted(device, weigh):
    """Where it made none, nothing is learned of it."""
    text = Text(weigh, device)
    for _ in range(100):
        text.step(0, agreed=3)
    assert float(text.experience.beside) == pytest.approx(3, abs=0.05)
    text.step(0, agreed=0, thresholds=[NEVER] * 5)
    before = float(text.experience.beside)
    text.step(0)
    assert float(text.experience.beside) == before


@EITHER
def test_whichever_expects_more_drafts(device, weigh):
    """A match of m tokens is worth m drafts, within the thresholds, the room and the text's growth."""
    four = USUAL[0] + USUAL[0] ** 2 + USUAL[0] ** 3 + USUAL[0] ** 4
    for beside, more, wanted in (
        (four - 0.01, {}, 4),
        (four + 0.01, {}, 0),
        (0.0, {"thresholds": [0.69] * 15}, 4),
        (0.0, {"thresholds": [0.71] * 15}, 0),
        (0.0, {"thresholds": [0.5] * 2 + [NEVER] * 13}, 2),
        (0.0, {"thresholds": [NEVER] * 15}, 0),
        (0.0, {"thresholds": []}, 0),
        (0.0, {"room": 3}, 3),
        (0.0, {"room": 0}, 0),
        (four - 0.01, {"room": 3}, 0),  # so few are not worth it
    ):
        text = Text(weigh, device, beside)
        flags = text.row([1, 7], torch.int32)
        found = text.step(4, flags=flags, **more)
        assert found.made.tolist() == [1] * wanted + [0] * (len(found.made) - wanted)
        assert found.sure.tolist() == pytest.approx(found.made.mul(USUAL[0]).tolist())
        assert flags.tolist() == [int(not wanted), 7]
    assert Text(weigh, device, 0.0).drafts(2) == 0


@EITHER
def test_a_text_that_has_ended_learns_nothing(device, weigh):
    text = Text(weigh, device)
    text.step(4)
    before, flags = [each.tolist() for each in text.experience], text.row([0], torch.int32)
    out = Weighed(torch.full((3,), 7, dtype=torch.int32, device=device), torch.full((3,), 7.0, device=device))
    found = text.step(15, thresholds=[0.0] * 3, flags=flags, out=out)
    assert found.made.data_ptr() == out.made.data_ptr()
    assert [each.tolist() for each in (*out, flags)] == [[0] * 3, [0.0] * 3, [0]]
    assert [each.tolist() for each in text.experience] == before


def test_both_learn_and_choose_the_same_to_the_bit(device):
    dice, ours, theirs = random.Random(0), Text(kernel, device), Text(reference, device)
    chosen = set()
    for _ in range(300):
        drafts = dice.randint(0, 15)
        threshold = dice.choice((0.0, 0.4, 0.8))
        given = dice.choice((0, 3, 4, 7, 12, 15)), dice.randint(0, drafts), [threshold] * drafts, dice.randint(0, 20)
        found = [text.step(*given) for text in (ours, theirs)]
        assert found[0].made.tolist() == found[1].made.tolist()
        assert torch.equal(found[0].sure, found[1].sure)
        for mine, other in zip(ours.experience, theirs.experience, strict=True):
            assert torch.equal(mine, other)
        chosen.add(int(found[0].made.sum()))
    assert len(chosen) > 8


@EITHER
def test_what_does_not_fit_is_said(device, weigh):
    text = Text(weigh, device)
    given = [text.row([4]), torch.zeros(3, device=device), 5, 9, text.experience]
    for place, bad, words in (
        (0, text.row([4, 5]), r"weigh: matched is \[2\]"),
        (1, torch.zeros(3, 1, device=device), r"weigh: thresholds is \[3, 1\]"),
        (1, torch.zeros(16, device=device), "weigh takes fewer than 16 drafts and at most 16 kinds, got 16 and 4"),
        (2, -1, "weigh: length is -1"),
        (4, text.experience._replace(beside=text.row([1])), r"weigh: beside is \[1\] torch.int64"),
    ):
        with pytest.raises(ValueError, match=words):
            weigh(*[bad if index == place else each for index, each in enumerate(given)])
    with pytest.raises(ValueError, match=r"weigh: made is \[2\]"):
        weigh(*given, out=Weighed.empty(2, device))
