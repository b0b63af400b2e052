"""Drafters that stand in for the real one: they say what a test wants and record what the adapter would have said."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.contract import Top1
from kangaroo_kernels.model.backend import REFERENCES, Backend
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.drafters.protocol import Draft, Drafter
from kangaroo_kernels.model.loop.state import TextState
from kangaroo_kernels.model.sampling import Chooser

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_drafter.py"

Say = Callable[[int, int, int, float], tuple[int, float]]
"""(position of the token, its place in this step's draft, the adapter's own token and confidence) to what is said."""


class Scripted(KangarooDrafter):
    """Runs the adapter as the real drafter does, then says what ``say`` wants.

    Attributes:
        states: the state seen by every step, the same object again and again.
        drafts: every step's drafted tokens, with the length of the text before it.
        own: ``(position, token, confidence)`` of every guess that the adapter itself made.
    """

    def __init__(self, real: KangarooDrafter, say: Say | None = None) -> None:
        super().__init__(real.target, real.adapter)
        self.say = say
        self.states: list[TextState] = []
        self.drafts: list[tuple[int, list[int]]] = []
        self.own: list[tuple[int, int, float]] = []

    def propose(self, text: TextState, chooser: Chooser, most: int, threshold: float) -> Draft:
        self.states.append(text)
        length = len(text.tokens)
        draft = super().propose(text, chooser, most, threshold)
        self.drafts.append((length, draft.tokens.tolist()))
        return draft

    def guess(
        self, hidden: Tensor, chooser: Chooser, position: int, drafted: Sequence[int] = ()
    ) -> tuple[Top1, Tensor | None]:
        guess, distribution = super().guess(hidden, chooser, position, drafted)
        token, confidence = int(guess.token), float(guess.confidence)
        self.own.append((position, token, confidence))
        if self.say is None:
            return guess, distribution
        token, confidence = self.say(position, position - len(self.states[-1].tokens), token, confidence)
        if distribution is not None:  # what is always said was drawn from a distribution that knows nothing else
            distribution = torch.nn.functional.one_hot(torch.tensor([token]), distribution.shape[-1]).float()
        return Top1(torch.tensor([token]), torch.tensor([confidence])), distribution


class NotANumber(KangarooDrafter):
    """An adapter whose output is NaN throughout."""

    def guess(
        self, hidden: Tensor, chooser: Chooser, position: int, drafted: Sequence[int] = ()
    ) -> tuple[Top1, Tensor | None]:
        return super().guess(torch.full_like(hidden, float("nan")), chooser, position, drafted)


def oracle(text: Sequence[int], confidence: float = 1.0) -> Say:
    """Always right: ``text`` is the whole text, prompt included, as plain decoding gives it."""
    return lambda position, place, token, sure: (text[position] if position < len(text) else 0, confidence)


def right_until(text: Sequence[int], count: int, vocab_size: int) -> Say:
    """Right for the first ``count`` drafts of every step, then wrong; 0 is always wrong."""

    def say(position: int, place: int, token: int, sure: float) -> tuple[int, float]:
        right = text[position] if position < len(text) else 0
        return (right if place < count else (right + 1) % vocab_size), 1.0

    return say


def with_drafter(kangaroo: Kangaroo, drafter: KangarooDrafter) -> Kangaroo:
    """The same target behind another drafter."""
    return Kangaroo(kangaroo.target, drafter, kangaroo.tokenizer)


def in_one_launch(kangaroo: Kangaroo) -> Kangaroo:
    """The same target and adapter with ``persistent=True``."""
    drafter = kangaroo.drafter
    return with_drafter(kangaroo, KangarooDrafter(drafter.target, drafter.adapter, persistent=True))


def example_drafter() -> type[Drafter]:
    """The class of ``examples/own_drafter.py``."""
    spec = importlib.util.spec_from_file_location("own_drafter", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PromptLookup


def on_the_device(kangaroo: Kangaroo) -> Kangaroo:
    """The same with the loop on the device, on the references: quick, if not free of questions to the host."""
    assert kangaroo.drafter is not None
    return with_backend(kangaroo, replace(REFERENCES, resident=True))


def with_backend(kangaroo: Kangaroo, backend: Backend) -> Kangaroo:
    """The same target and drafter, computing with other operations."""
    adapter = getattr(kangaroo.drafter, "adapter", None)
    for part in (kangaroo.target, *kangaroo.target.layers, *([adapter.layer] if adapter else ())):
        part.backend = backend
    return kangaroo
