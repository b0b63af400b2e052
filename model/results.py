"""What decoding gives: the commits of its steps, their counts and times, and the text."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place of the text, by the model's own distribution: temperature 1, nothing filtered.

    Attributes:
        token: the one that was chosen.
        logprob: its natural log-probability.
        top: the likeliest tokens and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Commit:
    """What one step added to the text.

    Attributes:
        tokens: the new tokens, at least one.
        accepted: how many of ``tokens`` were drafted; the others are the target's own.
        drafted: how many were drafted in this step; 0 in plain decoding.
        draft_steps: how often the drafter ran its network for them: once for each draft of a chain, once for each round
            of a tree, once for a block, never for looked-up tokens and in plain decoding.
        agreed: how many drafted tokens the target agreed with, also beyond a stop token or the limit.
        stopped: whether the last token is a stop token.
        logprobs: of each of ``tokens``; None where they were not asked for.
    """

    tokens: list[int]
    accepted: int
    drafted: int
    draft_steps: int
    agreed: int
    stopped: bool
    logprobs: list[TokenLogprobs] | None = None

    def cut(self, kept: int) -> "Commit":
        """The same step, ended by a stop string after ``kept`` of its tokens."""
        logprobs = None if self.logprobs is None else self.logprobs[:kept]
        accepted = min(self.accepted, kept)
        return replace(self, tokens=self.tokens[:kept], accepted=accepted, stopped=True, logprobs=logprobs)


@dataclass
class DecodeStats:
    """Counts and times of one decode.

    Attributes:
        new_tokens: committed tokens.
        verification_steps: passes of the target that gave new tokens; in plain decoding, one per token.
        drafted: tokens drafted.
        accepted: drafted tokens that the target agreed with.
        accepted_at: ``accepted_at[i]`` counts the steps that accepted a draft at position i.
        steps_without_drafts: verification steps in which nothing was drafted: all of plain decoding's, and those in
            which the drafter had nothing to say or was not asked (``draft_confidence_threshold="auto"``).
        draft_steps: how often the drafter ran its network, as ``Commit.draft_steps`` counts.
        prefill_seconds: time before the first step.
        decode_seconds: time of all steps.
        processor_seconds: time that the process had processors during the steps, summed over its threads.
        cached_tokens: tokens of the prompt that the session held already, from the text before.
        prefilled_tokens: tokens of the prompt that were run before the first step. The prompt's last token belongs to
            neither: the first step runs it.
    """

    new_tokens: int = 0
    verification_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    processor_seconds: float = 0.0
    steps_without_drafts: int = 0
    draft_steps: int = 0

    def count(self, commit: Commit) -> None:
        """Add one step."""
        self.new_tokens += len(commit.tokens)
        self.verification_steps += 1
        self.drafted += commit.drafted
        self.draft_steps += commit.draft_steps
        self.steps_without_drafts += not commit.drafted
        self.accepted += commit.agreed
        self.accepted_at += [0] * (commit.agreed - len(self.accepted_at))
        for position in range(commit.agreed):
            self.accepted_at[position] += 1

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per verification step, bonus token included (the paper's compression rate)."""
        return self.new_tokens / self.verification_steps if self.verification_steps else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """The share of the drafted tokens that were accepted."""
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
            "draft_steps": self.draft_steps,
            "accepted": self.accepted,
            "mean_acceptance_length": self.mean_acceptance_length,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "acceptance_rate_per_position": self.acceptance_rate_per_position,
            "steps_without_drafts": self.steps_without_drafts,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "processor_seconds": self.processor_seconds,
            "tokens_per_second": self.tokens_per_second,
            "cached_tokens": self.cached_tokens,
            "prefilled_tokens": self.prefilled_tokens,
        }


@dataclass(frozen=True)
class Generation:
    """What a decode gave.

    Attributes:
        text: the new text, without special tokens, cut before a stop string.
        tokens: the new tokens, a stop token included.
        stats: counts and times.
        finish_reason: ``stop``, ``length`` (``max_new_tokens`` reached), ``context`` (the model can take no more),
            ``timeout``, ``abort`` (closed by the caller) or ``error`` (a step raised); None while the text is written.
        seed: of the sampling noise, also where none was given.
        logprobs: of each of ``tokens``; None where they were not asked for.
    """

    text: str
    tokens: list[int]
    stats: DecodeStats
    finish_reason: str | None
    seed: int = 0
    logprobs: list[TokenLogprobs] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, for JSON."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "logprobs": None if self.logprobs is None else [asdict(entry) for entry in self.logprobs],
            "stats": self.stats.as_dict(),
        }


@dataclass
class Outcome:
    """A text while it is being written: what ``Generation`` will say, kept up to date with every step."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: str | None = None
    seed: int = 0
    logprobs: list[TokenLogprobs] | None = None

    def add(self, commit: Commit) -> None:
        """Append a step."""
        self.tokens += commit.tokens
        self.stats.count(commit)
        if self.logprobs is not None:
            self.logprobs += commit.logprobs or ()

    def end(self, reason: str) -> None:
        """Note why the text ended; the first reason stands."""
        self.finish_reason = self.finish_reason or reason

    def generation(self) -> Generation:
        """What was written so far, as a copy that later steps do not change."""
        stats = replace(self.stats, accepted_at=list(self.stats.accepted_at))
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return Generation(self.text, list(self.tokens), stats, self.finish_reason, self.seed, logprobs)


@dataclass(frozen=True)
class Progress:
    """One committed step as a caller sees it while it runs.

    Attributes:
        commit: its tokens and where they come from.
        pieces: what each of its tokens added to the text; empty while a character is incomplete.
    """

    commit: Commit
    pieces: list[str]
    _outcome: Outcome

    @property
    def generation(self) -> Generation:
        """Everything by the latest step; why it ended is known from the last one on."""
        return self._outcome.generation()

    @property
    def text(self) -> str:
        """What the step added to the text."""
        return "".join(self.pieces)
