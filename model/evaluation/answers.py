"""Answers as Spec-Bench keeps them: a JSON object a line, which its ``speed.py`` and ``equal.py`` read.

Beside Spec-Bench's fields a line has what the figures here need besides: every token, and of every step the drafts.
Source: github.com/hemingkx/Spec-Bench, ``evaluation/eval.py``.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import KangarooError, reason
from ..files import write_text
from ..results import Commit, Outcome
from .questions import Question


@dataclass(frozen=True)
class Difference:
    """Where a text leaves that of plain decoding.

    Attributes:
        turn: of the question, from 0 on.
        position: of the first other token, from 0 on.
        plain_token: plain decoding's choice there; None where its text had ended.
        token: the other's choice; likewise.
        logit_gap: by how much the target's logit of the first exceeds that of the second; None without one of them.
    """

    turn: int
    position: int
    plain_token: int | None
    token: int | None
    logit_gap: float | None


@dataclass(frozen=True)
class Turn:
    """The answer to one turn of a question.

    Attributes:
        text: without special tokens.
        tokens: of the answer, the one that ended it included.
        lengths: tokens committed in each step.
        drafted: drafts made in each step.
        draft_steps: draft steps taken in each step.
        accepted: drafts that the target agreed with in each step, also beyond the text's end.
        prefill_seconds: wall time before the first step.
        decode_seconds: wall time of the steps.
        processor_seconds: time of the steps on processors, summed over the process's threads.
    """

    text: str
    tokens: list[int]
    lengths: list[int]
    drafted: list[int]
    draft_steps: list[int]
    accepted: list[int]
    prefill_seconds: float
    decode_seconds: float
    processor_seconds: float

    @classmethod
    def of(cls, outcome: Outcome, commits: Sequence[Commit]) -> "Turn":
        """What a text's outcome and its steps say."""
        stats = outcome.stats
        return cls(
            outcome.text,
            list(outcome.tokens),
            [len(commit.tokens) for commit in commits],
            [commit.drafted for commit in commits],
            [commit.draft_steps for commit in commits],
            [commit.agreed for commit in commits],
            stats.prefill_seconds,
            stats.decode_seconds,
            stats.processor_seconds,
        )


@dataclass(frozen=True)
class Answer:
    """The answers to all turns of a question by one way of decoding.

    Attributes:
        question: what was asked.
        turns: an answer a turn; fewer where the conversation outgrew the model's context.
        differences: of the turns whose tokens are not plain decoding's.
    """

    question: Question
    turns: list[Turn]
    differences: list[Difference] = field(default_factory=list)

    def line(self, model_id: str) -> str:
        """The answer as Spec-Bench writes it; its wall time is that of prefill and steps together."""
        choice = {
            "index": 0,
            "turns": [turn.text for turn in self.turns],
            "decoding_steps": [len(turn.lengths) for turn in self.turns],
            "new_tokens": [len(turn.tokens) for turn in self.turns],
            "wall_time": [turn.prefill_seconds + turn.decode_seconds for turn in self.turns],
            "accept_lengths": [length for turn in self.turns for length in turn.lengths],
            "tokens": [turn.tokens for turn in self.turns],
            "per_step_drafted": [count for turn in self.turns for count in turn.drafted],
            "per_step_draft_steps": [count for turn in self.turns for count in turn.draft_steps],
            "per_step_accepted": [count for turn in self.turns for count in turn.accepted],
            "decode_time": [turn.decode_seconds for turn in self.turns],
            "processor_time": [turn.processor_seconds for turn in self.turns],
        }
        values = {
            "question_id": self.question.question_id,
            "category": self.question.category,
            "model_id": model_id,
            "choices": [choice],
            "differences": [vars(difference) for difference in self.differences],
            "tstamp": time.time(),
        }
        return json.dumps(values)

    @classmethod
    def read(cls, values: dict[str, Any], question: Question) -> "Answer":
        """What ``line`` wrote."""
        choice = values["choices"][0]
        names = "accept_lengths", "per_step_drafted", "per_step_draft_steps", "per_step_accepted"
        steps = [iter(choice[name]) for name in names]
        turns = []
        for index, count in enumerate(choice["decoding_steps"]):
            wall, decode, processor = (choice[name][index] for name in ("wall_time", "decode_time", "processor_time"))
            lengths, drafted, taken, accepted = (list(islice(each, count)) for each in steps)
            text, tokens = choice["turns"][index], choice["tokens"][index]
            turns.append(Turn(text, tokens, lengths, drafted, taken, accepted, wall - decode, decode, processor))
        return cls(question, turns, [Difference(**entry) for entry in values["differences"]])


class AnswerFile:
    """A file of answers that grows by whole lines.

    Args:
        path: of the file; it need not be there.
        model_id: what its lines call the model and the way of decoding.
        questions: those whose answers are looked for.

    Attributes:
        lines: all that the file held when it was opened, by question id.
        answers: to the questions, by question id.
    """

    def __init__(self, path: Path, model_id: str, questions: Iterable[Question]) -> None:
        self.path, self.model_id = path, model_id
        known = {question.question_id: question for question in questions}
        self.lines: dict[int | str, str] = {}
        self.answers: dict[int | str, Answer] = {}
        for place, line, values in self._read():
            try:
                number = values["question_id"]
                self.lines[number] = line
                if number in known:
                    self.answers[number] = Answer.read(values, known[number])
            except (LookupError, TypeError, ValueError) as error:
                raise KangarooError(f"{place}: the answer is damaged ({reason(error)}); take a new folder.") from error

    def _read(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Every whole line, behind its place for errors; a run that was killed may have torn the last one.

        Raises:
            KangarooError: another line that is no answer, or an answer of an earlier version.
        """
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                choice = values["choices"][0]
                _ = choice["processor_time"]
            except (ValueError, LookupError, TypeError) as error:
                if number == len(lines):
                    return
                raise KangarooError(f"{self.path}, line {number}: this is no answer of an earlier run.") from error
            if "per_step_draft_steps" not in choice:
                raise KangarooError(
                    f"{self.path}, line {number}: an earlier version wrote this answer and did not count draft steps; "
                    "take a new folder."
                )
            yield f"{self.path}, line {number}", line.decode(), values

    def keep(self, numbers: Iterable[int | str]) -> None:
        """Write the file anew with the answers to these questions alone."""
        wanted = set(numbers)
        self.lines = {number: line for number, line in self.lines.items() if number in wanted}
        self.answers = {number: answer for number, answer in self.answers.items() if number in wanted}
        write_text(self.path, "".join(f"{line}\n" for line in self.lines.values()))

    def add(self, answer: Answer) -> None:
        """Append an answer."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(answer.line(self.model_id) + "\n")
        self.answers[answer.question.question_id] = answer
