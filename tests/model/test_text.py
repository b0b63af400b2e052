"""Text as it comes: no character is lost, none is torn, none is held back longer than it can be incomplete."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_callers import byte_tokens, word_tokenizer

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.text import LONGEST_RUN, MOST_MISSING, TextStream

FEW_BYTES = st.sampled_from([*b"a\xf0\x9f\x98\x81\xe2\x82\xac\xef\xbf\xbd\xc3\xa9\x80\xff"])


class Bytes:
    """A byte-level tokenizer: bytes that make no character become U+FFFD."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class Never:
    """A tokenizer that knows no token."""

    def __init__(self) -> None:
        self.longest = 0

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        self.longest = max(self.longest, len(tokens))
        return "\ufffd" * len(tokens)


def pieces_of(tokenizer: Any, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    stream = TextStream(tokenizer, prompt=prompt)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(st.lists(FEW_BYTES, max_size=40), st.lists(FEW_BYTES, max_size=10))
def test_any_bytes(tokens, prompt):
    """The prompt ends with a whole character; what was not given yet is at most one that is incomplete."""
    tokenizer, prompt = Bytes(), [*prompt, ord("b")]
    pieces, out = pieces_of(tokenizer, tokens, prompt), tokenizer.decode(prompt)
    for count, piece in enumerate(pieces, start=1):
        out += piece
        known = tokenizer.decode([*prompt, *tokens[:count]])
        assert known.startswith(out)
        assert set(known[len(out) :]) <= {"\ufffd"}
        assert len(known) - len(out) <= MOST_MISSING
    assert out == tokenizer.decode([*prompt, *tokens])


@given(st.text("aé€😁\ufffd", max_size=20), st.integers(0, 50))
def test_characters_in_bytes_of_a_word_tokenizer(text, cut):
    check_cut(text, min(cut, 1 + len(text.encode())))


@pytest.mark.parametrize("cut", range(60, 200, 7))
def test_a_long_run_of_bytes_that_the_prompt_ends_in(cut):
    check_cut("😁é€" * 25, cut)


def check_cut(text: str, cut: int) -> None:
    """The decoder takes a run of bytes as a whole, and writes U+FFFD for every byte of one that is incomplete."""
    tokenizer, tokens = word_tokenizer(), [1, *byte_tokens(text), 2, 3]
    known, whole = tokenizer.decode(tokens[: 1 + cut]), tokenizer.decode(tokens)
    if not whole.startswith(known):  # its last character has become whole
        known = "Once" + text.encode()[:cut].decode(errors="ignore")
    assert known + "".join(pieces_of(tokenizer, tokens[1 + cut :], tokens[: 1 + cut])) == whole


def test_a_character_is_out_with_its_last_byte():
    tokenizer = word_tokenizer()
    pieces = pieces_of(tokenizer, [*byte_tokens("é😁a"), 2], [1])
    assert pieces == ["", "é", "", "", "", "😁", "a", " upon", ""]


def test_a_tokenizer_that_knows_nothing():
    tokenizer = Never()
    pieces = pieces_of(tokenizer, range(1000))
    assert "".join(pieces) == "\ufffd" * 1000
    assert all(len("".join(pieces[: count + 1])) >= count - MOST_MISSING for count in range(1000))
    assert tokenizer.longest <= 2 * LONGEST_RUN + 1  # and not the whole text at every token


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_string_over_the_borders_of_tokens(pair, plain, size):
    """Of characters that are a token each, on every step's border."""
    kangaroo = pair.load(device="cpu")
    text = kangaroo.generate("ABC", max_new_tokens=30, plain=True).text
    for begin in range(30 - size):
        stop = text[begin : begin + size]
        steps = list(kangaroo.progress("ABC", max_new_tokens=30, plain=plain, stop=[stop, "never"]))
        assert "".join(step.text for step in steps) == text[: text.index(stop)]
        assert steps[-1].generation.finish_reason == "stop"


def test_a_stop_string_that_is_a_special_token(pair):
    """Special tokens have no text, so only their id can be found."""
    kangaroo = pair.load(device="cpu")
    free = kangaroo.generate("ABC", max_new_tokens=30)
    character = free.text[5]
    kangaroo.tokenizer.add_special_tokens({"pad_token": character})
    assert kangaroo.tokenizer.decode(free.tokens[5:6], skip_special_tokens=True) == ""
    stopped = kangaroo.generate("ABC", max_new_tokens=30, stop=character)
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[5]) + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(character)]


@pytest.mark.parametrize("settings", [{}, {"plain": True}, {"stop": ["l"]}])
def test_the_reason_of_the_end_is_known_at_the_end(pair, settings):
    kangaroo: Kangaroo = pair.load(device="cpu")
    text = kangaroo.progress("ABC", max_new_tokens=30, **settings)
    reasons = [step.generation.finish_reason for step in text]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == ("stop" if settings.get("stop") else "length")
    text.close()
    assert text.outcome.finish_reason == reasons[-1]
    unread = kangaroo.progress("ABC", max_new_tokens=3)
    unread.close()
    assert (unread.outcome.finish_reason, next(unread, None)) == ("abort", None)
