"""A conversation as tokens, through the target's chat template, and which of them the assistant writes."""

from typing import Any, NamedTuple

from ..errors import KangarooError
from .records import Message


class Text(NamedTuple):
    """A text's tokens.

    Attributes:
        tokens: all of them.
        written: of each token, whether the model would write it; it only reads the others.
    """

    tokens: list[int]
    written: list[bool]


class Turn(NamedTuple):
    """A user's turn that has just begun.

    Attributes:
        messages: before it.
        tokens: of these, and those before the user's first words.
        after: the text that follows the user's last word.
    """

    messages: list[Message]
    tokens: list[int]
    after: str


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: transformers' own.
        ends: the tokens that end a turn.

    Raises:
        KangarooError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: Any, ends: set[int]) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise KangarooError(
                "this model's tokenizer has no chat template, which conversations need; give texts instead, to "
                "generate-data with --prompts."
            )
        self.tokenizer, self.ends = tokenizer, ends

    def render(self, messages: list[Message], place: str, answering: bool = False) -> list[int]:
        """The tokens of some turns; ``answering`` adds what the template puts before an answer.

        Raises:
            KangarooError: the template refuses the turns, with its own words.
        """
        return self._render(messages, place, answering)[1]

    def read(self, messages: list[Message], place: str) -> Text:
        """A conversation's tokens; every answer counts as written, up to the token that ends its turn.

        The template is asked again for each beginning of the conversation. A template that renders a beginning in
        another way than within the whole would have the adapter learn from texts that decoding never sees. Where an
        answer's first characters make one token with what stands before them, as a line break after a line break,
        that token counts as written.

        Raises:
            KangarooError: such a template, or one that refuses the turns.
        """
        text, tokens = self._render(messages, place)
        written = [False] * len(tokens)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, before = self._render(messages[:index], place, answering=True)
            answered, through = self._render(messages[: index + 1], place)
            if not (text.startswith(answered) and answered.startswith(asked)):
                raise KangarooError(
                    f"{place}: the model's chat template changes the earlier turns when later ones follow, or puts "
                    "other words before an answer than decoding does; give conversations of one answer."
                )
            start, stop = (length_in_common(tokens, part) for part in (before, through))
            end = next((at + 1 for at in range(start, stop) if tokens[at] in self.ends), stop)
            written[start:end] = [True] * (end - start)
        return Text(tokens, written)

    def check(self, messages: list[Message], place: str) -> None:
        """Have the template render some turns, if there are any, and the beginning of an answer.

        Raises:
            KangarooError: it refuses them.
        """
        if messages:
            self._apply(messages, place, add_generation_prompt=True, tokenize=False)

    def open_turn(self, messages: list[Message], place: str) -> Turn:
        """The beginning of a user's turn behind ``messages``.

        Raises:
            KangarooError: the template refuses the messages, or does not show the user's words.
        """
        mark = "KANGAROO"
        text = self._apply([*messages, {"role": "user", "content": mark}], place, tokenize=False)
        before, found, after = text.rpartition(mark)
        if not found:
            raise KangarooError("this model's chat template does not show the user's words; give --prompts.")
        return Turn(messages, list(self.tokenizer(before, add_special_tokens=False)["input_ids"]), after)

    def _render(self, messages: list[Message], place: str, answering: bool = False) -> tuple[str, list[int]]:
        text = self._apply(messages, place, add_generation_prompt=answering, tokenize=False)
        return text, list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _apply(self, messages: list[Message], place: str, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **how)
        except Exception as error:  # a template may raise anything
            raise KangarooError(f"{place}: the model's chat template refuses it ({str(error).strip()}).") from error


def length_in_common(tokens: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((at for at, (token, other) in pairs if token != other), min(len(tokens), len(others)))
