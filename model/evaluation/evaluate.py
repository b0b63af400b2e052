"""Every question is answered plainly and with drafts, in one run, and the answers are kept as they come."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ..errors import KangarooError
from ..files import read_object, write_text
from ..kangaroo import Kangaroo
from ..request import Settings
from ..results import Commit, Progress
from ..session import Writing
from .answers import Answer, AnswerFile, Difference, Turn
from .questions import Conversation, Question
from .race import Race, warm_up

PLAIN, KANGAROO = "plain", "kangaroo"
"""The two ways of decoding that every evaluation has."""
LIKELY = 20
"""The tokens among which a logit gap is looked up."""

OtherDecoder = Callable[[list[int], Settings], Turn]
"""Another way of decoding: from a prompt's tokens to the answer."""


class Run:
    """The folder of an evaluation: its settings, and a file of answers for each way of decoding.

    Args:
        out: the folder; it need not be there.
        settings: what must be the same when the run goes on, ``model`` among it.
        questions: all that are to be answered.

    Attributes:
        files: of answers, by way of decoding; none before ``begin``.
        left_out: how many questions the model's context cannot hold.

    Raises:
        KangarooError: the folder holds a run with other settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], questions: Sequence[Question]) -> None:
        self.out, self.settings, self.questions = out, dict(settings), list(questions)
        self.files: dict[str, AnswerFile] = {}
        self.left_out = 0
        file = out / "run.json"
        before = read_object(file) if file.exists() else self.settings
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise KangarooError(
                    f"{out} holds a run with {name} {before.get(name)!r}, this one has {value!r}; take a new folder."
                )

    @property
    def done(self) -> list[Question]:
        """The questions that every way has answered."""
        files = self.files.values()
        return [each for each in self.questions if all(each.question_id in file.answers for file in files)]

    @property
    def left(self) -> list[Question]:
        """The questions that are still to be answered."""
        done = {question.question_id for question in self.done}
        return [question for question in self.questions if question.question_id not in done]

    def answers(self) -> dict[str, list[Answer]]:
        """The answers to the questions that are done, by way."""
        done = [question.question_id for question in self.done]
        return {way: [file.answers[number] for number in done] for way, file in self.files.items()}

    def keep_those_that_fit(self, kangaroo: Kangaroo) -> None:
        """Leave out the questions whose first turn leaves no room for an answer in the model's context.

        Raises:
            KangarooError: none is left, or the checkpoint has no tokenizer.
        """
        if kangaroo.tokenizer is None:
            raise KangarooError("this checkpoint has no tokenizer, which questions need.")
        most, count = kangaroo.target.config.context_length, len(self.questions)
        self.questions = [
            each for each in self.questions if len(Conversation(kangaroo.tokenizer).ask(each.turns[0])) < most
        ]
        self.left_out = count - len(self.questions)
        if not self.questions:
            raise KangarooError(f"no question fits into the model's context of {most} tokens.")

    def begin(self, ways: Iterable[str]) -> None:
        """Make the folder and open its files; of a run that was stopped, drop the answers that not every way has given.

        Raises:
            KangarooError: a file there is none of a run's.
        """
        model = Path(str(self.settings["model"])).name
        self.files = {way: AnswerFile(self.out / f"{way}.jsonl", f"{model}-{way}", self.questions) for way in ways}
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / "run.json", json.dumps(self.settings, indent=1) + "\n")
        whole = set.intersection(*(set(file.lines) for file in self.files.values()))
        for file in self.files.values():
            file.keep(whole)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append the answers to one question."""
        for way, file in self.files.items():
            file.add(answers[way])


def evaluate(
    kangaroo: Kangaroo,
    settings: Settings,
    run: Run,
    others: Mapping[str, OtherDecoder],
    deadline: float,
    report: Callable[[str, int, int, str], None],
) -> None:
    """Answer the questions that a run has left, until the deadline (as ``time.perf_counter`` counts).

    Args:
        kangaroo: the model and its drafter.
        settings: of every answer; ``plain`` does not matter.
        run: takes the answers.
        others: more ways of decoding, by the names that the run has for them.
        deadline: no question is begun after it.
        report: is told ``(stage, done, total, note)`` after every question.

    Raises:
        KangarooError: no question that the model can answer.
    """
    run.keep_those_that_fit(kangaroo)
    run.begin([PLAIN, KANGAROO, *others])
    warm_up(kangaroo)
    for question in run.left:
        if time.perf_counter() > deadline:
            return
        answers = answer(kangaroo, question, settings, others)
        run.add(answers)
        lengths = [length for turn in answers[KANGAROO].turns for length in turn.lengths]
        note = f"{question.category}: {sum(lengths) / max(len(lengths), 1):.2f} tokens a step"
        report("answering", len(run.done), len(run.questions), note)


def answer(
    kangaroo: Kangaroo, question: Question, settings: Settings, others: Mapping[str, OtherDecoder]
) -> dict[str, Answer]:
    """The answers to a question by every way.

    All ways get the same prompts: what a later turn sees of the earlier ones is plain decoding's answer.
    """
    conversation = Conversation(kangaroo.tokenizer)
    answers = {way: Answer(question, []) for way in (PLAIN, KANGAROO, *others)}
    for index, text in enumerate(question.turns):
        prompt = conversation.ask(text)
        if len(prompt) >= kangaroo.target.config.context_length:
            break
        turns = answer_both(kangaroo, prompt, settings)
        turns |= {name: way(prompt, settings) for name, way in others.items()}
        for way, turn in turns.items():
            answers[way].turns.append(turn)
            if turn.tokens != turns[PLAIN].tokens:
                answers[way].differences.append(first_difference(kangaroo, index, prompt, turns[PLAIN], turn))
        conversation.answer(turns[PLAIN].text)
    return answers


def answer_both(kangaroo: Kangaroo, prompt: list[int], settings: Settings) -> dict[str, Turn]:
    """Plain decoding's answer and Kangaroo's, step by step in turns (``Race``).

    On a GPU one follows the other: there, the loop on the device works ahead of whoever reads it.
    """
    race = Race(kangaroo, settings, prompt)
    commits: dict[Writing, list[Commit]] = {race.plain: [], race.drafted: []}
    steps: Iterable[tuple[Writing, Progress]] = race
    if kangaroo.target.backend.resident:
        steps = chain.from_iterable(((text, step) for step in text) for text in commits)
    for text, step in steps:
        commits[text].append(step.commit)
    return {
        name: Turn.of(text.outcome, commits[text]) for name, text in ((PLAIN, race.plain), (KANGAROO, race.drafted))
    }


def first_difference(kangaroo: Kangaroo, turn: int, prompt: list[int], plain: Turn, other: Turn) -> Difference:
    """Where an answer leaves plain decoding's, and how close the target's choice was there."""
    pairs = enumerate(zip_longest(plain.tokens, other.tokens))
    at, (wanted, got) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
    gap = None
    if wanted is not None and got is not None:
        again = kangaroo.generate(prompt + plain.tokens[:at], max_new_tokens=1, plain=True, logprobs=LIKELY)
        likely = again.logprobs[0].top if again.logprobs else {}
        gap = likely[wanted] - likely[got] if wanted in likely and got in likely else None
    return Difference(turn, at, wanted, got, gap)
