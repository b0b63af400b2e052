"""Data by the target itself: it answers prompts, its own ones where it is given none, or continues texts.

An adapter has to foresee its target, so the target's own text is the best to learn from. An instruct model needs no
data set at all: continuing the user's turn of its chat template, it asks questions like those that it was tuned on
(as Magpie does, arXiv 2406.08464). Behind a system prompt it asks for what that speaks of: told to summarize, it writes
a text to be summarized. The texts are written side by side in groups; answers are greedy in one group and sampled in
the next.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import KangarooError
from ..evaluation.deadline import deadline_of
from ..evaluation.loops import looping_tokens
from ..load import resolve_device
from ..text import decode
from .conversations import ChatTemplate, Turn
from .data import join_texts
from .plan import TargetFiles, find_target
from .records import Message, read_records, read_text
from .settings import ProgressReport
from .teacher import Teacher

ASKING: dict[str, Any] = {"temperature": 1.0, "top_k": 200}
ANSWERING: dict[str, Any] = {"temperature": 0.8, "top_k": 0}
BARREN_GROUPS = 8
LOOPING_SHARE = 0.2
"""A text of which a larger share loops is dropped."""
RUN_OF_WORDS = 4
SEEN_SHARE = 0.7
"""A prompt is a near-duplicate if this share of its runs of four words stood in earlier prompts."""


@dataclass(frozen=True)
class WritingSettings:
    """Every setting of generated data.

    Attributes:
        model: the target's folder or hub name, or ``demo``: the bundled pair's.
        out: the ``.jsonl`` file; texts that it holds already count, and a stopped run goes on behind them.
        texts: how many it is to hold.
        prompts: files of conversations, whose last answers are written anew, and of texts, from which random places are
            continued; without any the target writes its own prompts.
        system_prompts: a file of system prompts, one a line, under which the target asks itself by turns; an empty line
            stands for none, or for the chat template's own.
        max_new_tokens: of an answer.
        max_prompt_tokens: of a question that the target asks itself.
        at_once: texts side by side. More make more tokens a second, and a longer wait for the slowest of a group.
        minutes: after which no group is begun; None sets no limit.
        seed: of everything drawn.
        device: ``cpu`` or ``cuda``; None takes a GPU where there is one.

    Raises:
        KangarooError: a value that cannot be used.
    """

    model: str
    out: Path
    texts: int = 1000
    prompts: tuple[Path, ...] = ()
    system_prompts: Path | None = None
    max_new_tokens: int = 256
    max_prompt_tokens: int = 96
    at_once: int = 96
    minutes: float | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        lowest = {"texts": 1, "max_new_tokens": 1, "max_prompt_tokens": 1, "at_once": 1, "seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise KangarooError(f"{name} is {value!r}; it must be a whole number of at least {low}.")
        _ = deadline_of(self.minutes, began=0.0)
        if self.prompts and self.system_prompts:
            raise KangarooError(
                "system prompts are for questions that the model asks itself; leave them or prompts out."
            )
        if self.out.suffix != ".jsonl":
            raise KangarooError(f"{self.out} must end in .jsonl, so that kangaroo train knows its form.")


@dataclass
class Counts:
    """What came of a run.

    Attributes:
        texts: in the file, earlier ones included.
        tokens: that the target wrote in this run's texts.
        near_duplicates: own prompts dropped for their likeness to earlier ones.
        unfit: prompts dropped for being empty or unanswered, without an end, or too long for the context.
        loops: texts dropped for saying the same again and again.
        seconds: of writing.
    """

    texts: int = 0
    tokens: int = 0
    near_duplicates: int = 0
    unfit: int = 0
    loops: int = 0
    seconds: float = 0.0


@dataclass
class Seen:
    """The runs of four words of all prompts so far."""

    runs: set[tuple[str, ...]] = field(default_factory=set)

    def is_new(self, prompt: str) -> bool:
        """Whether most of it has not been there; it is there from now on."""
        words = prompt.lower().split()
        own = {tuple(words[at : at + RUN_OF_WORDS]) for at in range(max(1, len(words) - RUN_OF_WORDS + 1))}
        new = len(own & self.runs) < SEEN_SHARE * len(own)
        self.runs |= own
        return new


class Prompt(NamedTuple):
    """What the target goes on from: a conversation that waits for an answer, or, without messages, a text.

    ``number`` counts all prompts of a file, those that came to nothing included.
    """

    number: int
    tokens: list[int]
    messages: list[Message] | None = None

    def record(self, answer: list[int], tokenizer: Any) -> dict[str, Any]:
        """The whole, as a line of the file."""
        if self.messages is None:
            return {"text": decode(tokenizer, [*self.tokens, *answer]), "number": self.number}
        message = {"role": "assistant", "content": decode(tokenizer, answer)}
        return {"messages": [*self.messages, message], "number": self.number}


class Prompts:
    """Where prompts come from: files, or the target itself."""

    def __init__(self, settings: WritingSettings, target: TargetFiles, counts: Counts) -> None:
        self.settings, self.target, self.counts, self.seen = settings, target, counts, Seen()
        self.conversations: list[tuple[str, list[Message]]] = []
        texts: list[str] = []
        for file in settings.prompts:
            for place, content in read_records(file):
                if isinstance(content, str):
                    texts.append(content)
                else:
                    self.conversations.append((place, content))
        if texts and self.conversations:
            raise KangarooError("the prompts are partly conversations, partly texts; give files of one kind.")
        self.text_tokens, most = max(1, settings.max_new_tokens // 3), target.config.context_length
        if settings.max_new_tokens + (self.text_tokens if texts else 1) > most:
            raise KangarooError(
                f"max_new_tokens is {settings.max_new_tokens}"
                + (", and a prompt takes a third of it besides" if texts else "")
                + f"; the model's context holds {most} tokens."
            )
        self.text = torch.tensor(join_texts(texts, target.tokenizer).tokens)
        if texts and len(self.text) < self.text_tokens:
            raise KangarooError(f"the prompts have {len(self.text)} tokens in all; one takes {self.text_tokens}.")
        self.template = None if texts else ChatTemplate(target.tokenizer, target.ends)
        if self.template is not None:
            for place, messages in self.conversations:  # what a template refuses is said now, not after hours
                self.template.check(unanswered(messages), place)
        self.turns = [] if self.template is None or settings.prompts else self._open_turns(self.template)

    def draw(self, first: int, teacher: Teacher) -> list[Prompt] | None:
        """Up to ``at_once`` prompts, the first of which has the number ``first``; None where there are no more."""
        count = self.settings.at_once
        if self.template is None:
            places = torch.randint(len(self.text) - self.text_tokens + 1, (count,)).tolist()
            rows = [self.text[at : at + self.text_tokens].tolist() for at in places]
            return [Prompt(number, row) for number, row in enumerate(rows, first)]
        if not self.settings.prompts:
            waiting = [("a question", messages) for messages in self._ask(teacher)]
        elif not (waiting := self.conversations[first : first + count]):
            return None
        opened = (self._open(number, messages, place) for number, (place, messages) in enumerate(waiting, first))
        return [prompt for prompt in opened if prompt is not None]

    def _open_turns(self, template: ChatTemplate) -> list[Turn]:
        """What the target continues when it asks itself: one turn, or one for each system prompt."""
        if (file := self.settings.system_prompts) is None:
            return [template.open_turn([], "the chat template")]
        lines = read_text(file).splitlines()
        if not lines:
            raise KangarooError(f"{file} is empty; it must hold a system prompt a line.")
        systems = [[{"role": "system", "content": line.strip()}] if line.strip() else [] for line in lines]
        return [template.open_turn(system, f"{file}, line {at}") for at, system in enumerate(systems, 1)]

    def _ask(self, teacher: Teacher) -> Iterator[list[Message]]:
        """Conversations that wait for their first answer: questions that the target thinks of when a turn begins."""
        most, count = self.settings.max_prompt_tokens, self.settings.at_once
        turns = [self.turns[at % len(self.turns)] for at in range(count)]
        rows = teacher.write([turn.tokens for turn in turns], most, self.target.ends, **ASKING)
        for turn, tokens in zip(turns, rows, strict=True):
            question = decode(self.target.tokenizer, tokens)
            question, ended, _ = question.partition(turn.after) if turn.after else (question, "", "")
            question = question.strip()
            if not question or (len(tokens) == most and not ended):
                self.counts.unfit += 1
            elif not self.seen.is_new(question):
                self.counts.near_duplicates += 1
            else:
                yield [*turn.messages, {"role": "user", "content": question}]

    def _open(self, number: int, messages: list[Message], place: str) -> Prompt | None:
        """The conversation up to its last answer; None without one, and where the context has no room for it."""
        assert self.template is not None
        messages = unanswered(messages)
        tokens = self.template.render(messages, place, answering=True) if messages else []
        if not messages or len(tokens) + self.settings.max_new_tokens > self.target.config.context_length:
            self.counts.unfit += 1
            return None
        return Prompt(number, tokens, messages)


def unanswered(messages: list[Message]) -> list[Message]:
    """A conversation up to its last answer, which is to be written anew; nothing where that is all of it."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else messages


def write_data(settings: WritingSettings, progress: ProgressReport = lambda *_: None) -> Counts:
    """Have the target write texts into ``settings.out``, group after group, each in one piece.

    It ends early where there are no more prompts, no more time, or nothing to keep in eight groups on end of those
    that a model thinks of or begins itself.

    Raises:
        KangarooError: settings or files that cannot be used.
    """
    began = time.perf_counter()
    target, counts = find_target(settings.model), Counts()
    prompts = Prompts(settings, target, counts)
    number = _take_stock(settings.out, prompts)
    teacher = Teacher(target.path, resolve_device(settings.device), torch.bfloat16)
    end = deadline_of(settings.minutes, began)
    longest, barren = 0.0, 0
    while counts.texts < settings.texts and barren < BARREN_GROUPS:
        now = time.perf_counter()
        if longest and now + longest > end:
            break
        torch.manual_seed(settings.seed + 7919 * number)
        drawn = prompts.draw(number, teacher)
        if drawn is None:
            break
        sampling = ANSWERING if number // settings.at_once % 2 else {}
        lines = list(_answered(drawn, sampling, teacher, prompts))
        with settings.out.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        number, barren = number + settings.at_once, 0 if lines or prompts.conversations else barren + 1
        longest = max(longest, time.perf_counter() - now)
        counts.seconds = time.perf_counter() - began
        progress("writing", counts.texts, settings.texts, f"{counts.tokens / counts.seconds:.0f} tokens/s")
    return counts


def _answered(drawn: list[Prompt], sampling: dict[str, Any], teacher: Teacher, prompts: Prompts) -> Iterator[str]:
    """A line for each prompt whose continuation is worth keeping, until there are enough texts."""
    settings, target, counts = prompts.settings, prompts.target, prompts.counts
    if not drawn:
        return
    answers = teacher.write([prompt.tokens for prompt in drawn], settings.max_new_tokens, target.ends, **sampling)
    for prompt, answer in zip(drawn, answers, strict=True):
        if counts.texts == settings.texts:
            return
        if not answer:
            counts.unfit += 1
        elif looping_tokens(answer) > LOOPING_SHARE * len(answer):
            counts.loops += 1
        else:
            counts.texts, counts.tokens = counts.texts + 1, counts.tokens + len(answer)
            yield json.dumps(prompt.record(answer, target.tokenizer), ensure_ascii=False) + "\n"


def _take_stock(out: Path, prompts: Prompts) -> int:
    """Count an earlier run's texts, remember its prompts, and drop a line that was cut short.

    Returns:
        The number of the first prompt of the next group.

    Raises:
        KangarooError: the file was not written here.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        return 0
    kind, number = "text" if prompts.template is None else "messages", 0
    content = out.read_bytes()
    *lines, rest = content.split(b"\n")
    for line in lines:
        record = _own_record(line, kind)
        if record is None:
            raise KangarooError(f"{out} holds lines that were not written here, or not of this kind; take a new file.")
        number = int(record["number"]) + 1
        if "messages" in record:
            prompts.seen.is_new(next((turn["content"] for turn in record["messages"] if turn["role"] == "user"), ""))
        prompts.counts.texts += 1
    if rest:
        if not _is_torn(rest, kind):
            raise KangarooError(f"{out} ends with what was not written here; take a new file.")
        out.write_bytes(content[: -len(rest)])
    group = prompts.settings.at_once
    return -(-number // group) * group


def _own_record(line: bytes, kind: str) -> dict[str, Any] | None:
    """A line's record, if it was written here: ``kind`` is the name of its content."""
    try:
        record: dict[str, Any] = json.loads(line)
        return record if kind in record and isinstance(record["number"], int) else None
    except (ValueError, LookupError, TypeError):
        return None


def _is_torn(rest: bytes, kind: str) -> bool:
    """Whether it may be the beginning of such a line."""
    beginning = f'{{"{kind}": '.encode()
    try:
        json.loads(rest)
    except ValueError:
        return rest.startswith(beginning) or beginning.startswith(rest)
    return _own_record(rest, kind) is not None
