"""Comparisons of plain decoding and Kangaroo, of one prompt and of several."""

import random

import pytest
from conftest import Pair

from kangaroo_kernels import DecodeStats, KangarooError, Settings
from kangaroo_kernels.model.evaluation.compare import Comparison, compare, report, summarise
from kangaroo_kernels.model.evaluation.loops import looping_tokens


def comparison(plain: float, kangaroo: float, identical: bool = True, looping: int = 0, **counts: object) -> Comparison:
    return Comparison("p", plain, kangaroo, kangaroo / plain, identical, DecodeStats(**counts), looping)


def test_one_prompt(pair: Pair) -> None:
    kangaroo = pair.load()
    result = compare(kangaroo, "ABC", name="abc", rounds=2, max_new_tokens=20, temperature=0.7, seed=3)
    counts = kangaroo.generate("ABC", max_new_tokens=20, temperature=0.7, seed=3).stats
    assert result.identical
    assert result.name == "abc"
    assert result.stats.accepted_at == counts.accepted_at
    assert result.speedup == pytest.approx(result.kangaroo_tokens_per_second / result.plain_tokens_per_second)


def test_a_random_seed_is_the_same_for_both(pair: Pair) -> None:
    assert compare(pair.load(), "ABC", rounds=1, max_new_tokens=20, temperature=2.0, seed=None).identical


def test_a_difference_is_seen(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    kangaroo = pair.load()
    generate = kangaroo.generate

    def wrong(prompt: str, settings: Settings) -> object:
        return generate(prompt if settings.plain else prompt[::-1], settings)

    monkeypatch.setattr(kangaroo, "generate", wrong)
    assert not compare(kangaroo, "ABC", rounds=1, max_new_tokens=20).identical


def test_no_room_for_a_token_is_no_speed(pair: Pair) -> None:
    result = compare(pair.load(), [1] * 512, rounds=1, max_new_tokens=5)
    assert (result.stats.new_tokens, result.speedup, result.identical) == (0, 0.0, True)


def test_rounds_must_be_at_least_one(pair: Pair) -> None:
    with pytest.raises(KangarooError, match="rounds is 0"):
        compare(pair.load(), "ABC", rounds=0, max_new_tokens=5)


def test_all_together() -> None:
    parts = [
        comparison(100, 110, looping=9, new_tokens=10, verification_steps=5, drafted=8, accepted=4, accepted_at=[3, 1]),
        comparison(
            200, 300, looping=18, new_tokens=20, verification_steps=5, drafted=12, accepted=9, accepted_at=[4, 3, 2]
        ),
        comparison(100, 140, identical=False, new_tokens=6, verification_steps=6, draft_steps=3),
    ]
    total = summarise(parts)
    assert (total.plain_tokens_per_second, total.kangaroo_tokens_per_second) == (100, 140)
    assert total.speedup == 1.4
    assert not total.identical
    assert total.stats.accepted_at == [7, 4, 2]
    assert total.stats.mean_acceptance_length == 36 / 16
    assert total.stats.draft_acceptance_rate == 13 / 20
    assert total.as_dict()["draft_steps"] == 3
    assert total.looping_share == 27 / 36
    assert report([]) == {"prompts": [], "total": None}
    assert report(parts)["total"] == total.as_dict()


FRESH = list(range(1000, 1100))


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([], 0),
        (FRESH, 0),
        ([5] * 16, 0),
        ([5] * 17, 16),
        ([1, 2, 3, 4] * 4 + [1], 0),
        ([1, 2, 3, 4] * 5, 16),
        (FRESH[:20] * 2, 0),
        (FRESH[:20] * 3, 40),
        (FRESH[:20] * 3 + [7] + FRESH[:20], 40),
        (FRESH[:20] + [5] * 30 + FRESH[20:40], 29),
        (list(range(129)) * 4, 0),  # longer than any loop that is looked for
        (list(range(128)) * 3, 256),
    ],
)
def test_tokens_in_loops(tokens: list[int], looping: int) -> None:
    assert looping_tokens(tokens) == looping


def test_a_loop_is_counted_once() -> None:
    """A stretch of one token has every period; loops side by side add up."""
    assert looping_tokens([5] * 200) == 199
    assert looping_tokens([5] * 100 + FRESH + [6, 7] * 50) == 99 + 98


def test_random_text_has_no_loops() -> None:
    dice = random.Random(1)
    assert looping_tokens([dice.randrange(9) for _ in range(2000)]) == 0


def test_a_comparison_counts_the_loops(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr(
        "kangaroo_kernels.model.evaluation.compare.looping_tokens", lambda tokens: looked_at.append(tokens) or 7
    )
    assert compare(pair.load(), "ABC", rounds=1, max_new_tokens=9).looping == 7
    assert looked_at == [pair.load().generate("ABC", max_new_tokens=9).tokens]
