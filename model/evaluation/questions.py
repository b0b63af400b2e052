"""Questions as Spec-Bench and SPEED-Bench keep them.

Spec-Bench has a JSON object a line, with ``question_id``, ``category`` and ``turns``. SPEED-Bench has the same columns,
and others that are not read, in Parquet files. Two programs of NVIDIA's fill in the texts that SPEED-Bench may not pass
on: the ``prepare_data.py`` of Model-Optimizer writes Parquet again, the ``prepare.py`` of NeMo Skills JSON lines with
``messages`` in the place of ``turns``.

Sources: github.com/hemingkx/Spec-Bench, huggingface.co/datasets/nvidia/SPEED-Bench,
github.com/NVIDIA/Model-Optimizer (examples/specdec_bench), github.com/NVIDIA-NeMo/Skills.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..chat import chat_tokens
from ..errors import KangarooError
from ..text import check_characters

ALL = "all"
"""What reports call all questions together, so that no category may have the name."""
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
    """The questions of a file of JSON lines, or of a Parquet file, in its order.

    Raises:
        KangarooError: a file that cannot be read, or a Parquet file without pyarrow; a line or row that is no question,
            with its number; two questions of one id.
    """
    rows = _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_lines(file)
    found: dict[int | str, Question] = {}
    for place, values in rows:
        question = _check(values, place)
        if question.question_id in found:
            raise KangarooError(f"{place}: the question_id {question.question_id!r} stands twice.")
        found[question.question_id] = question
    if not found:
        raise KangarooError(f"{file} holds no questions.")
    return list(found.values())


def _read_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of each line, with the line's place for errors."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise KangarooError(f"{file} is not UTF-8 text (byte {error.start}).") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise KangarooError(f"{place} is no JSON ({error}).") from error


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of each row, with the row's place for errors."""
    if find_spec("pyarrow") is None:
        raise KangarooError(f"{file} is a Parquet file, which is read with pyarrow; pip install pyarrow.")
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows: list[Any] = read_table(file).to_pylist()
    except ArrowException as error:
        raise KangarooError(f"{file} is damaged or no Parquet file ({' '.join(str(error).split())}).") from error
    for number, values in enumerate(rows, 1):
        yield f"{file}, row {number}", values


def _check(values: Any, place: str) -> Question:
    if not isinstance(values, dict):
        raise KangarooError(f"{place} must be an object with question_id, category and turns.")
    number, category, turns = (values.get(name) for name in ("question_id", "category", "turns"))
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise KangarooError(f"{place}: question_id is {number!r}; it must be a whole number or a text.")
    if not isinstance(category, str) or not category:
        raise KangarooError(f"{place}: category is {category!r}; it must be a text.")
    if category == ALL:
        raise KangarooError(f"{place}: category is {ALL!r}, as reports call all questions together; name it otherwise.")
    if turns is None and "messages" in values:
        turns = _said_by_the_user(values["messages"], place)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise KangarooError(f"{place}: turns must be a list of at least one text, none of them empty.")
    for turn in turns:
        check_characters(turn, place)
    if any(turn.startswith(NOT_FILLED_IN) for turn in turns):
        raise KangarooError(f"{place}: the text is missing; fill it in with SPEED-Bench's own prepare_data.py.")
    return Question(number, category, tuple(turns))


def _said_by_the_user(messages: Any, place: str) -> list[Any]:
    """The contents of messages, all of which must be the user's."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and message.get("role") == "user" for message in messages
    ):
        raise KangarooError(f"{place}: messages must be a list of the user's messages alone, each with a content.")
    return [message.get("content") for message in messages]


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
