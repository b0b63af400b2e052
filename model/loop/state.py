"""What one decode carries from step to step: the text, the caches, and how far each of them is valid."""

from dataclasses import dataclass

from torch import Tensor

from ..target.cache import KVCache


@dataclass
class TextState:
    """A text of ``n = len(tokens)`` committed tokens, the last of which has been through no layer yet.

    Attributes:
        tokens: prompt and committed tokens.
        cache: the target's keys and values; rows below ``n - 1`` are valid in every layer.
        adapter_cache: the adapter's; rows below ``adapter_length`` are valid.
        adapter_length: ``n - 1``, or ``n - 2`` after every draft was accepted: nobody ran the adapter on the last one.
            (A last step, with room for one token alone, drafts nothing and leaves it as it was.)
        exit_hidden: ``[1 + max drafts + 1, hidden]``, the exit layer's output. Row 0 belongs to position ``n - 2`` (for
            an adapter that lags), row ``1 + j`` to position ``n - 1 + j``.
    """

    tokens: list[int]
    cache: KVCache
    adapter_cache: KVCache | None = None
    adapter_length: int = 0
    exit_hidden: Tensor | None = None

    @property
    def newest(self) -> int:
        """The position of the last committed token, where the next step begins."""
        return len(self.tokens) - 1
