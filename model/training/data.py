"""From text files to windows of tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KangarooError
from .settings import TrainingSettings

HELD_OUT_SHARE = 0.03
FILES_AT_ONCE = 64


def read_tokens(files: tuple[Path, ...], tokenizer: Any) -> Tensor:
    """All files as one row of tokens: ``[N]`` int64.

    Raises:
        KangarooError: a file that is missing or not UTF-8.
    """
    tokens: list[int] = []
    for start in range(0, len(files), FILES_AT_ONCE):  # fast tokenizers spread texts over the cores
        texts = []
        for file in files[start : start + FILES_AT_ONCE]:
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise KangarooError(f"data file {file} cannot be read: {error.strerror}.") from error
            except UnicodeDecodeError as error:
                raise KangarooError(f"data file {file} is not UTF-8 text (byte {error.start}).") from error
        for row in tokenizer(texts, verbose=False)["input_ids"]:
            tokens += row
    return torch.tensor(tokens, dtype=torch.int64)


def read_corpus(settings: TrainingSettings, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The tokens to train on and the held-out ones, two rows ``[N]`` int64.

    Raises:
        KangarooError: a file that cannot be read, or a row that is shorter than one window.
    """
    tokens = read_tokens(settings.data, tokenizer)
    measured, more = "held-out text", "more text"
    if settings.held_out:
        held_out = read_tokens(settings.held_out, tokenizer)
    else:
        cut = int(len(tokens) * (1 - HELD_OUT_SHARE))
        tokens, held_out = tokens[:cut], tokens[cut:]
        measured += f" (the last {100 * HELD_OUT_SHARE:.0f} % of the data)"
        more = "more data, held-out files"
    for name, row in (("text to train on", tokens), (measured, held_out)):
        if len(row) < settings.sequence_length:
            raise KangarooError(
                f"the {name} has {len(row)} tokens, and one window takes {settings.sequence_length}; give {more} or a "
                "smaller sequence_length."
            )
    return tokens, held_out


def random_windows(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``[count, length]`` windows from random places of ``tokens``."""
    starts = torch.randint(len(tokens) - length + 1, (count,), generator=generator)
    return tokens.unfold(0, length, 1)[starts]
