"""Comparisons of plain decoding and Kangaroo, of one prompt and of several."""

import pytest
from conftest import Pair

from kangaroo_kernels import DecodeStats, KangarooError, Settings
from kangaroo_kernels.model.evaluation.compare import Comparison, compare, compare_all, report, summarise


def comparison(plain: float, kangaroo: float, identical: bool = True, **counts: object) -> Comparison:
    return Comparison("p", plain, kangaroo, kangaroo / plain, identical, DecodeStats(**counts))


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
        comparison(100, 110, new_tokens=10, verification_steps=5, drafted=8, accepted=4, accepted_at=[3, 1]),
        comparison(200, 300, new_tokens=20, verification_steps=5, drafted=12, accepted=9, accepted_at=[4, 3, 2]),
        comparison(100, 140, identical=False, new_tokens=6, verification_steps=6),
    ]
    total = summarise(parts)
    assert (total.plain_tokens_per_second, total.kangaroo_tokens_per_second) == (100, 140)
    assert total.speedup == 1.4
    assert not total.identical
    assert total.stats.accepted_at == [7, 4, 2]
    assert total.stats.mean_acceptance_length == 36 / 16
    assert total.stats.draft_acceptance_rate == 13 / 20
    assert report([]) == {"prompts": [], "total": None}
    assert report(parts)["total"] == total.as_dict()


def test_each_prompt_keeps_its_name(pair: Pair) -> None:
    results = compare_all(pair.load(), {"first": "ABC", "second": "xyz"}, rounds=1, max_new_tokens=4)
    assert [result.name for result in results] == ["first", "second"]
