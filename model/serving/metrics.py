"""What Prometheus is told: requests by outcome, tokens, drafts, queue, and how long each part takes."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..results import DecodeStats
from .pool import Pool

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

COMPLETED, REFUSED, BUSY, CANCELLED, ERROR = "completed", "refused", "busy", "cancelled", "error"
OUTCOMES = (COMPLETED, REFUSED, BUSY, CANCELLED, ERROR)
"""How a request ended: written to its end; refused for what it asked; refused since the queue was full or the server
shut down; left by its client; ended by an error."""


class Metrics:
    """The counts of one server, in a registry of its own."""

    def __init__(self, pool: Pool) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by how they ended.", "outcome")
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Tokens of prompts that a session held already.")
        self.generated_tokens = self._counter("generated_tokens", "New tokens.")
        self.steps = self._counter("verification_steps", "Passes of the model that gave new tokens.")
        self.drafted = self._counter("draft_tokens", "Drafted tokens.")
        self.accepted = self._counter("accepted_draft_tokens", "Drafted tokens that the model agreed with.")
        self._generated = self._steps = 0
        self._gauge("mean_acceptance_length", "New tokens a pass, of all texts so far.", self._mean_acceptance_length)
        self._gauge("queue_length", "Requests that wait for a session.", lambda: pool.waiting)
        self._gauge("running_requests", "Texts that are being written.", lambda: pool.running)
        self.queue_seconds = self._histogram("queue_seconds", "Waiting for a session.", SECONDS)
        self.first_token_seconds = self._histogram("first_token_seconds", "From a request to its first text.", SECONDS)
        self.request_seconds = self._histogram("request_seconds", "From a request to its text's end.", SECONDS)
        self.token_seconds = self._histogram("token_seconds", "Mean time of a text's new tokens.", TOKEN_SECONDS)

    def count(self, prompt: int, stats: DecodeStats) -> None:
        """Add a text that has ended, in whatever way."""
        self.prompt_tokens.inc(prompt)
        self.cached_tokens.inc(stats.cached_tokens)
        self.generated_tokens.inc(stats.new_tokens)
        self.steps.inc(stats.verification_steps)
        self.drafted.inc(stats.drafted)
        self.accepted.inc(stats.accepted)
        self._generated += stats.new_tokens
        self._steps += stats.verification_steps
        if stats.new_tokens:
            self.token_seconds.observe(stats.decode_seconds / stats.new_tokens)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _mean_acceptance_length(self) -> float:
        return self._generated / self._steps if self._steps else 0.0

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"kangaroo_{name}", what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        Gauge(f"kangaroo_{name}", what, registry=self.registry).set_function(read)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"kangaroo_{name}", what, registry=self.registry, buckets=buckets)
