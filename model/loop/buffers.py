"""The device memory of an iteration: what an iteration reads and writes, by name."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo_kernels.contract import NO_TOKEN, RECORD_HEAD, Top1, Walk, seed_bits

from ..drafters.protocol import AS_DRAFTED
from ..request import Request
from ..sampling import SamplingTensors
from ..target.llama import Llama
from .graphs import GraphRunner
from .pace import Limits
from .state import TextState

LEAST_STOPS = 16
NEVER = 2.0
"""A threshold that no confidence reaches."""


@dataclass(frozen=True)
class Buffers:
    """Rows of an iteration with at most R drafts, and where each kind of buffer holds them.

    ::

        position in the text   n - 2     n - 1     n         n + 1     ...   n + R - 1   n + R
        what is there          committed newest    draft 0   draft 1   ...   draft R-1   (after all drafts)
        row                              0         1         2         ...   R
        positions[i]           0         1         2         3         ...   R + 1       R + 2
        exit_hidden[i]         0         1         2         3         ...   R + 1
        flags[i]                         0         1         2         ...   R
        wanted[i]                        0         1         2         ...   R
        drafts[i]                                  0         1         ...   R - 1

    ``flags[r]`` says that another draft follows row r: for row 0 that the text grows, for the others that their draft
    was made and was sure. (Of a tree, ``flags[r]`` says that draft r was made.) ``wanted[r]`` is the target's token
    after row r. The slices by row are the methods below.

    Attributes:
        text: ``[capacity]`` int64, the text; beyond ``length`` lie old values.
        length: ``[1]`` int64, n.
        limit: ``[1]`` int64, the length that the text may reach.
        positions: ``[R + 3]`` int64.
        stops: ``[>= 16]`` int64, the stop tokens, filled up with -1.
        flags: ``[R + 1]`` int32.
        newest: ``[1, hidden]``, the embedding of the token that goes through the shallow layers next.
        exit_hidden: ``[R + 2, hidden]``, what the drafter's ``first_layer`` reads; rows of drafts that were not made
            hold old values, which are finite.
        drafts: ``[R]`` tokens and confidences; of a drafter that gives none, each stays 1.
        wanted: ``[R + 1]`` tokens and confidences, of which ``accept`` asks only whether they are NaN.
        decision: ``[3]`` int64, what ``accept`` found.
        ancestors: ``[R + 1]`` int32, of a tree's rows; None for chains.
        walked: what ``walk`` found in a tree; its tokens are committed then. None for chains.
        report: ``[5 + R + 1 + 2]`` int64: the record of ``commit``, then ``draft_steps``, then the error word of
            ``draft_loop``, 0 where all went well.
        thresholds: ``[R + 1]`` float32: no draft follows a row whose confidence is below its threshold; the newest
            token's confidence is 1.
        sampling: the numbers of a request's ``Sampling``.
        at_hand: ``[R]`` int32, 1 for each draft of an iteration that took no draft step; zeros, unless a drafter has
            such drafts (``Drafter.at_hand``).
    """

    text: Tensor
    length: Tensor
    limit: Tensor
    positions: Tensor
    stops: Tensor
    flags: Tensor
    newest: Tensor
    exit_hidden: Tensor
    drafts: Top1
    wanted: Top1
    decision: Tensor
    report: Tensor
    thresholds: Tensor
    sampling: SamplingTensors
    at_hand: Tensor
    ancestors: Tensor | None = None
    walked: Walk | None = None

    @property
    def draft_steps(self) -> Tensor:
        """``[1]`` int64: how many draft steps the drafts took; ``AS_DRAFTED`` unless the drafter writes a number."""
        return self.report[-2:-1]

    def position(self, row: int) -> Tensor:
        """``[1]``: the position of a row; -1 is the token before the newest one, R + 1 the place after all drafts."""
        return self.positions[row + 1 : row + 2]

    def hidden(self, first: int, last: int) -> Tensor:
        """``[last - first, hidden]``: exit hidden states of rows ``first`` to ``last - 1``; -1 as in ``position``."""
        return self.exit_hidden[first + 1 : last + 1]

    def present(self, row: int) -> Tensor:
        """``[1]``: whether a row is there: row 0 where the text grows, the others where their draft was made."""
        return self.flags[max(row - 1, 0) : max(row, 1)]

    def drafting(self, row: int) -> Tensor:
        """``[1]``: whether a draft follows a row."""
        return self.flags[row : row + 1]

    def threshold(self, row: int) -> Tensor:
        """``[1]``: the confidence that a row must have for a draft to follow it."""
        return self.thresholds[row : row + 1]

    def draft_within(self, limits: Limits) -> None:
        """Let the iterations that are launched from now on draft within limits; neither host nor device waits."""
        most, threshold = limits
        values = [threshold] * most + [NEVER] * (len(self.thresholds) - most)
        on_gpu = self.thresholds.device.type == "cuda"
        self.thresholds.copy_(torch.tensor(values, dtype=torch.float32, pin_memory=on_gpu), non_blocking=True)

    def forbid(self, rows: int = 1) -> None:
        """Lower the flags of the first rows where a threshold says that no draft follows, however sure it is."""
        self.flags[:rows].mul_(self.thresholds[:rows] <= 1)

    def draft(self, row: int) -> Top1:
        """``[1]`` each: the token and confidence drafted after a row, which will be row ``row + 1``."""
        return Top1(self.drafts.token[row : row + 1], self.drafts.confidence[row : row + 1])


def buffers_for(
    target: Llama, text: TextState, request: Request, drafts: int, runner: GraphRunner, name: str, tree: bool
) -> Buffers:
    """The runner's buffers of that name, for at most ``drafts`` drafts a step; they are made on first use."""
    rows, hidden, sampling = drafts + 1, target.config.hidden_size, request.sampling

    def numbers(field: str, *shape: int) -> Tensor:
        return runner.buffer(f"{name}: {field}", shape, torch.int64)

    def real(field: str, count: int = 1) -> Tensor:
        return runner.buffer(f"{name}: {field}", (count,), torch.float32)

    def states(field: str, *shape: int) -> Tensor:
        return runner.buffer(f"{name}: {field}", shape, target.dtype)

    def top1(field: str, count: int) -> Top1:
        return Top1(numbers(f"{field}, tokens", count), real(f"{field}, confidences", count))

    decision = numbers("decision", 3)
    return Buffers(
        text=numbers("text", text.cache.capacity),
        length=numbers("length", 1),
        limit=numbers("limit", 1),
        positions=numbers("positions", drafts + 3),
        stops=numbers("stop tokens", max(LEAST_STOPS, 1 << (len(request.stop_tokens) - 1).bit_length())),
        flags=runner.buffer(f"{name}: flags", (rows,), torch.int32),
        newest=states("newest", 1, hidden),
        exit_hidden=states("exit hidden", rows + 1, hidden),
        drafts=top1("drafts", drafts),
        wanted=top1("wanted", rows),
        decision=decision,
        report=numbers("report", RECORD_HEAD + rows + 2),
        thresholds=real("thresholds", rows),
        sampling=SamplingTensors(
            real("temperature"),
            None if sampling.top_k is None else numbers("top-k", 1),
            None if sampling.top_p is None else real("top-p"),
            numbers("seed", 1),
        ),
        at_hand=runner.buffer(f"{name}: at hand", (drafts,), torch.int32),
        ancestors=runner.buffer(f"{name}: ancestors", (rows,), torch.int32) if tree else None,
        walked=Walk(decision, numbers("path", rows), numbers("walked tokens", rows)) if tree else None,
    )


def begin(buffers: Buffers, target: Llama, tokens: Sequence[int], request: Request) -> None:
    """Put a text and its request into device memory; afterwards the host writes nothing there but ``draft_within``."""
    count, sampling, numbers = len(tokens), request.sampling, buffers.sampling

    def put(buffer: Tensor | None, values: Sequence[float | None]) -> None:
        if buffer is not None:
            buffer[: len(values)].copy_(torch.tensor(values, dtype=buffer.dtype))

    put(buffers.text, tokens)
    put(buffers.length, [count])
    put(buffers.limit, [request.length])
    put(buffers.thresholds, [request.threshold] * len(buffers.thresholds))
    put(numbers.temperature, [sampling.temperature])
    put(numbers.top_k, [sampling.top_k])
    put(numbers.top_p, [sampling.top_p])
    put(numbers.seed, [seed_bits(sampling.seed)])
    put(buffers.positions, range(count - 2, count - 2 + len(buffers.positions)))
    put(buffers.stops, [*request.stop_tokens, *[NO_TOKEN] * (len(buffers.stops) - len(request.stop_tokens))])
    put(buffers.flags, [1] + [0] * (len(buffers.flags) - 1))
    buffers.newest.copy_(target.embed(tokens[-1:]))
    buffers.drafts.confidence.fill_(1)
    buffers.at_hand.zero_()
    buffers.report.zero_()
    buffers.draft_steps.fill_(AS_DRAFTED)
    buffers.exit_hidden.zero_()  # rows of drafts that are not made must be finite
