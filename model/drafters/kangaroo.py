"""Draft: shallow layers, adapter and head guess tokens one by one, until unsure (arXiv 2404.18911, section 3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo_kernels.contract import Top1

from ..loop.state import TextState
from ..sampling import Chooser
from ..spans import span
from ..target.llama import Llama
from .adapter import Adapter


@dataclass(frozen=True)
class Draft:
    """k drafted tokens and what verification goes on from.

    Attributes:
        tokens: ``[k]`` int64.
        exit_hidden: ``[k + 1, hidden]``: the exit layer's output for the newest token and every draft.
        distributions: ``[k, V]``, what each token was drawn from, for rejection sampling; else None.
    """

    tokens: Tensor
    exit_hidden: Tensor
    distributions: Tensor | None


class Drafter:
    """The first ``exit_layer`` layers of the target, the adapter and the target's own head."""

    def __init__(self, target: Llama, adapter: Adapter) -> None:
        self.target, self.adapter = target, adapter
        self.exit_layer = adapter.config.exit_layer

    def draft(self, state: TextState, chooser: Chooser, max_tokens: int, threshold: float) -> Draft:
        """Draft at most ``max_tokens``; the token whose confidence falls below ``threshold`` is the last.

        Runs the shallow layers on the newest token and on every draft, appending to the shared KV cache.
        """
        target, rows = self.target, state.exit_hidden
        assert rows is not None
        token, confidence = state.tokens[-1], 1.0
        tokens: list[int] = []
        distributions: list[Tensor] = []
        while True:
            position = state.newest + len(tokens)
            row = 1 + len(tokens)
            with span("kangaroo/draft/shallow"):
                rows[row] = target.run(target.embed([token]), state.cache, position, 0, self.exit_layer)[0]
            if len(tokens) == max_tokens or not confidence >= threshold:  # a NaN is unsure, too
                break
            with span("kangaroo/draft/step"):
                lag = position - state.adapter_length  # one row, or two where the adapter lags
                guess, distribution = self.guess(rows[row - lag : row + 1], state, chooser, position - lag)
                state.adapter_length = position + 1
                token, confidence = int(guess.token), float(guess.confidence)
            tokens.append(token)
            if distribution is not None:
                distributions.append(distribution)
        return Draft(
            torch.tensor(tokens, dtype=torch.int64, device=target.device),
            rows[1 : row + 1],
            torch.cat(distributions) if distributions else None,
        )

    def guess(
        self, exit_hidden: Tensor, state: TextState, chooser: Chooser, position: int
    ) -> tuple[Top1, Tensor | None]:
        """Adapter and head over the exit layer's rows at ``position, ...``: the token after the last of them."""
        assert state.adapter_cache is not None
        adapter, target = self.adapter, self.target
        hidden = adapter.run(exit_hidden, state.adapter_cache, position)[-1:]
        eps, following = adapter.config.llama.rms_norm_eps, position + exit_hidden.shape[0]
        if chooser.sampling.rejects:
            return chooser.draft_with_distribution(hidden, adapter.norm, target.weights.head, eps, following)
        return chooser.draft(hidden, adapter.norm, target.weights.head, eps, following), None
