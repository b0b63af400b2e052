"""Plain decoding and Kangaroo write the same text at once: whichever has taken less time so far takes the next step.

So both are as far as they would be on a machine each, and a slow second is slow for both.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ..kangaroo import Kangaroo
from ..request import Settings
from ..results import Progress
from ..session import Writing
from .compare import Comparison
from .loops import looping_tokens

BUSY = 0.85
"""A process that had the processor for less of its time than this was disturbed by others."""
WARM_UP_STEPS = 8


def warm_up(kangaroo: Kangaroo) -> None:
    """Take some steps: what the first ones need (threads, binaries, captured graphs) is not a pair's speed."""
    Race(kangaroo, Settings(max_new_tokens=8 * WARM_UP_STEPS), [0]).finish(steps=WARM_UP_STEPS)


class Race:
    """A text written twice. Iterating takes the steps; each comes with the ``Writing`` that it belongs to.

    Args:
        kangaroo: the model and its drafter.
        settings: of both texts; ``plain`` does not matter.
        prompt: as for ``Kangaroo.progress``.
        messages: in the place of the prompt.

    Attributes:
        plain: the text without drafts.
        drafted: the text with them.

    Raises:
        KangarooError: a setting or prompt that cannot be used.
    """

    def __init__(self, kangaroo: Kangaroo, settings: Settings, prompt: Any = None, messages: Any = None) -> None:
        settings = settings.with_seed()  # the same noise for both
        self.plain = kangaroo.progress(prompt, replace(settings, plain=True), messages=messages)
        self.drafted = kangaroo.progress(prompt, replace(settings, plain=False), messages=messages)

    def __iter__(self) -> Iterator[tuple[Writing, Progress]]:
        running = [self.plain, self.drafted]
        while running:
            text = min(running, key=lambda one: one.outcome.stats.decode_seconds)
            step = next(text, None)
            if step is None:
                running.remove(text)
            else:
                yield text, step

    def finish(self, steps: int | None = None) -> None:
        """Take all steps, or so many."""
        for _ in islice(self, steps):
            pass

    @property
    def disturbed(self) -> bool:
        """Whether other work on the machine took much of the time, so that the speeds say little."""
        both = [text.outcome.stats for text in (self.plain, self.drafted)]
        return sum(each.processor_seconds for each in both) < BUSY * sum(each.decode_seconds for each in both)

    def comparison(self, name: str) -> Comparison:
        """The figures of both texts as they stand, under a name."""
        plain, drafted = self.plain.outcome, self.drafted.outcome
        speeds = plain.stats.tokens_per_second, drafted.stats.tokens_per_second
        return Comparison(
            name,
            *speeds,
            speedup=speeds[1] / speeds[0] if speeds[0] else 0.0,
            identical=plain.tokens == drafted.tokens,
            stats=drafted.stats,
            looping=looping_tokens(drafted.tokens),
        )
