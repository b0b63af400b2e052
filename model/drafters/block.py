"""Blocks of drafts: several tokens from one pass of the adapter.

A chain runs the shallow layers and the adapter once for every draft. A block runs the shallow layers on the newest
token alone, and the adapter on it and on K - 1 places behind it, whose inputs are trained vectors. A place does not see
the drafts before it. So a trained matrix over the embedding of the last of them is added to the place's output (a
Markov correction, as in DSpark, arXiv 2607.05147), and the drafts are still chosen one after the other, by that matrix
and the head. Then the shallow layers run on all drafts at once.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..spans import span
from ..target.llama import Llama
from .adapter import DraftNetwork
from .kangaroo import AdapterMemory, KangarooDrafter
from .protocol import Draft, Stage

if TYPE_CHECKING:
    from ..loop.iteration import Iteration
    from ..loop.state import TextState
    from ..sampling import Chooser


class BlockDrafter(KangarooDrafter):
    """Kangaroo's drafter, drafting blocks.

    The threshold means what it means for a chain: the first unsure draft is the last. A block has no more drafts than
    the adapter has places, whatever number a caller gives.

    Args:
        target: the model.
        adapter: trained for it, with a block.
    """

    def __init__(self, target: Llama, adapter: DraftNetwork) -> None:
        assert adapter.block is not None, "make_drafter asks for a block"
        super().__init__(target, adapter)
        self.block, self.longest = adapter.block, 1 + len(adapter.block.places)
        self.num_speculative_tokens = self.rows(self.num_speculative_tokens)

    def rows(self, most: int) -> int:
        """No more than the adapter has places."""
        return min(most, self.longest)

    # ---- led by the host

    def propose(self, text: "TextState", chooser: "Chooser", most: int, threshold: float) -> Draft:
        """Draft at most ``most`` tokens; the token whose confidence falls below ``threshold`` is the last."""
        target, memory, most = self.target, text.memory, self.rows(most)
        tokens, confidences, distributions = list[int](), list[float](), list[Tensor]()
        with span("kangaroo/draft/shallow"):
            newest = target.run(target.embed(text.tokens[-1:]), text.cache, text.newest, 0, self.first_layer)
            memory.exit_hidden[1] = newest[0]
        if most:
            with span("kangaroo/draft/step"):
                for place, row in enumerate(self.run_block(memory, most).split(1)):
                    hidden = self.correct(row, target.embed(tokens[-1:])) if place else row
                    guess, distribution = self.guess(hidden, chooser, text.newest + place + 1, tokens)
                    tokens.append(int(guess.token))
                    confidences.append(float(guess.confidence))
                    if distribution is not None:
                        distributions.append(distribution)
                    if not confidences[-1] >= threshold:  # a NaN is unsure, too
                        break
            with span("kangaroo/draft/shallow"):
                rows = target.run(target.embed(tokens), text.cache, text.newest + 1, 0, self.first_layer)
                memory.exit_hidden[2 : 2 + len(tokens)] = rows
        return Draft(
            torch.tensor(tokens, dtype=torch.int64, device=target.device),
            memory.exit_hidden[1 : 2 + len(tokens)],
            torch.cat(distributions) if distributions else None,
            tuple(confidences),
            steps=min(most, 1),
        )

    def run_block(self, memory: AdapterMemory, drafts: int) -> Tensor:
        """The adapter's output at so many places, ``[drafts, hidden]``; of their keys, the text keeps the first's."""
        places = self.block.places[: drafts - 1]
        output = self.run_adapter(memory, torch.cat((memory.exit_hidden[1:2], places)))
        memory.length -= len(places)
        return output

    def correct(self, hidden: Tensor, embedded: Tensor, active: Tensor | None = None) -> Tensor:
        """A place's output ``[1, hidden]``, corrected by the embedding ``[1, hidden]`` of the draft before it."""
        operations = self.target.backend.for_rows(1)
        corrected: Tensor = operations.linear_residual(embedded, self.block.correction, hidden, active=active)
        return corrected

    # ---- on the device

    def stages(self, iteration: "Iteration", reach: int) -> Iterator[Stage]:
        """The shallow layers on the newest token, the block, and the shallow layers on its drafts."""
        yield Stage("kangaroo/draft/shallow", partial(self.shallow, iteration, 0, reach))
        yield Stage("kangaroo/draft/block", partial(self.draft_block, iteration, reach))
        yield Stage("kangaroo/draft/shallow", partial(self.shallow_drafts, iteration, reach))

    def embedded(self, iteration: "Iteration") -> Tensor:
        """``[R, hidden]``: the drafts' embeddings; those of drafts that were not made are old."""
        shape = iteration.max_drafts, self.target.config.hidden_size
        return iteration.runner.buffer(f"{shape[0]} drafts: embedded", shape, self.target.dtype)

    def draft_block(self, iteration: "Iteration", reach: int) -> None:
        """Adapter and head at all places: drafts, their confidences, flags and embeddings.

        Where no draft shall follow the newest token, the adapter runs all the same and misses nothing.
        """
        adapter, buffers, target, drafts = self.adapter, iteration.buffers, self.target, iteration.max_drafts
        rows = torch.cat((buffers.hidden(0, 1), self.block.places[: drafts - 1]))
        cache, active = iteration.text.memory.cache, buffers.drafting(0)
        output = adapter.run(rows, cache, buffers.position(0), reach=reach, active=active)
        if iteration.auto:
            buffers.forbid()
        buffers.draft_steps.copy_(active * (buffers.limit - buffers.length > 1))  # else there is no room for a draft
        embedded = self.embedded(iteration)
        for place, row in enumerate(output.split(1)):
            active = buffers.drafting(place)
            iteration.chooser.draft(
                self.correct(row, embedded[place - 1 : place], active) if place else row,
                adapter.head,
                buffers.position(place + 1),
                threshold=buffers.threshold(place + 1),
                active=active,
                sure=buffers.drafting(place + 1),
                embedding=target.weights.embedding,
                embedded=embedded[place : place + 1],
                out=buffers.draft(place),
            )

    def shallow_drafts(self, iteration: "Iteration", reach: int) -> None:
        """The shallow layers on all drafts, if there are any; the adapter sees them in the places' stead."""
        buffers, last = iteration.buffers, iteration.max_drafts + 1
        rows, position, active = buffers.hidden(1, last), buffers.position(1), buffers.present(1)
        made = buffers.flags[: iteration.max_drafts, None] > 0
        embedded = torch.where(made, self.embedded(iteration), 0.0)  # an old one may overflow where it stands now
        where = iteration.text.cache, position, 0, self.first_layer
        self.target.run(embedded, *where, reach=reach, active=active, out=rows)
        self.adapter.append(rows, iteration.text.memory.cache, position, active=active)
