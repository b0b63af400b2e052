"""The static KV cache. Its length lives with the text, so rolling back moves a number and copies nothing."""

from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.reference.qkv_rope import rope_table

from .config import LlamaConfig

GRANULE = 64
"""A cache's capacity is a multiple of this many positions."""


def roomy(length: int) -> int:
    """``length`` rounded up, so that texts of similar lengths take the same room.

    It becomes a multiple of 64 positions or, where that is more, of an eighth of the largest power of two up to it.
    """
    granule = max(GRANULE, 1 << length.bit_length() >> 4)
    return -(-length // granule) * granule


class Branches(NamedTuple):
    """Where rows of a tree lie, in the place of a chain's first position.

    Attributes:
        position: the cache's slot of the first row, a number or ``[1]`` int64 on the device; the other rows' slots
            follow.
        ancestors: ``[M]`` int32, the rows of the tree that each row sees, which also say where it stands in the text
            (``kangaroo_kernels/reference/ancestors.py``).
    """

    position: int | Tensor
    ancestors: Tensor


Place = int | Tensor | Branches
"""Where rows in flight lie: a chain's first position, or a tree's."""


class KVCache:
    """Keys and values of ``layers`` attention layers, and the RoPE phases of their positions.

    Attributes:
        keys: one ``[H_kv, capacity, D]`` per layer; rows beyond the text's length hold old values.
        values: as ``keys``.
        rows: both of all layers, ``[2 * layers * H_kv, capacity, D]``.
        phases: ``[capacity, 1, D / 2]`` complex64, made again only when a text needs more of them or other ones.
        arrivals: ``[H]`` int32, what the kernel of ``attention`` counts in. The layers of a text run one after the
            other, so they share it; no other text does. It is 0 between launches.
    """

    def __init__(self, config: LlamaConfig, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        self.layers, self.device, self.dtype = layers, device, dtype
        self.config, self.shape = config, (config.num_key_value_heads, config.head_dim)
        self.capacity = self._scaled_for = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = torch.empty(0, 0, 0)
        self.phases = torch.empty(0)
        self.arrivals = torch.zeros(config.num_attention_heads, dtype=torch.int32, device=device)

    def reserve(self, length: int, text_length: int | None = None, keep: int = 0) -> None:
        """Make room for ``length`` positions; if the cache has to grow, only the first ``keep`` stay what they were.

        ``text_length`` is how long the text may become, which dynamic RoPE depends on; None means ``length``. No work
        on this cache may be under way: a launch that ended halfway would leave counts, so every text begins at 0.
        """
        self.arrivals.zero_()
        if length > self.capacity:
            self._grow(roomy(length), keep)
        longest = length if text_length is None else text_length
        scaled_for = self._scale(longest)
        if self.capacity > len(self.phases) or scaled_for != self._scaled_for:
            self.phases = rope_table(self.config.inv_freq(longest).to(self.device), self.capacity)
            self._scaled_for = scaled_for

    def serves(self, text_length: int) -> bool:
        """Whether the keys are those of a text of up to ``text_length`` tokens, too: its RoPE angles are the same."""
        return self._scale(text_length) == self._scaled_for

    def _scale(self, text_length: int) -> int:
        """What RoPE's angles depend on: with dynamic scaling, the length of a text that outgrows the trained one."""
        dynamic = self.config.rope.rope_type == "dynamic"
        return max(text_length, self.config.max_position_embeddings) if dynamic else 0

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, self.phases, self.arrivals))

    def _grow(self, capacity: int, keep: int) -> None:
        old = [*self.keys, *self.values] if keep else []
        self.keys, self.values, self.capacity = [], [], 0  # where nothing is kept, the old memory goes first
        self.rows = torch.empty(0, 0, 0)
        heads, head_dim = self.shape
        store = torch.empty(2, self.layers, heads, capacity, head_dim, device=self.device, dtype=self.dtype)
        for new, kept in zip(store.flatten(0, 1), old, strict=False):
            new[:, :keep] = kept[:, :keep]
        self.keys, self.values, self.capacity = list(store[0].unbind()), list(store[1].unbind()), capacity
        self.rows = store.flatten(0, 2)
