"""The static KV cache. Its length lives with the text, so rolling back moves a number and copies nothing."""

import torch
from torch import Tensor

from kangaroo_kernels.reference.qkv_rope import rope_table

from .config import LlamaConfig

GRANULE = 64
SHARE = 8


def roomy(length: int) -> int:
    """``length`` rounded up by at most an eighth (or to 64), so that texts of similar lengths take the same room."""
    granule = max(GRANULE, (1 << length.bit_length()) // (2 * SHARE))
    return -(-length // granule) * granule


class KVCache:
    """Keys and values of ``layers`` attention layers, and the RoPE phases of their positions.

    Attributes:
        keys: one ``[H_kv, capacity, D]`` per layer; rows beyond the text's length hold old values.
        values: as ``keys``.
        phases: ``[capacity, 1, D / 2]`` complex64, made again only when a text needs more of them or other ones.
    """

    def __init__(self, config: LlamaConfig, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self.layers, self.device, self.dtype = layers, device, dtype
        self.config, self.shape = config, (config.num_key_value_heads, config.head_dim)
        self.capacity = self._scaled_for = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.phases = torch.empty(0)

    def reserve(self, length: int, text_length: int | None = None) -> None:
        """Make room for ``length`` positions; what the cache held is lost if it has to grow.

        ``text_length`` is how long the text may become, which dynamic RoPE depends on; None means ``length``.
        """
        if length > self.capacity:
            self._grow(roomy(length))
        longest = length if text_length is None else text_length
        scaled_for = longest if self.config.rope.rope_type == "dynamic" else 0
        if self.capacity > len(self.phases) or scaled_for != self._scaled_for:
            self.phases = rope_table(self.config.inv_freq(longest).to(self.device), self.capacity)
            self._scaled_for = scaled_for

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, self.phases))

    def _grow(self, capacity: int) -> None:
        self.keys, self.values, self.capacity = [], [], 0  # the old memory goes before the new comes
        heads, head_dim = self.shape
        store = torch.empty(2, self.layers, heads, capacity, head_dim, device=self.device, dtype=self.dtype)
        self.keys, self.values, self.capacity = list(store[0].unbind()), list(store[1].unbind()), capacity
