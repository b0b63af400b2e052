"""Which tokens an adapter drafts: its data's most frequent ones, and all that a tokenizer or a model calls special."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..drafters.vocabulary import most_frequent, write_draft_vocabulary
from ..errors import KangarooError
from ..target.config import load_config_values
from .data import Window, read_windows
from .plan import TargetFiles, check_draft_vocabulary, find_target

LENGTH = 1 << 20
"""Of the windows in which data is counted; it only bounds memory."""


def count_tokens(windows: Sequence[Window], vocab_size: int) -> Tensor:
    """How often each token stands in some windows: ``[V]`` int64."""
    return torch.bincount(torch.cat([window.tokens for window in windows]), minlength=vocab_size)


def draft_tokens(counts: Tensor, size: int, target: TargetFiles) -> Tensor:
    """The special tokens and the most frequent others, ascending: ``[size]`` int64."""
    return most_frequent(counts, size, target.special).sort().values


class Added(NamedTuple):
    """What ``add_draft_vocabulary`` did.

    Attributes:
        tokens: how many the adapter drafts now.
        vocab_size: of how many.
        coverage: the share of the data that they make up.
    """

    tokens: int
    vocab_size: int
    coverage: float


def add_draft_vocabulary(model: str, adapter: Path, data: Sequence[Path], size: int) -> Added:
    """Let an adapter draft the most frequent tokens of some data alone; its weights stay as they are.

    Args:
        model: its target, as for ``Kangaroo.from_pretrained``.
        adapter: its folder, which gets the file.
        data: files as for training.
        size: how many tokens.

    Raises:
        KangarooError: a size, a folder or files that cannot be used.
    """
    target = find_target(model)
    vocab_size = target.config.vocab_size
    check_draft_vocabulary(size, target, "size")
    own = load_config_values(adapter, "adapter").get("vocab_size")
    if own != vocab_size:
        raise KangarooError(f"{adapter / 'config.json'}: vocab_size is {own}, the target's is {vocab_size}.")
    windows = read_windows(tuple(data), target.tokenizer, target.ends, LENGTH)
    if not windows:
        raise KangarooError("the data holds no text to count tokens in; give files with text.")
    counts = count_tokens(windows, vocab_size)
    tokens = draft_tokens(counts, size, target)
    write_draft_vocabulary(adapter, tokens)
    return Added(size, vocab_size, round(float(counts[tokens].sum() / counts.sum()), 4))
