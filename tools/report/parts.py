"""The parts of the report, in their order, and how the time is shared out."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A part; the module of its name in this package runs it.

    Attributes:
        share: of the time, relative to the others'.
        what: it does, in a few words.
    """

    name: str
    share: float
    what: str


PARTS = (
    Part("environment", 25, "versions, and the card's measured ceilings"),
    Part("tests", 85, "the tests that need a GPU"),
    Part("equality", 35, "bit-equality at real shapes"),
    Part("kernels", 80, "microbenchmarks beside PyTorch's own ways"),
    Part("decode", 140, "decode speeds with random weights, plain and Kangaroo"),
    Part("baselines", 130, "transformers on the same card"),
    Part("timeline", 20, "one iteration, kernel by kernel"),
    Part("tuning", 25, "launch configurations, if time is left"),
)
PAIR = Part("pair", 90, "a trained pair on held-out prompts")


def choose(only: Sequence[str] | None, with_pair: bool) -> list[Part]:
    """The parts asked for, in their order.

    Without ``only`` these are all, or with a pair the environment and the pair.

    Raises:
        ValueError: a name that is none, or the pair's part without a pair.
    """
    known = {part.name: part for part in (*PARTS, PAIR)}
    if only is None:
        return [PARTS[0], PAIR] if with_pair else list(PARTS)
    unknown = [name for name in only if name not in known]
    if unknown or not only:
        raise ValueError(f"there is no part called {', '.join(unknown) or 'so'}; there are {', '.join(known)}.")
    if PAIR.name in only and not with_pair:
        raise ValueError("the part pair needs --pair DIR, a folder with target/, adapter/ and prompts.json.")
    if with_pair and PAIR.name not in only:
        raise ValueError("--pair is given, but --only leaves the part pair out; name it too.")
    return [part for name, part in known.items() if name in only]


def budgets(parts: Iterable[Part], seconds: float) -> list[float]:
    """What each part may take of the time that is left."""
    shares = [part.share for part in parts]
    return [max(0.0, seconds) * share / sum(shares) for share in shares]
