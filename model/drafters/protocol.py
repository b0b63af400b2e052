"""What a drafter is: a class that proposes tokens. Verification decides, so no drafted token can change the text.

Two loops use it. The loop led by the host (``loop/host.py``) asks ``propose`` for the drafts of a step. The loop that
is resident on the device (``loop/iteration.py``) asks for ``stages``: work that reads and writes the iteration's
buffers and never asks the host. A drafter may have one of the two or both; a loop that cannot run it raises an error.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..errors import KangarooError
from ..number import is_number, is_whole

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState
    from ..sampling import Chooser
    from ..target.llama import Llama

PAPER_NUM_SPECULATIVE_TOKENS = 6
PAPER_DRAFT_CONFIDENCE_THRESHOLD = 0.6
AS_DRAFTED = -1
"""In ``Buffers.draft_steps``: the iteration took as many draft steps as it made drafts."""


@dataclass(frozen=True)
class Draft:
    """k drafted tokens, a chain or a tree, and the hidden states that verification starts from.

    Attributes:
        tokens: ``[k]`` int64; k may be 0.
        hidden: ``[k + 1, hidden]``: what layer ``first_layer`` reads for the newest token and for every draft (their
            embeddings where ``first_layer`` is 0). Where a draft's values overflow, the loop corrects the newest
            token's row in place, so a drafter that keeps these rows gives a view of them.
        distributions: ``[k, V]`` float32, what each token was drawn from, which rejection sampling needs; None means
            that the drafter is certain of each.
        confidences: of each token, what was held against the threshold; None where the drafter has none.
        parents: the row that each token follows, for a tree: 0 for the newest token, ``i + 1`` for the draft ``i``,
            which must come before. None means a chain: 0, 1, 2, ... What ``first_layer`` and all layers below keep of
            the rows lies in slots that follow each other, in the order of the drafts. Rejection sampling takes a tree's
            drafts for candidates: the target's own sample decides, with its own distribution.
        steps: how often the drafter ran its network for the tokens; None means once for each token of the longest
            branch. (Drafts ``at_hand`` take no steps, whatever this says.)
    """

    tokens: Tensor
    hidden: Tensor
    distributions: Tensor | None = None
    confidences: tuple[float, ...] | None = None
    parents: tuple[int, ...] | None = None
    steps: int | None = None

    @property
    def is_tree(self) -> bool:
        """Whether it is a tree, of one draft at least."""
        return bool(self.parents)

    @property
    def ancestors(self) -> Tensor:
        """``masks`` on the device: ``[k + 1]`` int32."""
        return torch.tensor(self.masks, dtype=torch.int32, device=self.tokens.device)

    @property
    def masks(self) -> list[int]:
        """``ancestors`` of each row (``kangaroo_kernels/reference/ancestors.py``)."""
        masks = [1]
        for row, parent in enumerate(self.parents or range(len(self.tokens)), start=1):
            masks.append(masks[parent] | 1 << row)
        return masks

    @property
    def longest(self) -> int:
        """How many tokens the longest branch has."""
        return max(mask.bit_count() for mask in self.masks) - 1

    @property
    def draft_steps(self) -> int:
        """How often the drafter ran its network: ``steps``, or what stands in for it."""
        return self.longest if self.steps is None else self.steps


def check_draft(drafter: "Drafter", text: "TextState", draft: object, most: int) -> None:
    """Raise unless a draft has the form that verification goes on from."""
    name = type(drafter).__name__
    if not isinstance(draft, Draft) or not isinstance(draft.tokens, Tensor) or not isinstance(draft.hidden, Tensor):
        raise KangarooError(f"{name}.propose must give a Draft whose tokens and hidden are tensors.")
    count, rows = len(draft.tokens), len(draft.hidden)
    if draft.parents is not None:
        parents = draft.parents
        fits = len(parents) == count == rows - 1 <= MAX_SPECULATIVE_TOKENS
        if not fits or not all(0 <= parent <= row for row, parent in enumerate(parents)):
            raise KangarooError(
                f"{name}.propose gave {count} tokens, {rows} rows and the parents {parents}; it may give up to "
                f"{MAX_SPECULATIVE_TOKENS} tokens, a row for the newest token and for each of them, and for each an "
                "earlier row that it follows."
            )
        if draft.longest > most:
            raise KangarooError(f"{name}.propose gave a branch of {draft.longest} tokens; it may give up to {most}.")
        if text.cache.dtype != draft.hidden.dtype:
            raise KangarooError(f"{name}.propose gave a tree; with kv_dtype='float16' it may give chains alone.")
    elif count > most or rows != count + 1:
        raise KangarooError(
            f"{name}.propose gave {count} tokens and {rows} rows; it may give up to {most} tokens, "
            "and must give a row for the newest token and for each of them."
        )


class Stage(NamedTuple):
    """A part of an iteration on the device.

    Attributes:
        name: as profilers show it.
        work: launches it.
    """

    name: str
    work: Callable[[], object]


class Drafter:
    """Proposes tokens: the base of all drafters, which have ``propose``, ``stages`` or both and inherit the rest.

    Attributes:
        first_layer: the first of the target's layers that verification runs. A drafter that ran the ones before it on
            every row hands on their output; 0 means that it ran none.
        num_speculative_tokens: the most drafts a step, 1 to 15, where the caller names no number.
        draft_confidence_threshold: the confidence below which drafting stops, 0 to 1, where the caller names none. What
            the confidence is, each drafter decides for itself.
        num_draft_steps: the most drafts a step that take draft steps, where there are others ``at_hand``; 0 where there
            are none.
        draft_tree: the most drafts of a tree, 1 to 15, whose branches ``num_speculative_tokens`` then bounds; 0 for a
            drafter of chains.
        auto: whether both are starting points where the caller names neither, and the loop led by the host finds
            better ones while it decodes (``loop/pace.py``); it may then ask for no draft for a long time. The resident
            loop does so only where the caller asks for it.
    """

    first_layer: int = 0
    num_speculative_tokens: int = PAPER_NUM_SPECULATIVE_TOKENS
    draft_confidence_threshold: float = PAPER_DRAFT_CONFIDENCE_THRESHOLD
    num_draft_steps: int = 0
    draft_tree: int = 0
    auto: bool = False

    def new_memory(self) -> Any:
        """What the drafter keeps of one text, caches for instance; every session has its own as ``text.memory``."""
        return None

    def keep(self, memory: Any, count: int, length: int) -> int:
        """How many of the text's first tokens need no prefill, since ``memory`` holds them from the text before.

        Unless a drafter says otherwise: all where it has no ``prefill``, none where it has one.

        Args:
            memory: what ``new_memory`` made, as the text before left it.
            count: how many tokens both texts begin with, less those that memory need not hold: the last three of the
                text before and the last two of the new one.
            length: the most tokens that the new text may have.
        """
        return 0 if provides(self, "prefill") else count

    def prefill(self, text: "TextState", hidden: Tensor | None, reach: int, length: int) -> None:
        """Begin a text.

        Args:
            text: its tokens, caches and memory; ``text.final`` is the last layer's output at the same positions.
            hidden: ``[m, hidden]``, what layer ``first_layer`` reads for the m tokens before the last: all of them, or
                those that ``keep`` left; None for a prompt of one token.
            reach: positions that may be written, drafts beyond the end included.
            length: the most tokens that the text may have.
        """
        return None

    def at_hand(self, text: "TextState", most: int, threshold: float) -> bool:
        """Whether the next drafts take no draft steps, so that nothing is saved without them.

        The loop led by the host asks before each ``propose``. Such drafts are bounded by ``num_speculative_tokens``
        and the request's threshold alone, others by ``num_draft_steps`` or what ``auto`` finds (``loop/pace.py``), too.
        """
        return False

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """Draft at most ``most`` tokens after the newest one, for the loop led by the host.

        A tree may have up to 15 of them, and no branch longer than ``most``. ``most`` may be 0; ``hidden`` has a row
        for the newest token all the same. ``text`` is the loop's own: its tokens are read here, and never changed.
        """
        raise NotImplementedError

    def rows(self, most: int) -> int:
        """Rows of drafts that an iteration on the device has, for branches of at most ``most`` tokens."""
        return most

    def straighten(self, text: "TextState", path: Tensor, position: int | Tensor) -> None:
        """The target took a path through a tree that was proposed: move what memory holds of its rows.

        It goes where a chain of the same tokens would have left it; the loop does the same with the target's cache. On
        the loop led by the host, ``commit`` follows.

        Args:
            text: as it was when the tree was proposed.
            path: ``[R + 1]`` int64, the rows in the order of the text, as ``walk`` gives them.
            position: of row 0, the newest token; ``[1]`` int64 on the device, where nothing may ask the host.
        """
        return None

    def commit(self, text: "TextState", count: int) -> None:
        """Roll back to the text, whose last ``count`` tokens have just been committed; for the loop led by the host.

        ``text.final`` is the last layer's output for the newest token before them and for the drafts.
        """
        return None

    def attach(self, iteration: "Iteration") -> None:
        """Begin a text on the device: what the iteration's buffers do not hold yet. It may ask the host.

        Memory of the drafter's own that ``stages`` will read or write is given to ``iteration.runner.rely_on``, so that
        graphs go when it moves.
        """
        return None

    def stages(self, iteration: "Iteration", reach: int) -> Iterable[Stage]:
        """Draft, for the loop on the device. No position is beyond ``reach``, and nothing may ask the host.

        On a GPU the work is captured once and replayed from then on: whatever changes from iteration to iteration is
        read from device memory, never from Python. Work of another kind has stages of other names.

        For each draft ``j`` that is made, the work leaves its token in ``buffers.drafts.token[j]`` and its confidence,
        where it has one, in ``buffers.drafts.confidence[j]``; ``flags[j + 1]`` is 1 where another one follows it.
        ``flags[0]`` is 1 while the text grows; a drafter may lower it, which means that it makes no draft.
        ``buffers.thresholds[r]`` says which confidence row ``r`` needs for a draft to follow it; the newest token, and
        drafts that have no confidence, count as certain. Where ``iteration.auto`` is true the thresholds change, and
        one above 1 forbids the draft, even the first (``buffers.forbid``). ``buffers.exit_hidden[1 + r]`` holds what
        layer ``first_layer`` reads for row ``r``: the newest token is row 0, draft ``j`` is row ``j + 1``. Rows of
        drafts that are not made must be finite.

        A drafter of trees (``draft_tree`` above 0) also leaves ``buffers.ancestors``. It has ``rows`` drafts; -1 stands
        for the token of one that is not made, which follows the row before it. ``flags[j]`` says whether draft ``j``
        was.

        ``buffers.draft_steps`` says how often the drafter ran its network: as often as there are drafts
        (``AS_DRAFTED``), unless the drafter leaves another number there.
        """
        raise NotImplementedError

    def observations(self, iteration: "Iteration") -> Iterable[Stage]:
        """Look at what the target found, for the loop on the device: work between verification and commit.

        ``iteration.final`` is the last layer's output for every row. The rules of ``stages`` hold.
        """
        return ()


def provides(drafter: Drafter, method: str) -> bool:
    """Whether a drafter has a method of its own, and not the one that ``Drafter`` only declares."""
    return getattr(type(drafter), method) is not getattr(Drafter, method)


def check_drafter(drafter: object, target: "Llama") -> None:
    """Check a drafter against the target and its loop.

    Raises:
        KangarooError: it is none, it was made for another target, or a number is out of its range.
    """
    if not isinstance(drafter, Drafter):
        raise KangarooError(f"the drafter is {drafter!r}; it must be an object of a class derived from Drafter.")
    name, most = type(drafter).__name__, MAX_SPECULATIVE_TOKENS
    if getattr(drafter, "target", target) is not target:
        raise KangarooError(f"this {name} was made for another target; make one for the target that it drafts for.")
    for attribute, low, high in (
        ("first_layer", 0, target.config.num_hidden_layers - 1),
        ("num_speculative_tokens", 1, most),
        ("num_draft_steps", 0, most),
        ("draft_tree", 0, most),
    ):
        value = getattr(drafter, attribute)
        if not is_whole(value) or not low <= value <= high:
            raise KangarooError(f"{name}.{attribute} is {value!r}; it must be a whole number from {low} to {high}.")
    threshold = drafter.draft_confidence_threshold
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise KangarooError(f"{name}.draft_confidence_threshold is {threshold!r}; it must be a number from 0 to 1.")
    check_loop(drafter, target.backend.resident)


def check_loop(drafter: Drafter, resident: bool) -> None:
    """Raise unless the loop, resident on the device or led by the host, can run the drafter."""
    name = type(drafter).__name__
    if resident and not provides(drafter, "stages"):
        raise KangarooError(
            f"{name} has no stages(), which the loop on the device drafts with; give it one, or load the target with "
            "kernels='reference'."
        )
    if not resident and not provides(drafter, "propose"):
        raise KangarooError(f"{name} has no propose(), which the loop led by the host drafts with; give it one.")
