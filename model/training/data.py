"""From files to windows of tokens."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import KangarooError
from .conversations import ChatTemplate, Text
from .records import Message, read_records
from .settings import TrainingSettings

HELD_OUT_SHARE = 0.03
SCORED_WINDOWS = 64
"""The most held-out windows that are measured on, spread evenly over all of them."""
TEXTS_AT_ONCE = 64


class Window(NamedTuple):
    """A stretch of one text, or of several texts with end-of-text tokens between them.

    Attributes:
        tokens: ``[T]`` int64.
        learned: ``[T]`` bool, the positions whose next token the model would write.
    """

    tokens: Tensor
    learned: Tensor


def read_windows(files: tuple[Path, ...], tokenizer: Any, ends: set[int], length: int) -> list[Window]:
    """Everything in some files, in their order: the texts, cut wherever a window is full, then the conversations.

    Args:
        files: text files, and ``.json`` and ``.jsonl`` files of conversations or texts.
        tokenizer: of the target.
        ends: the tokens that end the target's texts.
        length: the most tokens of a window.

    Raises:
        KangarooError: a file or a record that cannot be read.
    """
    texts: list[str] = []
    conversations: list[tuple[str, list[Message]]] = []
    for file in files:
        for place, content in read_records(file):
            if isinstance(content, str):
                texts.append(content)
            else:
                conversations.append((place, content))
    windows = _cut(join_texts(texts, tokenizer), length)
    if conversations:
        template = ChatTemplate(tokenizer, ends)
        for place, messages in conversations:
            if any(message["role"] == "assistant" for message in messages):  # real files hold others, too
                windows += _cut(template.read(messages, place), length)
    return [window for window in windows if window.learned.any()]


def join_texts(texts: list[str], tokenizer: Any) -> Text:
    """All texts as one, with an end-of-text token between them where the tokenizer has one."""
    tokens: list[int] = []
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for start in range(0, len(texts), TEXTS_AT_ONCE):  # fast tokenizers spread texts over the cores
        for row in tokenizer(texts[start : start + TEXTS_AT_ONCE], verbose=False)["input_ids"]:
            tokens += [*between, *row] if tokens else row
    return Text(tokens, [True] * len(tokens))


def _cut(text: Text, length: int) -> list[Window]:
    tokens = torch.tensor(text.tokens, dtype=torch.int64)
    learned = torch.tensor([*text.written[1:], False], dtype=torch.bool)
    return [Window(*parts) for parts in zip(tokens.split(length), learned.split(length), strict=True)]


class Corpus(NamedTuple):
    """What a run works with.

    Attributes:
        windows: to train on, in an order drawn once.
        held_out: to measure on.
    """

    windows: list[Window]
    held_out: list[Window]


def read_corpus(settings: TrainingSettings, tokenizer: Any, ends: set[int]) -> Corpus:
    """The windows to train on, shuffled, and the held-out ones.

    Raises:
        KangarooError: a file that cannot be read, or too little data.
    """
    windows = read_windows(settings.data, tokenizer, ends, settings.sequence_length)
    if settings.held_out:
        held_out = read_windows(settings.held_out, tokenizer, ends, settings.sequence_length)
    else:
        cut = min(int(len(windows) * (1 - HELD_OUT_SHARE)), len(windows) - 1)
        windows, held_out = windows[: max(cut, 0)], windows[max(cut, 0) :]
    if settings.held_out and windows and not held_out:
        raise KangarooError("the --held-out files hold no text and no answer to measure on; give others.")
    if not windows or not held_out:
        raise KangarooError(
            f"the data makes {len(windows) + len(held_out)} windows of at most {settings.sequence_length} tokens with "
            "a text or an answer to learn from; training needs one, and one more to measure on: give more data."
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))
    spread = torch.linspace(0, len(held_out) - 1, min(SCORED_WINDOWS, len(held_out))).long()
    return Corpus([windows[at] for at in order.tolist()], [held_out[at] for at in spread.tolist()])
