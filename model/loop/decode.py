"""The decode loop: draft, verify, accept, commit (arXiv 2404.18911, algorithm 1), and plain decoding beside it.

``kangaroo_steps`` and ``plain_steps`` are led by the host, which reads every draft: what a CPU and rejection sampling
want. ``device_steps`` is either of them with the loop on the device (``iteration.py``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from kangaroo_kernels.contract import RECORD_HEAD

from ..drafters.kangaroo import Drafter
from ..sampling import Chooser
from ..spans import span
from ..target.llama import Llama
from .graphs import GraphRunner
from .iteration import Iteration
from .mailbox import Mailbox
from .state import TextState
from .verify import verify

LEAST_REACH = 256
"""Positions: the smallest bucket of contexts that share a captured iteration. The next ones are twice as long each."""


@dataclass(frozen=True)
class Commit:
    """What one step added to the text.

    Attributes:
        tokens: at least one.
        accepted: how many of ``tokens`` were drafted; the others are the target's own.
        drafted: how many were drafted in this step; 0 in plain decoding.
        agreed: how many of the drafted the target agreed with, also beyond a stop token or the limit.
        stopped: whether the last token is a stop token.
    """

    tokens: list[int]
    accepted: int
    drafted: int
    agreed: int
    stopped: bool


@dataclass
class DecodeStats:
    """Counts and times of one decode.

    Attributes:
        new_tokens: committed tokens.
        verification_steps: passes of the target over newly chosen rows; one a token in plain decoding.
        drafted: tokens drafted.
        accepted: drafted tokens that the target agreed with.
        accepted_at: ``accepted_at[i]`` counts the steps that accepted a draft at position i.
        prefill_seconds: time before the first step.
        decode_seconds: time of all steps.
    """

    new_tokens: int = 0
    verification_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def count(self, commit: Commit) -> None:
        """Add one step."""
        self.new_tokens += len(commit.tokens)
        self.verification_steps += 1
        self.drafted += commit.drafted
        self.accepted += commit.agreed
        self.accepted_at += [0] * (commit.agreed - len(self.accepted_at))
        for position in range(commit.agreed):
            self.accepted_at[position] += 1

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a verification step, bonus token included (the paper's compression rate)."""
        return self.new_tokens / self.verification_steps if self.verification_steps else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted of drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """The share of verification steps whose draft at each position was accepted (the paper's CTAR)."""
        return [count / self.verification_steps for count in self.accepted_at]

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens over the time of the steps, prefill left out."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name, for JSON."""
        return {
            "new_tokens": self.new_tokens,
            "verification_steps": self.verification_steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "mean_acceptance_length": self.mean_acceptance_length,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "acceptance_rate_per_position": self.acceptance_rate_per_position,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def prefill(target: Llama, drafter: Drafter | None, state: TextState, length: int, max_drafts: int) -> None:
    """Fill all caches for every token but the last, and make room for a text of ``length`` tokens."""
    reach = length + max_drafts + 1  # drafts beyond the limit still write their rows
    state.cache.reserve(reach, length)
    tokens = state.tokens[:-1]
    hidden = target.embed(tokens) if tokens else None
    first = 0
    if drafter is not None:
        assert state.adapter_cache is not None
        adapter = drafter.adapter
        state.adapter_cache.reserve(reach, length)
        state.exit_hidden = target.weights.embedding.new_zeros(1 + max_drafts + 1, target.config.hidden_size)
        state.adapter_length = len(tokens)
        if hidden is not None:
            first = drafter.exit_layer
            hidden = target.run(hidden, state.cache, 0, 0, first)
            adapter.run(hidden, state.adapter_cache, 0)
            state.exit_hidden[0] = hidden[-1]
    if hidden is not None:
        target.run(hidden, state.cache, 0, first, target.config.num_hidden_layers)


def kangaroo_steps(
    target: Llama,
    drafter: Drafter,
    state: TextState,
    chooser: Chooser,
    *,
    length: int,
    num_speculative_tokens: int,
    draft_confidence_threshold: float,
    stop_tokens: frozenset[int],
) -> Iterator[Commit]:
    """Steps of Kangaroo decoding until the text has ``length`` tokens or a stop token."""
    accept = target.operations.accept
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=target.device)
    while (remaining := length - len(state.tokens)) > 0:
        draft = drafter.draft(state, chooser, min(num_speculative_tokens, remaining - 1), draft_confidence_threshold)
        with span("kangaroo/verify"):
            wanted = verify(
                target, state, chooser, drafter.exit_layer, draft.exit_hidden, draft.tokens, draft.distributions
            )
        with span("kangaroo/accept"):
            agreed, reached, stopped = accept(draft.tokens, wanted, stops, len(state.tokens), length).tolist()
        with span("kangaroo/commit"):
            committed = wanted[: reached - len(state.tokens)].tolist()
            commit(state, committed)
        yield Commit(committed, min(agreed, len(committed)), len(draft.tokens), agreed, bool(stopped))
        if stopped:
            return


def commit(state: TextState, committed: list[int]) -> None:
    """Append the committed tokens and roll everything back to them, by length alone."""
    assert state.exit_hidden is not None
    state.tokens += committed
    state.exit_hidden[0] = state.exit_hidden[len(committed)]
    state.adapter_length = min(state.adapter_length, state.newest)


def plain_steps(
    target: Llama,
    state: TextState,
    chooser: Chooser,
    *,
    length: int,
    stop_tokens: frozenset[int],
) -> Iterator[Commit]:
    """Autoregressive decoding on the same operations, one token a step."""
    weights, config = target.weights, target.config
    for _ in range(length - len(state.tokens)):
        position = state.newest
        with span("kangaroo/verify"):
            hidden = target.run(target.embed(state.tokens[-1:]), state.cache, position, 0, config.num_hidden_layers)
            token = int(chooser.target(hidden, weights.norm, weights.head, config.rms_norm_eps, position + 1))
        state.tokens.append(token)
        stopped = token in stop_tokens
        yield Commit([token], accepted=0, drafted=0, agreed=0, stopped=stopped)
        if stopped:
            return


def device_steps(
    iteration: Iteration, runner: GraphRunner, state: TextState, *, length: int, lag: int | None = None
) -> Iterator[Commit]:
    """Steps of an iteration that stays on the device, until the text has ``length`` tokens or a stop token.

    The host launches ahead and reads afterwards what was committed: ``lag`` iterations later (1 on a GPU, 0 on a CPU if
    None). What runs beyond a stop token commits nothing.
    """
    if lag is None:
        lag = 1 if runner.device.type == "cuda" else 0
    rows = iteration.max_drafts + 1
    mailbox = Mailbox(iteration.report, lag + 1)
    while len(state.tokens) < length:
        while len(mailbox) <= lag and len(state.tokens) + len(mailbox) < length:  # each commits a token at least
            reach = bucket(len(state.tokens) + (len(mailbox) + 1) * rows, state.cache.capacity)
            runner.run((iteration.key, reach), partial(iteration.run, reach))
            mailbox.post()
        *record, lost = mailbox.read()
        if lost:
            runner.clear()  # what the grid left is prepared anew
            raise RuntimeError(f"draft_loop waited in vain for a program of its grid (error word {lost}).")
        step = read_record(record, length)
        if not step.tokens:  # never, unless memory was overwritten: the target always has a token
            raise RuntimeError("an iteration committed nothing; the device memory of this decode is damaged.")
        state.tokens += step.tokens
        yield step
        if step.stopped:
            return


def bucket(positions: int, capacity: int) -> int:
    """The bound of positions that an iteration is launched for: a power of two, or the cache's capacity."""
    return min(capacity, max(LEAST_REACH, 1 << (positions - 1).bit_length()))


def read_record(record: list[int], length: int) -> Commit:
    """What an iteration's record says, counted as the host's loop counts: no draft is made for beyond the limit."""
    before, reached, agreed, drafted, stopped = record[:RECORD_HEAD]
    tokens, most = record[RECORD_HEAD:][: reached - before], length - before - 1
    agreed, drafted = min(agreed, most), min(drafted, most)
    return Commit(tokens, min(agreed, len(tokens)), drafted, agreed, bool(stopped))
