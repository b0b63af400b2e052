"""Tokenizers, and turning a stream of tokens into a stream of text."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import KangarooError, reason

PROMPT_TOKENS = 16
"""Of the prompt's end, that the new text is decoded with: whether it begins with a space depends on them."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


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
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer library raises its own kinds
        raise KangarooError(f"{folder}: the tokenizer cannot be loaded ({reason(error)}).") from error


class TextStream:
    """Tokens in, text out: the prompt's text and what comes out are the text of all tokens together.

    It holds back bytes that do not make a character yet, and whatever may begin a stop string.

    Attributes:
        stopped: whether a stop string was completed.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.tokens = list(prompt[-PROMPT_TOKENS:])
        self.stopped = False
        self._settled = len(self.tokens)  # tokens whose text is known
        self._context = 0  # tokens before them that decoding needs for its spaces
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        if self.tokenizer is None:
            return ""
        self.tokens.append(token)
        after = self._text(self._context, len(self.tokens))
        before = self._known(after)
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._context, self._settled = self._settled, len(self.tokens)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        if self.tokenizer is None or self.stopped:
            return ""
        after = self._text(self._context, len(self.tokens))
        rest = after[len(self._known(after)) :]
        self._context = self._settled = len(self.tokens)
        piece = self._release(rest)
        if self.stopped:
            return piece
        piece, self._held = piece + self._held, ""
        return piece

    def _known(self, after: str) -> str:
        """What is known of ``after``; a character that the prompt left incomplete is not, once it is whole."""
        known = self._text(self._context, self._settled)
        return known if after.startswith(known) else known.rstrip("\ufffd")

    def _text(self, first: int, last: int) -> str:
        decoded = self.tokenizer.decode(
            self.tokens[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def _release(self, text: str) -> str:
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
