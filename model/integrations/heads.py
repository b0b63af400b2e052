"""One pair of head counts for layers that have different ones, without changing what a layer computes.

A stock Llama has the same number of query and key-value heads in every layer; an adapter may have others than its
target. Two changes of a layer are exact: a query head of zeros whose output meets columns of zeros adds nothing, and a
key-value head may be there twice, each copy serving some of its query heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KangarooError


class Heads(NamedTuple):
    """The head counts of an attention layer; ``query`` is a multiple of ``key_value``."""

    query: int
    key_value: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.query // self.key_value


def common_heads(hidden_size: int, *layers: Heads) -> Heads:
    """The fewest heads, and of those the fewest key-value heads, that all these layers can be written with.

    transformers wants a hidden size that is a multiple of the query heads, whatever their own size is.

    Raises:
        KangarooError: there are none.
    """
    candidates = [
        Heads(query, key_value)
        for query in _divisors(hidden_size)
        for key_value in _divisors(query)
        if all(heads.key_value * _copies(heads, query // key_value) <= key_value for heads in layers)
    ]
    if not candidates:
        shapes = " and ".join(f"{heads.query} on {heads.key_value}" for heads in layers)
        raise KangarooError(
            f"layers with {shapes} heads cannot be written with one number of heads that divides the hidden size, "
            f"{hidden_size}."
        )
    return min(candidates, key=lambda heads: (sum(heads), heads.key_value))


def spread(part: str, tensor: Tensor, own: Heads, wanted: Heads) -> Tensor:
    """A projection's weight or bias for ``wanted`` heads instead of its ``own``; what is new is zero.

    Args:
        part: ``q``, ``k``, ``v`` or ``o``.
        tensor: ``[heads * D, ...]``, and for ``o`` the weight ``[hidden, heads * D]``. A bias of ``o`` stays as it is.
        own: the counts that the tensor has.
        wanted: from ``common_heads``.
    """
    if own == wanted or (part == "o" and tensor.dim() == 1):
        return tensor
    if part == "o":
        return spread("q", tensor.T, own, wanted).T.contiguous()
    copies = _copies(own, wanted.group)
    if part == "q":
        sources = list(range(own.query))
        places = [
            (head // own.group * copies + head % own.group // wanted.group) * wanted.group
            + head % own.group % wanted.group
            for head in sources
        ]
    else:
        places = list(range(own.key_value * copies))
        sources = [place // copies for place in places]
    heads = tensor.unflatten(0, (own.query if part == "q" else own.key_value, -1))
    spaced: Tensor = heads.new_zeros(wanted.query if part == "q" else wanted.key_value, *heads.shape[1:])
    spaced[torch.tensor(places)] = heads[torch.tensor(sources)]
    result: Tensor = spaced.flatten(0, 1)
    return result


def separate_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, ``[H * D, ...]``, from adjacent RoPE pairs, as GGUF files have, to halves."""
    heads = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _copies(heads: Heads, group: int) -> int:
    """How often a key-value head must be there when at most ``group`` query heads may share one."""
    return -(-heads.group // group)
