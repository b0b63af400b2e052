"""An iteration on the device: draft, verify, accept, commit (arXiv 2404.18911, algorithm 1); nothing asks the host.

Shapes are fixed: R draft steps and a verification of R + 1 rows. What varies lies in device memory (``buffers.py``):
the text and its length, positions, and a flag for every draft. A step whose flag is down returns at once; rows of
drafts that were not made are verified with the rest and then ignored, which at batch 1 costs next to nothing. Plain
decoding is the same with R = 0; verification then runs all layers.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..drafters.protocol import Drafter, Stage
from ..request import Request
from ..sampling import Chooser
from ..spans import span
from ..target.cache import Branches, Place
from ..target.llama import Llama
from .buffers import begin, buffers_for
from .graphs import GraphRunner
from .state import TextState


class Iteration:
    """A decode on the device: its memory, and the work of an iteration on it.

    Args:
        target: the model.
        drafter: what drafts; None decodes plainly.
        text: the text's caches, filled by ``prefill``.
        request: the numbers of this decode.
        runner: holds the buffers, and will hold the graphs.

    Attributes:
        longest: the most drafts that may follow each other.
        max_drafts: R, the most drafts (``Drafter.rows``); a tree's may be more than ``longest``, a block's fewer.
        auto: whether how much is drafted changes from iteration to iteration (``pace.py``).
        buffers: the device memory.
        chooser: picks tokens, its numbers read from the buffers.
        final: ``[R + 1, hidden]``, the last layer's output of the verification, for ``Drafter.observations``.
        key: what a captured iteration has baked in besides its reach: shapes, and which kernels are launched. Numbers,
            the threshold and the temperature too, are read from device memory.
    """

    def __init__(
        self, target: Llama, drafter: Drafter | None, text: TextState, request: Request, runner: GraphRunner
    ) -> None:
        sampling = request.sampling.without_idle_filters(target.config.vocab_size)
        request = replace(request, sampling=sampling)
        self.target, self.drafter, self.text, self.runner = target, drafter, text, runner
        self.longest = 0 if drafter is None else request.max_drafts
        self.auto = drafter is not None and request.auto_on_device
        self.first_layer = 0 if drafter is None else drafter.first_layer
        tree = drafter is not None and drafter.draft_tree > 0
        self.max_drafts = 0 if drafter is None else drafter.rows(self.longest)
        name = "plain" if drafter is None else f"{self.max_drafts} drafts"
        if tree:
            name = f"tree of {name}, {self.longest} behind each other"
        self.buffers = buffers_for(target, text, request, self.max_drafts, runner, name, tree)
        self.chooser = Chooser(sampling, target.backend, self.buffers.sampling)
        self.final: Tensor | None = None
        runner.rely_on("target", text.cache.keys[0], text.cache.phases)
        begin(self.buffers, target, text.tokens, request)
        if drafter is not None:
            drafter.attach(self)
        stages = tuple(stage.name for stage in self.stages(0))
        self.key = (name, stages, self.auto, sampling.greedy, sampling.top_k is not None, sampling.top_p is not None)

    def stages(self, reach: int) -> Iterator[Stage]:
        """The work of an iteration in order; no position of it is beyond ``reach``."""
        if self.drafter is not None:
            yield from self.drafter.stages(self, reach)
        yield Stage("kangaroo/verify", partial(self.verify, reach))
        if self.drafter is not None:
            yield from self.drafter.observations(self)
        yield Stage("kangaroo/accept", self.accept)
        if self.buffers.walked is not None:
            yield Stage("kangaroo/straighten", self.straighten)
        yield Stage("kangaroo/commit", self.commit)

    def run(self, reach: int) -> None:
        """Launch an iteration."""
        for stage in self.stages(reach):
            with span(stage.name):
                stage.work()

    def verify(self, reach: int) -> None:
        """The remaining layers and the head over all rows: the target's token after each of them."""
        target, buffers = self.target, self.buffers
        rows = buffers.newest if self.drafter is None else buffers.hidden(0, self.max_drafts + 1)
        position: Place = buffers.position(0)
        if buffers.ancestors is not None:
            position = Branches(buffers.position(0), buffers.ancestors)
        layers, first = target.config.num_hidden_layers, buffers.position(1)
        self.final = target.run(rows, self.text.cache, position, self.first_layer, layers, reach=reach)
        self.chooser.target(self.final, target.head, first, ancestors=buffers.ancestors, out=buffers.wanted)

    def accept(self) -> None:
        """How many drafts stand, how long the text becomes, whether it ends."""
        buffers = self.buffers
        if buffers.ancestors is not None:
            self.target.backend.walk(
                buffers.drafts.token,
                buffers.wanted.token,
                buffers.ancestors,
                buffers.stops,
                buffers.length,
                buffers.limit,
                confidence=buffers.wanted.confidence,
                out=buffers.walked,
            )
            return
        self.target.backend.accept(
            buffers.drafts.token,
            buffers.wanted.token,
            buffers.stops,
            buffers.length,
            buffers.limit,
            confidence=buffers.wanted.confidence,
            drafted=buffers.flags[: self.max_drafts],
            out=buffers.decision,
        )

    def straighten(self) -> None:
        """Put what was kept of a tree's rows where a chain of the path's tokens would have left it."""
        buffers, move = self.buffers, self.target.backend.straighten
        assert buffers.walked is not None and self.drafter is not None, "plain decoding and chains have no path"
        path, position = buffers.walked.path, buffers.position(0)
        move(path, position, self.text.cache.rows)
        move(path, 1, buffers.exit_hidden[None])
        self.drafter.straighten(self.text, path, position)

    def commit(self) -> None:
        """Apply the decision of ``accept`` to the text, and prepare what the next iteration begins with."""
        buffers = self.buffers
        self.target.backend.commit(
            buffers.decision,
            buffers.wanted.token if buffers.walked is None else buffers.walked.tokens,
            buffers.text,
            buffers.length,
            buffers.limit,
            buffers.positions,
            buffers.flags,
            buffers.exit_hidden,
            self.target.weights.embedding,
            buffers.newest,
            buffers.report[:-2],
        )
