"""The decode loop that is resident on the device: the host launches ahead and reads afterwards what was committed."""

from collections import deque
from collections.abc import Iterator
from functools import partial

from kangaroo_kernels.contract import RECORD_HEAD, Record

from ..drafters.protocol import AS_DRAFTED
from ..results import Commit
from .iteration import Iteration
from .mailbox import Mailbox, Stopwatch
from .pace import Done, Limits, Pace
from .state import not_finite

LEAST_REACH = 256
"""The smallest bucket, in positions, of contexts that share a captured iteration. Each next one is twice as long."""


class Paced:
    """A pace on the device: before an iteration its limits are sent there, after it there is something to learn.

    Args:
        iteration: what is launched again and again.
        pace: says how much to draft.
        slots: the most iterations that nobody has read of.
    """

    def __init__(self, iteration: Iteration, pace: Pace, slots: int) -> None:
        self.iteration, self.pace = iteration, pace
        self._confidences = Mailbox(iteration.buffers.drafts.confidence, slots)
        self._at_hand = Mailbox(iteration.buffers.at_hand, slots)
        self._watch = Stopwatch(iteration.runner.device)
        self._prepared: deque[bool] = deque()  # of the iterations that nobody has read of
        self._sent: Limits | None = None

    def begin(self) -> None:
        """The next iteration is about to be launched."""
        limits = self.pace.limits(self.iteration.max_drafts)
        if limits != self._sent:
            self.iteration.buffers.draft_within(limits)
            self._sent = limits
        self._watch.mark()

    def end(self, prepared: bool) -> None:
        """It was launched; ``prepared`` as ``GraphRunner.run`` returned."""
        self._watch.mark()
        self._prepared.append(prepared)
        self._confidences.post()
        self._at_hand.post()

    def learn(self, record: list[int]) -> None:
        """What an iteration committed was read."""
        head, confidences, seconds = Record(*record[:RECORD_HEAD]), self._confidences.read(), self._watch.read()
        at_hand = any(self._at_hand.read())
        first = not self._prepared.popleft()
        self.pace.record(Done(head.drafted, head.agreed, confidences[: head.drafted], seconds, at_hand, first))


def device_steps(
    iteration: Iteration, *, length: int, pace: Pace | None = None, lag: int | None = None
) -> Iterator[Commit]:
    """Steps of an iteration that stays on the device, until the text has ``length`` tokens or a stop token.

    The host reads what an iteration committed ``lag`` iterations later (1 on a GPU, 0 on a CPU if None). An
    iteration that runs after a stop token commits nothing. ``pace``, for an iteration whose ``auto`` is true, says how
    much each may draft.

    Raises:
        KangarooError: the target's logits are not finite.
    """
    text, runner, rows = iteration.text, iteration.runner, iteration.max_drafts + 1
    if lag is None:
        lag = 1 if runner.device.type == "cuda" else 0
    mailbox = Mailbox(iteration.buffers.report, lag + 1)
    paced = None if pace is None else Paced(iteration, pace, lag + 1)
    while len(text.tokens) < length:
        while len(mailbox) <= lag and len(text.tokens) + len(mailbox) < length:  # each commits at least one token
            reach = bucket(len(text.tokens) + (len(mailbox) + 1) * rows, text.cache.capacity)
            if paced is not None:
                paced.begin()
            prepared = runner.run((iteration.key, reach), partial(iteration.run, reach))
            if paced is not None:
                paced.end(prepared)
            mailbox.post()
        *record, draft_steps, lost = mailbox.read()
        if lost:
            runner.clear()  # the next text prepares the loop again, with a new grid state
            raise RuntimeError(f"draft_loop failed: a program never came to a barrier (error word {lost}).")
        step = read_record(record, draft_steps, length, tree=iteration.buffers.walked is not None)
        if not step.tokens and record[0] == len(text.tokens):  # the target's first row was not finite
            raise not_finite(text, iteration.target.dtype)
        if not step.tokens:  # never, unless memory was overwritten
            raise RuntimeError("an iteration committed nothing; the device memory of this decode is damaged.")
        if paced is not None:
            paced.learn(record)
        text.tokens += step.tokens
        yield step
        if step.stopped:
            return


def bucket(positions: int, capacity: int) -> int:
    """The bound of positions that an iteration is launched for: a power of two, or the cache's capacity."""
    return min(capacity, max(LEAST_REACH, 1 << (positions - 1).bit_length()))


def read_record(record: list[int], draft_steps: int, length: int, tree: bool) -> Commit:
    """Turn an iteration's record into a ``Commit``, counted like the host's loop: it drafts nothing past the limit.

    A tree leaves out what is past the limit by itself. ``draft_steps`` is what ``Buffers.draft_steps`` held.
    """
    head = Record(*record[:RECORD_HEAD])
    tokens, most = record[RECORD_HEAD:][: head.reached - head.before], length - head.before - 1
    agreed, drafted = min(head.agreed, most), head.drafted if tree else min(head.drafted, most)
    steps = drafted if draft_steps == AS_DRAFTED else draft_steps
    return Commit(tokens, min(agreed, len(tokens)), drafted, steps, agreed, bool(head.stopped))
