"""Synthetic acceptance: a decode whose drafts are accepted as a trace says, whatever the weights are.

Random weights draft nothing that verification would accept. So what a step costs is measured on the real work, and how
much it yields comes from a trace of (drafted, agreed) pairs in device memory: the wrapped head overwrites the flag that
says whether drafting goes on, the wrapped ``accept`` its own decision. Nothing asks the host, so a captured iteration
goes through the trace as it is replayed. That costs a dozen tiny launches an iteration, which a real decode does not
have and which count against Kangaroo. The text is nonsense.

Assumptions, which every figure made this way must name:

- The paper (arXiv 2404.18911) gives Vicuna-7B a mean acceptance length of 1.93 with at most 6 drafts and a threshold of
  0.6, and its rates per position only as a picture. Here every position has the same conditional rate, the one that
  gives that mean: p + p^2 + ... + p^6 = 0.93, so p = 0.485, and position i is accepted in a share p^i of the steps.
- Drafting stops at the first draft that will be refused: drafted = min(agreed + 1, 6). That is an early exit which is
  never wrong; a real one drafts some tokens more and some less.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import Top1
from kangaroo_kernels.model.backend import Backend
from kangaroo_kernels.model.target.llama import Llama

PAPER_MEAN_ACCEPTANCE_LENGTH = 1.93
MAX_DRAFTS = 6
RATE = 0.485143
"""Of every position: 1 + p + p^2 + ... + p^6 is the mean acceptance length."""

STEPS = 128
"""Of a trace, which begins again behind them: few, so that a short decode sees all of it, and enough for its mean."""

ASSUMPTION = (
    f"synthetic acceptance: {PAPER_MEAN_ACCEPTANCE_LENGTH} tokens a step, the mean of arXiv 2404.18911 for Vicuna-7B "
    f"with {MAX_DRAFTS} drafts and threshold 0.6; the same conditional rate at every position (the paper has its rates "
    "per position only as a picture); drafting stops at the first draft that is refused"
)


class Trace(NamedTuple):
    """What becomes of every step."""

    drafted: Tensor  # [steps] int64, from 1
    agreed: Tensor  # [steps] int64, at most drafted

    @property
    def tokens(self) -> int:
        """Of all steps together: a decode of so many has the mean of the trace, wherever in it it begins."""
        return len(self.agreed) + int(self.agreed.sum())

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a step, bonus token included."""
        return self.tokens / len(self.agreed)


def paper_trace(steps: int = STEPS) -> Trace:
    """A trace at the paper's mean: an exact share of the steps accepts each position, and then they are shuffled."""
    agreed = torch.zeros(steps, dtype=torch.int64)
    for position in range(1, MAX_DRAFTS + 1):
        agreed[: round(steps * RATE**position)] += 1
    agreed = agreed[torch.randperm(steps, generator=torch.Generator().manual_seed(0))]
    return Trace((agreed + 1).clamp(max=MAX_DRAFTS), agreed)


class _Player:
    """A trace on the device, and which step of it comes next."""

    def __init__(self, backend: Backend, trace: Trace, max_drafts: int, device: torch.device) -> None:
        self.backend = backend
        goes_on = torch.arange(1, max_drafts + 1) < trace.drafted[:, None]  # after the draft at each place
        columns = (trace.agreed[:, None], trace.agreed[:, None] + 1, goes_on)
        self.steps = torch.cat([column.long() for column in columns], dim=1).to(device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.now = self.steps[:1].clone()  # drafts agreed, tokens, and whether drafting goes on behind each draft
        self.place = 0  # of the next draft: a number of the host, baked into a captured iteration

    def top1_head(self, *arguments: Any, **named: Any) -> Top1:
        """The head; after a draft the trace decides whether another follows."""
        result = self.backend.top1_head(*arguments, **named)
        if named.get("threshold") is not None:  # the target's own tokens have none
            place = 2 + self.place
            torch.mul(self.now[0, place : place + 1], named["active"], out=named["sure"])
            self.place += 1
        return result

    def accept(self, *arguments: Tensor, drafted: Tensor, out: Tensor, **named: Tensor) -> Tensor:
        """``accept``; then the trace's decision in the place of its own, and on to the next step."""
        draft, _, _, length, limit = arguments
        self.backend.accept(*arguments, drafted=drafted, out=out, **named)
        self.place = 0
        if len(draft):  # there are none in plain decoding
            alive = drafted[:1]  # 0 when the text has reached its limit: nothing is drafted and nothing agreed
            torch.mul(self.now[0, :1], alive, out=out[:1])
            torch.add(self.now[0, 1:2], length, out=out[1:2])
            torch.minimum(out[1:2], limit, out=out[1:2])
            out[2:].zero_()
            self.step.add_(alive).remainder_(len(self.steps))
            torch.index_select(self.steps, 0, self.step, out=self.now)
        return out


def with_synthetic_acceptance(target: Llama, trace: Trace, max_drafts: int = MAX_DRAFTS) -> Llama:
    """The same weights under operations that follow ``trace``; decode it with ``num_speculative_tokens=max_drafts``.

    The target must run on the Triton kernels, whose loop lives on the device.
    """
    player = _Player(target.backend, trace, max_drafts, target.device)
    backend = replace(target.backend, top1_head=player.top1_head, accept=player.accept)
    return Llama(target.config, target.weights, backend)
