"""What one decode carries from step to step: the text, the target's cache, and what the drafter keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import KangarooError
from ..target.cache import KVCache


@dataclass
class TextState:
    """A text of ``n = len(tokens)`` committed tokens, the last of which has been through no layer yet.

    Attributes:
        tokens: prompt and committed tokens.
        cache: the target's keys and values; rows below ``n - 1`` are valid in every layer.
        memory: what ``Drafter.new_memory`` made; the drafter's own.
        final: ``[m, hidden]``, the last layer's output of the latest prefill or verification, on the loop led by the
            host.
        copied: what ``on_device`` has copied so far, and how many tokens that are.
    """

    tokens: list[int]
    cache: KVCache
    memory: Any = None
    final: Tensor | None = None
    copied: tuple[Tensor, int] | None = None

    @property
    def newest(self) -> int:
        """The position of the last committed token, where the next step begins."""
        return len(self.tokens) - 1

    def on_device(self) -> Tensor:
        """The tokens on the cache's device, ``[n]`` int64, for the loop led by the host; only new ones are copied."""
        count, (store, held) = len(self.tokens), self.copied or (torch.empty(0, dtype=torch.int64), 0)
        if count > len(store):
            store, held = torch.empty(2 * count, dtype=torch.int64, device=self.cache.device), 0
        store[held:count] = torch.tensor(self.tokens[held:], dtype=torch.int64)
        self.copied = store, count
        return store[:count]


MOST_UNSEEN = 3
"""The most tokens at a text's end that a cache does not hold: no layer has run the last one, an adapter that lags has
not run the one before, and a last step that had room for one token leaves it a token further behind."""


class Written(NamedTuple):
    """A text that caches hold, but for its last three tokens.

    Attributes:
        prompt: its tokens.
        new: the tokens behind it; the list grows with the text.
    """

    prompt: Sequence[int]
    new: list[int]

    @property
    def tokens(self) -> list[int]:
        """Those that the caches hold."""
        return [*self.prompt, *self.new][:-MOST_UNSEEN]

    def shared(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, from the first one on, the caches hold."""
        held = self.tokens
        pairs = enumerate(zip(tokens, held, strict=False))
        return next((place for place, (token, other) in pairs if token != other), min(len(tokens), len(held)))


def not_finite(text: TextState, dtype: torch.dtype) -> KangarooError:
    """The error for a text whose next token the target cannot name: a logit is NaN or infinite, or all are -inf."""
    advice = "try dtype='float32'" if dtype != torch.float32 else "the checkpoint may be damaged"
    if text.cache.dtype != dtype:
        dtype, advice = text.cache.dtype, "leave kv_dtype out"
    return KangarooError(
        f"the target's logits after {len(text.tokens)} tokens are not finite: values overflowed in {dtype}; {advice}."
    )
