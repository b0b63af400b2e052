"""What the terminal shows, as text with its colour codes."""

import io

import pytest
from conftest import Pair
from rich.console import Console

from kangaroo_kernels import DecodeStats, Generation, Settings
from kangaroo_kernels.model.commands.show import show_comparisons, show_steps, summary, track
from kangaroo_kernels.model.commands.side_by_side import show_race
from kangaroo_kernels.model.evaluation.compare import Comparison
from kangaroo_kernels.model.evaluation.race import Race


def terminal() -> Console:
    return Console(record=True, force_terminal=True, color_system="standard", width=80, file=io.StringIO())


def test_tokens_have_the_colour_of_their_origin(pair: Pair) -> None:
    steps = list(pair.load().progress("ABC", max_new_tokens=40, draft_confidence_threshold=0.0))
    assert any(step.commit.accepted for step in steps)
    console = terminal()
    show_steps(console, "name", "one\ntwo\nthree\nfour\nfive\n", steps)
    _, prompt_and_text = console.export_text(styles=True).split("─\x1b[0m\n")
    expected = "\x1b[2mtwo\x1b[0m\n\x1b[2mthree\x1b[0m\n\x1b[2mfour\x1b[0m\n\x1b[2mfive\x1b[0m\n"
    for step in steps:
        for index, piece in enumerate(step.pieces):
            expected += f"\x1b[{'32' if index < step.commit.accepted else '1;33'}m{piece}\x1b[0m" if piece else ""
    assert prompt_and_text == expected + "\n"


def test_pieces_are_the_text_of_each_token(pair: Pair) -> None:
    for step in pair.load().progress("ABC", max_new_tokens=40):
        assert len(step.pieces) == len(step.commit.tokens)
        assert step.generation.text.endswith(step.text)


@pytest.mark.parametrize(
    ("generation", "line"),
    [
        (
            Generation("", [], DecodeStats(8, 8, 0, 0, [], 0.1, 2.0), "length"),
            "8 tokens in 2.00 s (4 tokens/s); the wanted length was reached.",
        ),
        (
            Generation("", [], DecodeStats(8, 4, 6, 4, [4], 0.1, 2.0), "context"),
            "8 tokens in 2.00 s (4 tokens/s), 2.00 tokens a verification step, 67% of the drafts accepted; "
            "the model's context is full.",
        ),
        (
            Generation("", [], DecodeStats(8, 4, 6, 4, [4], 0.1, 2.0, steps_without_drafts=1), "stop"),
            "8 tokens in 2.00 s (4 tokens/s), 2.00 tokens a verification step, 67% of the drafts accepted, "
            "25% of the steps without drafts; the text came to its end.",
        ),
    ],
)
def test_summary(generation: Generation, line: str) -> None:
    assert summary(generation) == line


def test_a_table_fits_a_terminal_of_eighty_columns() -> None:
    stats = DecodeStats(100, 40, 120, 66, [38, 20, 2])
    console = terminal()
    show_comparisons(
        console, [Comparison(name, 1000, 1250, 1.25, True, stats, 20) for name in ("functools.py", "abc.py")]
    )
    text = console.export_text()
    rows = [line.split() for line in text.splitlines()]
    assert ["functools.py", "1000", "1250", "1.25x", "2.50", "55%", "20%", "yes"] in rows
    assert ["all", "1000", "1250", "1.25x", "2.50", "55%", "20%", "yes"] in rows
    assert ["3", "██", "5%"] in rows
    assert "…" not in text
    show_comparisons(console, [])
    assert console.export_text() == ""


def test_tracking_passes_everything_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "measuring", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_race_stands_side_by_side(pair: Pair) -> None:
    """The text of plain decoding has no colour, Kangaroo's has those of its origins; the figures stand below."""
    race = Race(pair.load(), Settings(max_new_tokens=30, draft_confidence_threshold=0.0), "ABC")
    console = terminal()
    show_race(console, "letters", "ABC", race)
    shown = console.export_text(styles=True)
    assert "letters" in shown
    assert "ABC" in shown
    *_, picture = shown.split("plain decoding")
    assert "\x1b[32m" in picture
    assert "\x1b[1;33m" in picture
    assert picture.count("30 tokens in ") == 2
