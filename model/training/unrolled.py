"""Attention of an adapter that is trained on its own drafts: pass j stands where the draft j behind the text does.

A drafting step runs the adapter on the text, then on its first draft, on its second, and so on. Training does this at
all positions side by side. In pass j (from 0) a position sees itself by pass j, the position before by pass j - 1, and
so on; what lies j positions back and further is text, and is seen by pass 0 (training-time test, as in EAGLE-3, arXiv
2503.01840). The first j positions have no text that far back, so what they give is of no use.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Seen(NamedTuple):
    """The keys and values of a pass: ``[B, H_kv, T, D]`` each."""

    keys: Tensor
    values: Tensor


def attend(q: Tensor, passes: Sequence[Seen]) -> Tensor:
    """Causal attention of the last one of some passes: ``[B, H, T, D]`` to the same."""
    text = passes[0]
    if len(passes) == 1:
        return F.scaled_dot_product_attention(q, *text, is_causal=True, enable_gqa=q.shape[1] != text.keys.shape[1])
    group, length = q.shape[1] // text.keys.shape[1], q.shape[2]
    # the last passes, newest first: behind a position by 0, 1, ...
    near = [
        Seen(*(F.pad(x, (0, 0, back, 0))[:, :, :length].repeat_interleave(group, dim=1) for x in seen))
        for back, seen in enumerate(reversed(passes[1:]))
    ]
    keys, values = (x.repeat_interleave(group, dim=1) for x in text)
    places = torch.arange(length, device=q.device)
    behind = places[:, None] - places
    scores = (q @ keys.transpose(-1, -2)).float().masked_fill(behind < len(near), -torch.inf)
    own = torch.stack([(q * seen.keys).sum(-1) for seen in near], dim=-1).float()
    weights = (torch.cat((scores, own), dim=-1) * q.shape[-1] ** -0.5).softmax(-1).to(q.dtype)
    mixed: Tensor = weights[..., :length] @ values
    for back, seen in enumerate(near):
        mixed = mixed + weights[..., length + back, None] * seen.values
    return mixed
