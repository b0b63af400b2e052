"""The static KV cache. Its length lives with the text, so rolling back moves a number and copies nothing."""

import torch
from torch import Tensor

from .config import LlamaConfig

GRANULE = 64
SHARE = 8


def roomy(length: int) -> int:
    """``length`` rounded up by at most an eighth (or to 64), so that texts of like lengths find the same room."""
    granule = max(GRANULE, (1 << length.bit_length()) // (2 * SHARE))
    return -(-length // granule) * granule


class KVCache:
    """Keys and values of ``layers`` attention layers.

    Attributes:
        keys: one ``[H_kv, capacity, D]`` a layer; rows beyond the text's length hold whatever was there.
        values: likewise.
    """

    def __init__(self, config: LlamaConfig, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self.layers, self.device, self.dtype = layers, device, dtype
        self.shape = (config.num_key_value_heads, config.head_dim)
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions; what the cache held is lost if it has to grow."""
        if length <= self.capacity:
            return
        self.capacity = roomy(length)
        heads, head_dim = self.shape
        self.keys, self.values = [], []  # the old memory goes before the new comes
        store = torch.empty(2, self.layers, heads, self.capacity, head_dim, device=self.device, dtype=self.dtype)
        self.keys, self.values = list(store[0].unbind()), list(store[1].unbind())
