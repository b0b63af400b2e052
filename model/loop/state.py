"""What one decode carries from step to step: the text, the target's cache, and what the drafter keeps."""

from dataclasses import dataclass
from typing import Any

from ..target.cache import KVCache


@dataclass
class TextState:
    """A text of ``n = len(tokens)`` committed tokens, the last of which has been through no layer yet.

    Attributes:
        tokens: prompt and committed tokens.
        cache: the target's keys and values; rows below ``n - 1`` are valid in every layer.
        memory: what ``Drafter.new_memory`` made; the drafter alone reads and writes it.
    """

    tokens: list[int]
    cache: KVCache
    memory: Any = None

    @property
    def newest(self) -> int:
        """The position of the last committed token, where the next step begins."""
        return len(self.tokens) - 1
