"""How long the drafts of a step may be: as the request says, or found out while decoding (``auto``).

Drafting pays where a step gives more tokens than plain decoding would in the same time. Both are measured while the
text is written: ``Costs`` compares the time of steps with that of plain ones beside them, and every step with drafts
tells what it and all stricter limits give, since fewer drafts are the beginning of the same ones. Now and then a step
tries something else; what that loses is paid from a budget of 1 % of the tokens. The text is the same whatever is
chosen.

Both loops ask before a step and tell afterwards. The loop on the device asks for the next steps before it tells of the
last one, and it tells how long a step took, since a step's launch and its record are far apart there.
"""

import copy
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from ..drafters.protocol import Drafter
from ..request import Request

LENGTHS = (1, 2, 3, 4, 6, 8, 11, 15)
"""The draft lengths that ``auto`` chooses from, besides the drafter's own."""

BUDGET = 0.01
"""The share of the tokens that trying something else may cost."""

MOST_SAVED = 2.0
"""Tokens of the budget that may be kept for later, or owed: one hour's trials do not decide about the next."""

MEMORY = 0.92
"""What an observation counts for after the next one: about twelve of them decide."""

ENOUGH = 3
"""How many steps under some limits it takes to know what these limits give."""

COMPARED = 5
"""How many steps must be compared with a plain one before costs are known."""

BETTER = 1.03
"""Limits replace the current ones if they are at least 3 % faster, so that noise does not make the pace change."""


class Limits(NamedTuple):
    """What a drafter is asked for.

    Attributes:
        most: drafts.
        threshold: the confidence below which drafting stops.
    """

    most: int
    threshold: float


class Done(NamedTuple):
    """What came of a step.

    Attributes:
        drafts: that were made.
        agreed: how many of them the target agreed with.
        confidences: of the drafts; None where they have none.
        seconds: that the step took; None where it began when it was asked for and ends when it is told of.
        at_hand: whether its drafts took no draft steps.
        first: whether something was compiled or captured for it, so that its time is not that of later ones.
    """

    drafts: int
    agreed: int
    confidences: Sequence[float] | None = None
    seconds: float | None = None
    at_hand: bool = False
    first: bool = False


class Pace(Protocol):
    """Says before every step what to draft, and is told in the same order what came of each."""

    def limits(self, room: int, at_hand: bool = False) -> Limits:
        """Those of the next step, which has room for ``room`` drafts; those ``at_hand`` take no draft steps."""

    def record(self, done: Done) -> None:
        """Report the oldest unreported step."""


class Fixed:
    """The same limits for every step.

    Args:
        own: those of drafts that take draft steps.
        at_hand: of drafts that take none, where there is such a difference.
    """

    def __init__(self, own: Limits, at_hand: Limits | None = None) -> None:
        self._own, self._at_hand = own, at_hand or own

    def limits(self, room: int, at_hand: bool = False) -> Limits:
        """Always the same, where there is room."""
        most, threshold = self._at_hand if at_hand else self._own
        return Limits(min(most, room), threshold)

    def record(self, done: Done) -> None:
        """Nothing is learned."""


class Costs:
    """What a step costs by the number of its drafts, in steps of plain decoding.

    Only steps side by side are compared, so a machine that is slow for a while is slow for both of them.
    """

    def __init__(self) -> None:
        self._extra: deque[tuple[int, float]] = deque(maxlen=32)  # drafts of a step, and what each of them added
        self._costs: dict[int, float] = {}

    def compare(self, drafts: int, seconds: float, plain: float) -> None:
        """Take note of a step and of the plain one right after it."""
        self._extra.append((drafts, (seconds / plain - 1) / max(drafts, 1)))
        self._costs = {}

    @property
    def known(self) -> bool:
        """Whether enough steps were compared."""
        return len(self._extra) >= COMPARED

    def of(self, drafts: int) -> float:
        """The cost of a step with so many drafts: the median of the five comparisons nearest to it."""
        if drafts not in self._costs:
            alike = [(made, extra) for made, extra in reversed(self._extra) if bool(made) == bool(drafts)]
            nearest = sorted(alike, key=lambda pair: abs(pair[0] - drafts))[:5]  # of several alike, the latest
            extra = statistics.median([extra for _, extra in nearest]) if nearest else 0.0
            self._costs[drafts] = 1 + max(drafts, 1) * max(extra, 0.0)
        return self._costs[drafts]


@dataclass
class Rung:
    """Limits, and what steps under them give: sums in which older steps count less and less.

    Attributes:
        limits: of the draft.
        tokens: that were committed.
        costs: of these steps, in steps of plain decoding.
        seen: the number of steps, all counted alike.
    """

    limits: Limits
    tokens: float = 0.0
    costs: float = 0.0
    seen: int = 0

    def add(self, tokens: int, cost: float) -> None:
        """Take note of a step."""
        self.tokens += tokens
        self.costs += cost
        self.seen += 1

    def fade(self) -> None:
        """A step later, what was seen counts for less."""
        self.tokens *= MEMORY
        self.costs *= MEMORY

    @property
    def rate(self) -> float:
        """Tokens in the time of a plain step: above 1, drafting is faster than plain decoding."""
        return self.tokens / max(self.costs, 1e-9)

    def drafts_of(self, drafts: int, confidences: Sequence[float] | None) -> int:
        """How many drafts of a step would have been made under these limits."""
        unsure = (place for place, sure in enumerate(confidences or (), start=1) if not sure >= self.limits.threshold)
        return min(drafts, self.limits.most, next(unsure, self.limits.most))


def ladder(own: Limits, most: int) -> list[Rung]:
    """Limits from strict to loose, up to ``most`` drafts, including the drafter's own unless they exceed ``most``.

    Fewer drafts go with a threshold nearer to 1, more of them with one nearer to 0.
    """

    def threshold(length: int) -> float:
        share = length / own.most
        return 1 - (1 - own.threshold) * share if share < 1 else own.threshold / share

    lengths = sorted({length for length in (*LENGTHS, own.most, most) if length <= most})
    return [Rung(Limits(length, threshold(length))) for length in lengths]


class Asked(NamedTuple):
    """A step that was asked for.

    Attributes:
        rung: whose limits it has; None drafts nothing.
        trial: whether it tries something else than what is done.
        whole: whether it has room for all its drafts.
        began: by the clock.
    """

    rung: int | None
    trial: bool
    whole: bool
    began: float


class Auto:
    """Finds the limits with the most tokens a second, and drafts nothing where that is faster.

    It is kept from text to text: what was found out in one is where the next one begins. Drafts at hand are always
    taken: no draft step is saved without them, and their drafter says itself how sure it is of them.

    Args:
        own: the drafter's own limits, where the search begins.
        most: drafts a step at the most.
        at_hand: the limits of drafts that take no draft steps; ``own`` where there are none.
        clock: gives seconds.

    Attributes:
        drafting: whether steps draft, unless they try something else.
        rung: which limits of ``rungs`` they do it under.
        credit: tokens that trying something else may cost.
    """

    def __init__(
        self, own: Limits, most: int, at_hand: Limits | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.rungs, self.costs, self._clock, self._at_hand = ladder(own, most), Costs(), clock, Fixed(at_hand or own)
        self.rung = max(index for index, rung in enumerate(self.rungs) if rung.limits.most <= own.most)
        self.drafting, self.credit = True, 0.0
        self._trials: list[int | None] = []  # the rungs of the next steps; None drafts nothing
        self._trial = 0  # counts them
        self._asked: deque[Asked] = deque()  # the steps that nobody has told of yet
        self._row: list[tuple[int, float]] = []  # drafts and seconds of the steps since the last one without drafts

    @property
    def _usual(self) -> int | None:
        return self.rung if self.drafting else None

    # ---- before a step

    def limits(self, room: int, at_hand: bool = False) -> Limits:
        """Those that were found, or others that are tried out."""
        if at_hand:
            self._asked.append(Asked(None, False, True, self._clock()))
            return self._at_hand.limits(room)
        if not self._trials and (self.credit > 0 or not self.costs.known):
            self._trials = self._something_else()
        rung = self._trials.pop(0) if self._trials else self._usual
        if not room:
            rung = None
        most, threshold = (0, 1.0) if rung is None else self.rungs[rung].limits
        self._asked.append(Asked(rung, rung != self._usual, most <= room, self._clock()))
        return Limits(min(most, room), threshold)

    def _something_else(self) -> list[int | None]:
        """What the next steps try out: drafting where there is none; else looser limits, and now and then no drafts.

        A drafter that was not asked for a while takes longer in its first step, so the second one is timed.
        """
        self._trial += 1
        if not self.drafting or not self.costs.known:
            return [self.rung, self.rung, None]
        if self._trial % 3 and self.rung + 1 < len(self.rungs):
            return [self.rung + 1] * ENOUGH
        return [None, self.rung]

    # ---- after it

    def record(self, done: Done) -> None:
        """Learn from a step."""
        asked, drafts, tokens = self._asked.popleft(), done.drafts, done.agreed + 1
        if done.at_hand or done.first:
            return
        seconds = self._clock() - asked.began if done.seconds is None else done.seconds
        if asked.rung is not None:
            self._row.append((drafts, seconds))
        else:
            if len(self._row) > 1:
                self.costs.compare(*self._row[-1], seconds)
            self._row = []
        if not self.costs.known:
            return
        cost, rate = self.costs.of(drafts) if self._row else 1.0, self._rate()
        if rate is not None:
            self.credit += BUDGET * cost * rate
            if asked.trial:
                self.credit += tokens - cost * rate
            self.credit = min(max(self.credit, -MOST_SAVED), MOST_SAVED)
        if asked.rung is not None and asked.whole:
            for rung in self.rungs:
                rung.fade()
            for rung in self.rungs[: asked.rung + 1]:
                made = rung.drafts_of(drafts, done.confidences)
                rung.add(min(done.agreed, made) + 1, self.costs.of(made))
            self._choose()

    def _rate(self) -> float | None:
        """Tokens that a usual step gives in the time of a plain one; None while that is not known."""
        rung = self.rungs[self.rung]
        if not self.drafting:
            return 1.0
        return rung.rate if rung.seen >= ENOUGH else None

    def _choose(self) -> None:
        """Take the best limits up to the next looser ones, and draft where that is faster than plain decoding."""
        within = [index for index, rung in enumerate(self.rungs[: self.rung + 2]) if rung.seen >= ENOUGH]
        if not within:
            return
        best = max(within, key=lambda index: self.rungs[index].rate)
        if self.rung not in within or self.rungs[best].rate > BETTER * self.rungs[self.rung].rate:
            self.rung = best
        self.drafting = self.rungs[self.rung].rate > (1 / BETTER if self.drafting else BETTER)

    def again(self) -> "Auto":
        """For the next text: what was found so far is where it begins. The costs are the machine's, and shared."""
        other = copy.copy(self)
        other.rungs = [replace(rung) for rung in self.rungs]
        other._trials, other._row, other._asked = [], [], deque()
        return other


Paces = dict[tuple[Limits, Limits, int, bool], Auto]
"""The pace of the latest text, by where it began, the most drafts that it may take, and whether it is on the device."""


def pace_of(request: Request, drafter: Drafter, paces: Paces, on_the_device: bool = False) -> Pace:
    """The pace of a request; it begins where that of the latest text of its kind stands.

    On the device the number of drafts is a matter of shapes, so there are never more than the drafter's own.
    """
    at_hand = Limits(request.max_drafts, request.threshold)
    steps = drafter.num_draft_steps or request.max_drafts
    own = Limits(min(steps, request.max_drafts), request.threshold)
    if not request.auto_drafts:
        return Fixed(own, at_hand)
    most = own.most if on_the_device else request.auto_drafts
    latest = paces.get(kind := (own, at_hand, most, on_the_device))
    pace = paces[kind] = Auto(own, most, at_hand) if latest is None else latest.again()
    return pace
