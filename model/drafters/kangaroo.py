"""Kangaroo's drafter (arXiv 2404.18911, section 3.2).

The target's first layers, an adapter and the target's own head guess tokens one by one, until a guess is unsure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS, MAX_SPECULATIVE_TOKENS, WIDEST_GROUP, WIDEST_HEAD, Top1

from ..errors import KangarooError
from ..spans import span
from ..target.cache import KVCache
from ..target.config import LlamaConfig
from ..target.llama import Llama
from .adapter import DraftNetwork
from .draft_model import PreparedLoop, prepare_loop
from .protocol import Draft, Drafter, Stage

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState
    from ..sampling import Chooser

MOST_ROWS = 1 + MAX_SPECULATIVE_TOKENS + 1
"""The most rows of the exit layer that a step looks at: the one before the newest token, the newest, every draft."""


@dataclass
class AdapterMemory:
    """What the drafter keeps of one text of n tokens.

    Attributes:
        cache: the adapter's keys and values; rows below ``length`` are valid.
        length: ``n - 1``, or less where the adapter lags: by one after a step that accepted every draft, since it did
            not run on the last one; by more after steps that drafted nothing.
        exit_hidden: ``[1 + 15 + 1, hidden]``, the exit layer's output. Row 0 belongs to position ``n - 2`` when a text
            begins, row ``1 + j`` to position ``n - 1 + j``.
        missed: the exit layer's output at positions ``length`` to ``n - 2``, each ``[m, hidden]``, for an adapter that
            lags; empty on the loop that is resident on the device.
        states: ``[positions + 1, hidden]``, whose row p is the target's last layer's output at position ``p - 1``;
            None without a deep state.
        own: ``[2, hidden]``, the adapter's latest output on the resident loop; None without a deep state.
        ran: rows of the latest tree that the adapter has run on, the first ones.
    """

    cache: KVCache
    length: int
    exit_hidden: Tensor
    missed: list[Tensor] = field(default_factory=list)
    states: Tensor | None = None
    own: Tensor | None = None
    ran: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        rows = (self.exit_hidden, *self.missed, self.states, self.own)
        return self.cache.nbytes + sum(each.nbytes for each in rows if each is not None)

    def reserve_states(self, reach: int, kept: int) -> None:
        """Make room for the states of ``reach`` positions; those before the first ``kept`` positions stay."""
        if self.states is not None and len(self.states) <= reach:
            longer = self.states.new_zeros(reach + 1, self.states.shape[1])
            longer[: kept + 1] = self.states[: kept + 1]
            self.states = longer


def check_persistent(dtype: torch.dtype, *shapes: LlamaConfig) -> None:
    """Raise unless ``draft_loop`` can take a target and an adapter of these shapes on a GPU."""
    widest = max(each.head_dim for each in shapes)
    group = max(each.num_attention_heads // each.num_key_value_heads for each in shapes)
    if dtype == torch.float32 or widest > WIDEST_HEAD or group > WIDEST_GROUP:
        raise KangarooError(
            f"persistent=True drafts in float16 or bfloat16, with heads of at most {WIDEST_HEAD} of which at most "
            f"{WIDEST_GROUP} share a key-value head; this model is {dtype} with heads of {widest} and {group} that "
            "share one. Leave persistent out."
        )


class KangarooDrafter(Drafter):
    """The first ``first_layer`` layers of the target, the adapter and the target's own head, or some rows of it.

    Args:
        target: the model.
        adapter: trained for it.
        persistent: on the kernels, draft in one launch (``draft_loop``) instead of kernel by kernel. The references
            still draft step by step, and so do an adapter with a deep state, a head of its own or a trained confidence,
            a request with top-k or top-p, which need a row of logits, one with a threshold of ``auto``, and one whose
            loop the host leads (``Settings``).

    Raises:
        KangarooError: ``persistent`` for a model that ``draft_loop`` cannot take on a GPU.
    """

    def __init__(self, target: Llama, adapter: DraftNetwork, persistent: bool = False) -> None:
        if persistent and target.device.type == "cuda":
            check_persistent(target.dtype, target.config, adapter.config.llama)
        self.target, self.adapter, self.persistent = target, adapter, persistent
        self.first_layer = adapter.config.exit_layer
        self.num_speculative_tokens = adapter.config.num_speculative_tokens
        self.draft_confidence_threshold = adapter.config.draft_confidence_threshold
        self.auto = adapter.config.calibrated

    def new_memory(self) -> AdapterMemory:
        """An empty cache, and rows of states."""
        make, hidden = self.target.weights.embedding.new_zeros, self.target.config.hidden_size
        memory = AdapterMemory(self.adapter.new_cache(), 0, make(MOST_ROWS, hidden))
        if self.adapter.state is not None:
            memory.states, memory.own = make(1, hidden), make(2, hidden)  # nothing stands before position 0
        return memory

    def keep(self, memory: AdapterMemory, count: int, length: int) -> int:
        """All, unless a text of that length has other RoPE angles."""
        return count if memory.cache.serves(length) else 0

    def prefill(self, text: "TextState", hidden: Tensor | None, reach: int, length: int) -> None:
        """Show the adapter every token but the last and those that are kept, and those of them that it missed."""
        memory: AdapterMemory = text.memory
        kept = text.newest - (0 if hidden is None else len(hidden))
        memory.cache.reserve(reach, length, kept)
        memory.exit_hidden.zero_()
        memory.reserve_states(reach, kept)
        self.observe(text, kept, text.newest)
        if hidden is not None:
            memory.exit_hidden[0] = hidden[-1]
            if memory.missed and kept > memory.length:
                missed = torch.cat(memory.missed)[: kept - memory.length]
                hidden, kept = torch.cat((missed, hidden)), memory.length
            states = None if memory.states is None else memory.states[kept : text.newest]
            self.adapter.append(hidden, memory.cache, kept, states)
        memory.length, memory.missed = text.newest, []

    def observe(self, text: "TextState", first: int, last: int) -> None:
        """Keep what the target's last layer gave for the positions from ``first`` to before ``last``."""
        if text.memory.states is not None and last > first:
            assert text.final is not None
            text.memory.states[first + 1 : last + 1] = text.final[: last - first]

    # ---- led by the host

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """Draft at most ``most`` tokens; the token whose confidence falls below ``threshold`` is the last.

        Runs the shallow layers on the newest token and on every draft, appending to the shared KV cache.
        """
        target, memory = self.target, text.memory
        token, confidence = text.tokens[-1], 1.0
        own: Tensor | None = None
        tokens: list[int] = []
        confidences: list[float] = []
        distributions: list[Tensor] = []
        while True:
            position, row = text.newest + len(tokens), 1 + len(tokens)
            with span("kangaroo/draft/shallow"):
                shallow = target.run(target.embed([token]), text.cache, position, 0, self.first_layer)
                memory.exit_hidden[row] = shallow[0]
            if len(tokens) == most or not confidence >= threshold:  # a NaN is unsure, too
                break
            with span("kangaroo/draft/step"):
                own = self.run_adapter(memory, memory.exit_hidden[row : row + 1], own)
                guess, distribution = self.guess(own, chooser, position + 1, tokens)
                token, confidence = int(guess.token), float(guess.confidence)
            tokens.append(token)
            confidences.append(confidence)
            if distribution is not None:
                distributions.append(distribution)
        return Draft(
            torch.tensor(tokens, dtype=torch.int64, device=target.device),
            memory.exit_hidden[1 : row + 1],
            torch.cat(distributions) if distributions else None,
            tuple(confidences),
        )

    def run_adapter(self, memory: AdapterMemory, row: Tensor, own: Tensor | None = None) -> Tensor:
        """The adapter's output for a row of the exit layer, or for several, behind the rows that it missed.

        ``[rows, hidden]`` both. ``own`` is its output for the row before, where that is a draft's. Many missed rows, as
        after a long passage of looked-up tokens, are a prefill: of them, later rows read keys and values alone.
        """
        rows, seen, asked = torch.cat((*memory.missed, row)), memory.length, len(row)
        last, states = seen + len(rows), own
        if own is None and memory.states is not None:
            states = memory.states[seen:last]
        if len(rows) > MAX_ROWS:
            self.adapter.append(rows[:-asked], memory.cache, seen, None if states is None else states[:-asked])
            rows, seen, states = row, last - asked, None if states is None else states[-asked:]
        output = self.adapter.run(rows, memory.cache, seen, states)[-asked:]
        memory.missed, memory.length = [], last
        return output

    def guess(
        self, hidden: Tensor, chooser: "Chooser", position: int, drafted: Sequence[int] = ()
    ) -> tuple[Top1, Tensor | None]:
        """The head over the adapter's output ``[1, hidden]``: the token at ``position``.

        ``drafted`` are the tokens behind the text.
        """
        if chooser.sampling.rejects:
            return chooser.draft_with_distribution(hidden, self.adapter.head, position, drafted)
        return chooser.draft(hidden, self.adapter.head, position, drafted=drafted), None

    def commit(self, text: "TextState", count: int) -> None:
        """Roll back by length; the rows of tokens that stand, but that the adapter has not run on, are kept for it.

        With a deep state it runs on the last of them again: where that was a draft, its own output stood in before it.
        """
        memory: AdapterMemory = text.memory
        before, most = text.newest - count, count
        if memory.states is not None:
            self.observe(text, before, text.newest)
            most = count - 1
        ran = min(max(memory.length - before, 0), most)
        if ran < count:
            memory.missed.append(memory.exit_hidden[1 + ran : 1 + count].clone())
        memory.length = min(memory.length, before + ran)

    # ---- on the device

    def attach(self, iteration: "Iteration") -> None:
        """Give the iteration the row before the newest token, and tell its runner which memory graphs will rely on."""
        memory: AdapterMemory = iteration.text.memory
        iteration.runner.rely_on("adapter", memory.cache.keys[0], memory.cache.phases)
        if memory.states is not None:
            iteration.runner.rely_on("states", memory.states)
        iteration.buffers.exit_hidden[0] = memory.exit_hidden[0]
        if self._in_one_launch(iteration):
            self._loop(iteration)  # prepared here, since no work inside an iteration may ask the host

    def stages(self, iteration: "Iteration", reach: int) -> Iterator[Stage]:
        """R times the shallow layers, then adapter and head; the shallow layers once more for the last draft."""
        drafts = self.longest_chain(iteration)
        if self._in_one_launch(iteration):
            yield Stage("kangaroo/draft", partial(self.draft_all, iteration))
            return
        for row in range(drafts):
            yield Stage("kangaroo/draft/shallow", partial(self.shallow, iteration, row, reach))
            yield Stage("kangaroo/draft/step", partial(self.draft, iteration, row, reach))
        yield Stage("kangaroo/draft/shallow", partial(self.shallow, iteration, drafts, reach))

    def longest_chain(self, iteration: "Iteration") -> int:
        """The most drafts that the adapter makes."""
        return iteration.max_drafts

    def _in_one_launch(self, iteration: "Iteration") -> bool:
        sampling, adapter = iteration.chooser.sampling, self.adapter
        step_by_step = iteration.auto or sampling.top_k is not None or sampling.top_p is not None
        plain = adapter.state is None and adapter.head.down is None and adapter.head.trained is None
        return self.persistent and plain and not step_by_step

    def _loop(self, iteration: "Iteration") -> PreparedLoop:
        def prepare() -> PreparedLoop:
            return prepare_loop(self.target, self.adapter, iteration.text, iteration.max_drafts)

        return iteration.runner.keep(f"{iteration.max_drafts} drafts: draft loop", prepare)

    def shallow(self, iteration: "Iteration", row: int, reach: int) -> None:
        """The shallow layers on a row, if it is there."""
        buffers = iteration.buffers
        self.target.run(
            buffers.newest,
            iteration.text.cache,
            buffers.position(row),
            0,
            self.first_layer,
            reach=reach,
            active=buffers.present(row),
            out=buffers.hidden(row, row + 1),
        )

    def draft(self, iteration: "Iteration", row: int, reach: int) -> None:
        """Adapter and head on a row: a draft, its confidence, the next row's flag and embedding.

        In the first step the adapter also takes the row before the newest token: it has not seen it if every draft of
        the iteration before was accepted, and not with the target's own state if it was a draft. Where no draft shall
        follow the newest token, the adapter runs all the same and misses nothing.
        """
        adapter, buffers, target = self.adapter, iteration.buffers, self.target
        memory: AdapterMemory = iteration.text.memory
        first, active = row if row else -1, buffers.drafting(row)
        following = row + 1 if row + 1 < self.longest_chain(iteration) else iteration.max_drafts  # that counts no draft
        exit_hidden, position = buffers.hidden(first, row + 1), buffers.position(first)
        states = out = None
        if memory.states is not None and memory.own is not None:
            states = memory.own[1:] if row else memory.states.index_select(0, buffers.positions[:2].clamp(min=0))
            out = memory.own[1:] if row else memory.own
        hidden = adapter.run(exit_hidden, memory.cache, position, states, reach=reach, active=active, out=out)
        if iteration.auto and not row:
            buffers.forbid()
        iteration.chooser.draft(
            hidden[-1:],
            adapter.head,
            buffers.position(row + 1),
            threshold=buffers.threshold(row + 1),
            active=active,
            sure=buffers.drafting(following),
            embedding=target.weights.embedding,
            embedded=buffers.newest,
            out=buffers.draft(row),
        )

    def observations(self, iteration: "Iteration") -> Iterator[Stage]:
        """With a deep state, keep what the last layer gave for every row; rows that fall are written again."""
        if self.adapter.state is not None:
            yield Stage("kangaroo/observe", partial(self.observe_all, iteration))

    def observe_all(self, iteration: "Iteration") -> None:
        """``observe`` for the rows of an iteration."""
        assert iteration.final is not None
        following = iteration.buffers.positions[2 : len(iteration.final) + 2]
        iteration.text.memory.states.index_copy_(0, following, iteration.final)

    def draft_all(self, iteration: "Iteration") -> None:
        """Draft in one launch, which ends with the first unsure draft."""
        buffers, chooser = iteration.buffers, iteration.chooser
        loop = self._loop(iteration)
        self.target.backend.draft_loop(
            loop.model,
            buffers.flags,
            buffers.positions,
            buffers.newest,
            buffers.exit_hidden,
            threshold=buffers.threshold(0),
            temperature=None if chooser.sampling.greedy else buffers.sampling.temperature,
            seed=buffers.sampling.seed,
            stream=chooser.draft_stream,
            prepared=loop.prepared,
            out=buffers.drafts,
        )
        if loop.prepared is not None:
            buffers.report[-1:].copy_(loop.prepared.error)
