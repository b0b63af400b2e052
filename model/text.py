"""Tokenizers, and turning a stream of tokens into a stream of text."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import KangarooError, reason

PROMPT_TOKENS = 16
"""Of the prompt's end, that the new text is decoded with: whether it begins with a space depends on them."""

REPLACEMENT = "\ufffd"
"""What decoders write in the place of bytes that make no character."""

MOST_MISSING = 3
"""The most bytes, and so tokens, after which a character of UTF-8 can still be incomplete."""

LONGEST_RUN = 64
"""Tokens that are decoded together at most, where they never make whole characters."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def check_characters(text: str, what: str) -> None:
    """Raise where a half of a surrogate pair stands alone in ``what``: tokenizers refuse it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise KangarooError(f"{what} holds a lone surrogate, which is no character; give valid Unicode text.")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer through transformers; None where the folder holds none.

    Raises:
        KangarooError: files that are damaged, or a ``tokenizer.model`` and no packages to read it.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        try:  # without them transformers asks for a package that would not help
            for module in ("sentencepiece", "google.protobuf"):
                import_module(module)
        except ImportError as error:
            raise KangarooError(
                f"{folder}: its tokenizer.model is read with two packages; run: pip install sentencepiece protobuf."
            ) from error
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("")  # lifts a truncation that tokenizer.json asks for, which threads must not do at the same time
    except Exception as error:  # each tokenizer library raises its own kinds
        raise KangarooError(f"{folder}: the tokenizer cannot be loaded ({reason(error)}).") from error
    return tokenizer


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def begins_whole(tokens: Sequence[int], tokenizer: Any) -> bool:
    """Whether they begin with a whole character.

    Some decoders write no character of a run of bytes whose last one is incomplete, so it is left out on trial.
    """
    trials = (tokens[: len(tokens) - missing] for missing in range(MOST_MISSING + 1))
    return any(not decode(tokenizer, trial).startswith(REPLACEMENT) for trial in trials)


def end_of(prompt: Sequence[int], tokenizer: Any) -> list[int]:
    """Its last tokens: ``PROMPT_TOKENS``, or more where these begin in the middle of a character."""
    for count in range(PROMPT_TOKENS, LONGEST_RUN):
        tokens = list(prompt[-count:])
        if len(tokens) < count or begins_whole(tokens, tokenizer):
            break
    return tokens


def whole_length(tokens: Sequence[int], tokenizer: Any) -> int:
    """How long their text is without a character of which bytes are missing at the end.

    Tokens are left out on trial, for the decoders that ``begins_whole`` speaks of.
    """
    trials = (decode(tokenizer, tokens[: len(tokens) - missing]) for missing in range(MOST_MISSING + 1))
    return max(len(text.rstrip(REPLACEMENT)) for text in trials)


class TextStream:
    """Tokens in, text out: the prompt's text and what comes out are the text of all tokens together.

    It holds back a character of which bytes are missing, for at most three tokens, and whatever may begin a stop
    string. What is out stays: where bytes follow that make no character, some tokenizers would turn the characters
    before them into U+FFFD as well.

    Args:
        tokenizer: decodes; None gives no text.
        stop_strings: end the text before them.
        prompt: the tokens before.
        least: new tokens in whose text no stop string is looked for.

    Attributes:
        stopped: whether a stop string was completed.
    """

    def __init__(
        self, tokenizer: Any, stop_strings: tuple[str, ...] = (), prompt: Sequence[int] = (), least: int = 0
    ) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.tokens = [] if tokenizer is None else end_of(prompt, tokenizer)
        self.stopped = False
        self._free = least  # tokens that no stop string is looked for in
        self._context = 0  # the first of the tokens that are decoded together
        self._prompt = "" if tokenizer is None else self._text()  # may end in a character that is incomplete
        self._whole = 0 if tokenizer is None else whole_length(self.tokens, tokenizer)  # of it, without that character
        self._settled = 0 if self._prompt.endswith(REPLACEMENT) else len(self.tokens)  # these end in a whole character
        self._given = self._length = len(self._prompt)  # of the text of these tokens: what is out, and all of it
        self._forming = 0  # tokens that may belong to one character
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        if self.tokenizer is None:
            return ""
        self.tokens.append(token)
        text = self._text()
        incomplete = len(text) - len(text.rstrip(REPLACEMENT))
        if len(text) < self._length:  # bytes have just become a character, which may itself be this one
            incomplete = 0
        self._forming = self._forming + 1 if incomplete else 0
        if self._forming > MOST_MISSING:  # so they are no single character, but the last of them may begin one
            incomplete = min(incomplete, MOST_MISSING)
        self._length = len(text)
        piece = self._take(text, incomplete)
        if piece and not incomplete:
            self._decode_from(self._settled, incomplete)
        elif len(self.tokens) - self._context > LONGEST_RUN:
            self._decode_from(len(self.tokens) - len(self._shorter_run()), incomplete)
        return self._release(piece)

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        if self.tokenizer is None or self.stopped:
            return ""
        text = self._text()
        piece = self._release(self._take(text, incomplete=0))
        if self.stopped:
            return piece
        piece, self._held = piece + self._held, ""
        return piece

    def _take(self, text: str, incomplete: int) -> str:
        """What of ``text`` but its last ``incomplete`` characters is not out yet.

        This includes a character that the prompt left incomplete, once it is whole.
        """
        if not incomplete and not text.startswith(self._prompt):
            self._given, self._prompt = self._whole, ""
        piece = text[self._given : len(text) - incomplete]
        self._given += len(piece)
        return piece

    def _decode_from(self, first: int, incomplete: int) -> None:
        """Leave out the tokens before ``first`` from now on; the last ``incomplete`` characters are not out yet."""
        self._context, self._settled, self._prompt = first, len(self.tokens), ""
        self._length = len(self._text())
        self._given = self._length - incomplete

    def _shorter_run(self) -> list[int]:
        """Half of ``LONGEST_RUN`` tokens, or up to three more for a whole character at the beginning."""
        runs = [self.tokens[-count:] for count in range(LONGEST_RUN // 2, LONGEST_RUN // 2 + MOST_MISSING + 1)]
        return next((run for run in runs if begins_whole(run, self.tokenizer)), runs[0])

    def _text(self) -> str:
        return decode(self.tokenizer, self.tokens[self._context :])

    def _release(self, text: str) -> str:
        if self._free:
            self._free -= 1
            return text
        text = self._held + text
        found = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self.stop_strings), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that ``stop`` begins with."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
