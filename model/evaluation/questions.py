"""Questions as Spec-Bench keeps them: a JSON object a line, with ``question_id``, ``category`` and ``turns``.

SPEED-Bench's have the same fields and others, which are not read. Sources: github.com/hemingkx/Spec-Bench,
huggingface.co/datasets/nvidia/SPEED-Bench.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..chat import chat_tokens
from ..errors import KangarooError

NOT_FILLED_IN = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
"""What SPEED-Bench has in the place of texts that its owners may not pass on."""


@dataclass(frozen=True)
class Question:
    """What a user says.

    Attributes:
        question_id: a number in Spec-Bench, a text in SPEED-Bench.
        category: of the question, such as ``writing``.
        turns: the user's words, turn by turn; the model answers between them.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]


def read_questions(file: Path) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        KangarooError: a file or a line that is none, with the line's number; two questions of one id.
    """
    if file.suffix == ".parquet":
        raise KangarooError(
            f"{file} is a Parquet file; write it as JSON lines first, with pandas: "
            "read_parquet(FILE).to_json(OUT, orient='records', lines=True)."
        )
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise KangarooError(f"{file} is not UTF-8 text (byte {error.start}).") from error
    found: dict[int | str, Question] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            question = _read_line(line, f"{file}, line {number}")
            if question.question_id in found:
                raise KangarooError(f"{file}, line {number}: the question_id {question.question_id!r} stands twice.")
            found[question.question_id] = question
    if not found:
        raise KangarooError(f"{file} holds no questions.")
    return list(found.values())


def _read_line(line: str, place: str) -> Question:
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise KangarooError(f"{place} is no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise KangarooError(f"{place} must be an object with question_id, category and turns.")
    number, category, turns = (values.get(name) for name in ("question_id", "category", "turns"))
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise KangarooError(f"{place}: question_id is {number!r}; it must be a whole number or a text.")
    if not isinstance(category, str) or not category:
        raise KangarooError(f"{place}: category is {category!r}; it must be a text.")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise KangarooError(f"{place}: turns must be a list of at least one text, none of them empty.")
    if any(turn.startswith(NOT_FILLED_IN) for turn in turns):
        raise KangarooError(f"{place}: the text is missing; fill it in with SPEED-Bench's own prepare_data.py.")
    return Question(number, category, tuple(turns))


def in_turns(questions: Sequence[Question], per_category: int | None = None) -> list[Question]:
    """The first questions of each category, one category after the other, so that a run cut short has some of each.

    Raises:
        KangarooError: ``per_category`` is no number of questions.
    """
    if per_category is not None and per_category < 1:
        raise KangarooError(f"per_category is {per_category!r}; it must be a whole number of at least 1.")
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        by_category.setdefault(question.category, []).append(question)
    rounds = zip_longest(*(each[:per_category] for each in by_category.values()))
    return [question for each in rounds for question in each if question is not None]


class Conversation:
    """What was said so far, as the prompt of the next answer.

    With a chat template it is rendered by that; without one, the texts follow each other.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._chats = getattr(tokenizer, "chat_template", None) is not None
        self._messages: list[dict[str, str]] = []

    def ask(self, text: str) -> list[int]:
        """The user's next turn; gives the tokens to answer."""
        self._messages.append({"role": "user", "content": text})
        if self._chats:
            return chat_tokens(self._messages, self._tokenizer)
        return list(self._tokenizer("\n".join(message["content"] for message in self._messages))["input_ids"])

    def answer(self, text: str) -> None:
        """The model's answer to the last turn."""
        self._messages.append({"role": "assistant", "content": text})
