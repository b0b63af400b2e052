"""An iteration on the device: draft, verify, accept, commit (arXiv 2404.18911, algorithm 1); nothing asks the host.

Shapes are fixed: R draft steps and a verification of R + 1 rows. What varies lies in device memory: the text and its
length, positions, and a flag for every draft. A step whose flag is down returns at once; rows of drafts that were not
made are verified with the rest and not looked at, which at batch 1 costs next to nothing. Plain decoding is the same
with R = 0, all layers being verification's. All draft steps may also be one persistent kernel, ``draft_loop``, whose
early exit is real.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import RECORD_HEAD, AttentionBlock, DraftModel, Layer, Top1

from ..drafters.adapter import Adapter
from ..sampling import Chooser, Sampling, SamplingTensors
from ..spans import span
from ..target.cache import KVCache
from ..target.config import LlamaConfig
from ..target.llama import Llama
from ..target.weights import AttentionWeights
from .graphs import GraphRunner
from .state import TextState

LEAST_STOPS = 16
NO_TOKEN = -1
"""Fills the list of stop tokens: no token equals it."""


class Stage(NamedTuple):
    """A part of an iteration.

    Attributes:
        name: as profilers show it.
        work: launches it.
    """

    name: str
    work: Callable[[], object]


class Iteration:
    """The device memory of a decode, and the work of an iteration on it.

    Args:
        target: the model.
        adapter: what drafts; None decodes plainly.
        state: the text's caches, filled by ``prefill``.
        sampling: how tokens are picked.
        max_drafts: R, 0 in plain decoding, at most 15.
        threshold: drafting stops below this confidence.
        stop_tokens: end the text.
        length: tokens that the text may reach.
        runner: holds the memory, and will hold the graphs.
        persistent: draft in one kernel; top-k and top-p, which need a row of logits, are drafted step by step anyway.

    Attributes:
        report: ``[5 + R + 1 + 1]`` int64, what the last iteration did: the record of the operation ``commit``, then the
            error word of ``draft_loop``, 0 where all went well.
        key: what a captured iteration has baked in besides its reach: shapes, and which kernels are launched. Numbers,
            the threshold and the temperature too, are read from device memory.
    """

    def __init__(
        self,
        target: Llama,
        adapter: Adapter | None,
        state: TextState,
        sampling: Sampling,
        *,
        max_drafts: int,
        threshold: float,
        stop_tokens: Sequence[int],
        length: int,
        runner: GraphRunner,
        persistent: bool = False,
    ) -> None:
        self.target, self.adapter, self.state = target, adapter, state
        self.max_drafts = max_drafts
        self.first_layer = 0 if adapter is None else adapter.config.exit_layer
        drafts, rows, hidden = max_drafts, max_drafts + 1, target.config.hidden_size
        kind = "plain" if adapter is None else f"{drafts} drafts"

        def numbers(name: str, *shape: int) -> Tensor:
            return runner.buffer(f"{kind}: {name}", shape, torch.int64)

        def real(name: str) -> Tensor:
            return runner.buffer(f"{kind}: {name}", (1,), torch.float32)

        def states(name: str, *shape: int) -> Tensor:
            return runner.buffer(f"{kind}: {name}", shape, target.dtype)

        self.text = numbers("text", state.cache.capacity)
        self.length, self.limit = numbers("length", 1), numbers("limit", 1)
        self.positions = numbers("positions", drafts + 3)
        self.stops = numbers("stop tokens", max(LEAST_STOPS, 1 << (len(stop_tokens) - 1).bit_length()))
        self.flags = runner.buffer(f"{kind}: flags", (rows,), torch.int32)
        self.newest, self.exit_hidden = states("newest", 1, hidden), states("exit hidden", rows + 1, hidden)
        self.drafts = self._top1(runner, f"{kind}: drafts", drafts)
        self.wanted = self._top1(runner, f"{kind}: wanted", rows)
        self.decision, self.report = numbers("decision", 3), numbers("report", RECORD_HEAD + rows + 1)

        sampling = sampling.without_idle_filters(target.config.vocab_size)
        by_k, by_p = sampling.top_k is not None, sampling.top_p is not None
        top_k, top_p = numbers("top-k", 1) if by_k else None, real("top-p") if by_p else None
        self.sampling = SamplingTensors(real("temperature"), top_k, top_p, numbers("seed", 1))
        self.threshold = real("threshold")
        self.chooser = Chooser(sampling, target.operations, self.sampling)
        persistent = persistent and adapter is not None and not by_k and not by_p
        self.key = (kind, persistent, sampling.greedy, by_k, by_p)
        runner.rely_on("target", state.cache.keys[0], state.cache.phases)
        if adapter is not None:
            assert state.adapter_cache is not None
            runner.rely_on("adapter", state.adapter_cache.keys[0], state.adapter_cache.phases)
        self.loop: PreparedLoop | None = None
        if persistent and adapter is not None:
            self.loop = runner.keep(f"{kind}: draft loop", lambda: prepare_loop(target, adapter, state, drafts))
        self._begin(state, sampling, threshold, stop_tokens, length)

    @staticmethod
    def _top1(runner: GraphRunner, name: str, rows: int) -> Top1:
        token = runner.buffer(f"{name}, tokens", (rows,), torch.int64)
        return Top1(token, runner.buffer(f"{name}, confidences", (rows,), torch.float32))

    def _begin(
        self, state: TextState, sampling: Sampling, threshold: float, stop_tokens: Sequence[int], length: int
    ) -> None:
        """Put the text into device memory; the last time that the host tells it anything."""
        tokens, count = state.tokens, len(state.tokens)

        def put(buffer: Tensor | None, values: Sequence[float | None]) -> None:
            if buffer is not None:
                buffer[: len(values)].copy_(torch.tensor(values, dtype=buffer.dtype))

        put(self.text, tokens)
        put(self.length, [count])
        put(self.limit, [length])
        put(self.threshold, [threshold])
        put(self.sampling.temperature, [sampling.temperature])
        put(self.sampling.top_k, [sampling.top_k])
        put(self.sampling.top_p, [sampling.top_p])
        put(self.sampling.seed, [sampling.seed - (1 << 64) if sampling.seed >> 63 else sampling.seed])
        put(self.positions, range(count - 2, count + self.max_drafts + 1))
        put(self.stops, [*stop_tokens, *[NO_TOKEN] * (len(self.stops) - len(stop_tokens))])
        put(self.flags, [1] + [0] * self.max_drafts)
        self.newest.copy_(self.target.embed(tokens[-1:]))
        self.report.zero_()
        self.exit_hidden.zero_()  # rows of drafts that are not made must be finite
        if state.exit_hidden is not None:
            self.exit_hidden[0] = state.exit_hidden[0]

    def stages(self, reach: int) -> Iterator[Stage]:
        """The work of an iteration in order; no position of it is beyond ``reach``."""
        if self.loop is not None:
            yield Stage("kangaroo/draft", partial(self.draft_all, self.loop))
        elif self.max_drafts:
            for step in range(self.max_drafts):
                yield Stage("kangaroo/draft/shallow", partial(self.shallow, step, reach))
                yield Stage("kangaroo/draft/step", partial(self.draft, step, reach))
            yield Stage("kangaroo/draft/shallow", partial(self.shallow, self.max_drafts, reach))
        yield Stage("kangaroo/verify", partial(self.verify, reach))
        yield Stage("kangaroo/accept", self.accept)
        yield Stage("kangaroo/commit", self.commit)

    def run(self, reach: int) -> None:
        """Launch an iteration."""
        for stage in self.stages(reach):
            with span(stage.name):
                stage.work()

    def shallow(self, step: int, reach: int) -> None:
        """The shallow layers on the newest token (step 0) or on the draft before this step, if it was made."""
        flag, place = max(step - 1, 0), step + 1
        self.target.run(
            self.newest,
            self.state.cache,
            self.positions[place : place + 1],
            0,
            self.first_layer,
            reach=reach,
            active=self.flags[flag : flag + 1],
            out=self.exit_hidden[place : place + 1],
        )

    def draft(self, step: int, reach: int) -> None:
        """Adapter and head: a draft, its confidence, the next step's flag and embedding.

        The first step's adapter pass takes the row before the newest token besides: nobody ran the adapter on it if
        every draft before was accepted.
        """
        adapter, cache = self.adapter, self.state.adapter_cache
        assert adapter is not None and cache is not None
        first, last, active = step + 1 if step else 0, step + 2, self.flags[step : step + 1]
        position = self.positions[first : first + 1]
        hidden = adapter.run(self.exit_hidden[first:last], cache, position, reach=reach, active=active)[-1:]
        self.chooser.draft(
            hidden,
            adapter.norm,
            self.target.weights.head,
            adapter.config.llama.rms_norm_eps,
            self.positions[last : last + 1],
            threshold=self.threshold,
            active=active,
            sure=self.flags[step + 1 : step + 2],
            embedding=self.target.weights.embedding,
            embedded=self.newest,
            out=Top1(self.drafts.token[step : step + 1], self.drafts.confidence[step : step + 1]),
        )

    def draft_all(self, loop: "PreparedLoop") -> None:
        """All of that in one launch, which ends with the first unsure draft."""
        self.target.operations.draft_loop(
            loop.model,
            self.flags,
            self.positions,
            self.newest,
            self.exit_hidden,
            threshold=self.threshold,
            temperature=None if self.chooser.sampling.greedy else self.sampling.temperature,
            seed=self.sampling.seed,
            stream=self.chooser.draft_stream,
            prepared=loop.prepared,
            out=self.drafts,
        )

    def verify(self, reach: int) -> None:
        """The remaining layers and the head over all rows: the target's token after each of them."""
        target, weights, config = self.target, self.target.weights, self.target.config
        rows = self.newest if self.adapter is None else self.exit_hidden[1:]
        newest, following = self.positions[1:2], self.positions[2:3]
        hidden = target.run(rows, self.state.cache, newest, self.first_layer, config.num_hidden_layers, reach=reach)
        self.chooser.target(hidden, weights.norm, weights.head, config.rms_norm_eps, following, out=self.wanted)

    def accept(self) -> None:
        """How many drafts stand, how long the text becomes, whether it ends."""
        self.target.operations.accept(
            self.drafts.token,
            self.wanted.token,
            self.stops,
            self.length,
            self.limit,
            drafted=self.flags[: self.max_drafts],
            out=self.decision,
        )

    def commit(self) -> None:
        """Apply that to the text, and make ready what the next iteration begins with."""
        self.target.operations.commit(
            self.decision,
            self.wanted.token,
            self.text,
            self.length,
            self.limit,
            self.positions,
            self.flags,
            self.exit_hidden,
            self.target.weights.embedding,
            self.newest,
            self.report[:-1],
        )
        if self.loop is not None and self.loop.prepared is not None:
            self.report[-1:].copy_(self.loop.prepared.error)


class PreparedLoop(NamedTuple):
    """The drafter as ``draft_loop`` takes it.

    Attributes:
        model: weights and caches.
        prepared: what its launcher made of them; None where it needs nothing.
    """

    model: DraftModel
    prepared: Any


def prepare_loop(target: Llama, adapter: Adapter, state: TextState, drafts: int) -> PreparedLoop:
    """Gather the shallow layers and the adapter, over the caches of a text."""
    assert state.adapter_cache is not None

    def block(weights: AttentionWeights, config: LlamaConfig, cache: KVCache, index: int) -> AttentionBlock:
        caches = cache.keys[index], cache.values[index]
        eps, scale = config.rms_norm_eps, config.head_dim**-0.5
        return AttentionBlock(weights.norm, weights.qkv, weights.output, *caches, cache.phases, eps, scale)

    layers = tuple(
        Layer(
            block(layer.attention, target.config, state.cache, index),
            layer.mlp_norm,
            layer.gate_up,
            layer.down,
        )
        for index, layer in enumerate(target.weights.layers[: adapter.config.exit_layer])
    )
    model = DraftModel(
        layers,
        block(adapter.block.weights, adapter.config.llama, state.adapter_cache, 0),
        adapter.norm,
        target.weights.head,
        adapter.config.llama.rms_norm_eps,
        target.weights.embedding,
    )
    return PreparedLoop(model, target.operations.prepare_draft_loop(model, drafts))
