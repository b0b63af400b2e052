"""A race of plain decoding and Kangaroo: the texts of each alone, in turns by the time that each has taken."""

import time
from dataclasses import replace

import pytest
from conftest import Pair

from kangaroo_kernels import Settings
from kangaroo_kernels.model.evaluation.loops import looping_tokens
from kangaroo_kernels.model.evaluation.race import Race

SETTINGS = Settings(max_new_tokens=60, temperature=0.7, seed=4, draft_confidence_threshold=0.0)


def test_the_texts_are_those_of_each_alone(pair: Pair) -> None:
    kangaroo = pair.load()
    race = Race(kangaroo, SETTINGS, "ABC")
    race.finish()
    alone = kangaroo.generate("ABC", SETTINGS)
    for text in (race.plain, race.drafted):
        assert text.outcome.tokens == alone.tokens
        assert text.outcome.text == alone.text
    assert race.plain.outcome.stats.drafted == 0
    assert race.drafted.outcome.stats.accepted_at == alone.stats.accepted_at
    comparison = race.comparison("abc")
    assert (comparison.name, comparison.identical) == ("abc", True)
    assert comparison.looping == looping_tokens(alone.tokens)
    assert comparison.speedup == comparison.kangaroo_tokens_per_second / comparison.plain_tokens_per_second


def test_a_random_seed_is_one_for_both(pair: Pair) -> None:
    race = Race(pair.load(), replace(SETTINGS, seed=None), "ABC")
    race.finish()
    assert race.comparison("abc").identical


def test_a_difference_is_seen(pair: Pair) -> None:
    race = Race(pair.load(), SETTINGS, "ABC")
    race.finish()
    race.plain.outcome.tokens[-1] += 1
    assert not race.comparison("abc").identical


def test_whoever_took_less_time_goes_next(pair: Pair) -> None:
    """At every step, but for the one that has ended."""
    race = Race(pair.load(), SETTINGS, "ABC")
    took = {race.plain: 0.0, race.drafted: 0.0}
    for text, _ in race:
        other = race.drafted if text is race.plain else race.plain
        assert took[text] <= took[other] or other.outcome.finish_reason is not None
        took[text] = text.outcome.stats.decode_seconds


@pytest.mark.parametrize(("processor", "disturbed"), [(0.5, True), (0.99, False)])
def test_a_busy_machine_is_seen(pair: Pair, monkeypatch: pytest.MonkeyPatch, processor: float, disturbed: bool) -> None:
    """By the share of the time in which the process had a processor."""
    race = Race(pair.load(), SETTINGS, "ABC")
    monkeypatch.setattr(time, "process_time", lambda: processor * time.perf_counter())
    race.finish()
    assert race.disturbed is disturbed
