"""A draft vocabulary: the tokens that a drafter may propose, a file beside its adapter's weights.

The head is half of a draft step, and most of its rows hardly ever win: with the rows of the most frequent tokens alone
(FR-Spec, arXiv 2502.14856) a step costs half, and the tokens left out are the target's to write. The file names tokens
and holds no weights: their rows are the target's own.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels.contract import DraftVocabulary

from ..errors import KangarooError
from ..files import write_text, write_whole
from ..number import is_whole
from ..target.checkpoint import DRAFT_VOCABULARY_FILE

SIZE = "draft_vocab_size"
"""The entry of the adapter's ``config.json`` that says how many tokens the file holds; without it the head is whole."""
TENSOR = "draft_vocabulary"


def read_draft_vocabulary(folder: Path, values: dict[str, Any], vocab_size: int) -> DraftVocabulary | None:
    """The draft vocabulary of an adapter's folder whose ``config.json`` has these values; None where it names none.

    Raises:
        KangarooError: a size or a file that cannot be used.
    """
    size = values.get(SIZE)
    if size is None:
        return None
    check_size(size, vocab_size, f"{folder / 'config.json'}: {SIZE}")
    path = folder / DRAFT_VOCABULARY_FILE
    tokens = _read(path)
    if tokens.dtype != torch.int32 or tokens.shape != (size,):
        raise KangarooError(
            f"{path}: {TENSOR} is {list(tokens.shape)} {tokens.dtype}; config.json asks for [{size}] torch.int32."
        )
    if bool((tokens.diff() <= 0).any()) or int(tokens[0]) < 0 or int(tokens[-1]) >= vocab_size:
        raise KangarooError(f"{path}: the tokens must ascend from 0 to {vocab_size - 1} at most; these do not.")
    return DraftVocabulary(tokens, vocab_size)


def _read(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise KangarooError(f"{path} does not exist, though config.json has a {SIZE}; add the file or drop the entry.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise KangarooError(f"{path} is truncated or not a safetensors file ({error}).") from error
    if TENSOR not in tensors:
        raise KangarooError(f"{path} holds no tensor {TENSOR!r}.")
    return tensors[TENSOR]


def check_size(size: object, vocab_size: int, name: str) -> None:
    """Raise unless a vocabulary of that size leaves tokens out and keeps some; the error calls the size ``name``."""
    if not is_whole(size) or not 1 <= size < vocab_size:
        raise KangarooError(
            f"{name} is {size!r}; it must be a whole number from 1 to {vocab_size - 1}, fewer than the model has "
            "tokens. Leave it out to draft from all of them."
        )


def write_draft_vocabulary(folder: Path, tokens: Tensor) -> None:
    """Make these tokens, ``[R]`` int in any order, the draft vocabulary of the adapter in ``folder``."""
    from safetensors.torch import save_file

    path, config = folder / DRAFT_VOCABULARY_FILE, folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {SIZE: len(tokens)}
    write_whole(path, partial(save_file, {TENSOR: tokens.sort().values.to("cpu", torch.int32)}))
    write_text(config, json.dumps(values, indent=2) + "\n")


def most_frequent(counts: Tensor, size: int, always: Iterable[int] = ()) -> Tensor:
    """The most frequent tokens, the most frequent first; of equally frequent ones the lowest.

    Args:
        counts: ``[V]``, how often each token stands in some data.
        size: how many are wanted.
        always: tokens that come first, whatever their counts are; those beyond V are left out.

    Returns:
        ``[size]`` int64; fewer where V is smaller.
    """
    kept = [token for token in set(always) if 0 <= token < len(counts)]
    ranks = counts.clone()
    ranks[kept] = counts.max() + 1
    return ranks.argsort(descending=True, stable=True)[:size]
