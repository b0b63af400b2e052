"""Rollback moves lengths and keeps what the adapter missed: property tests of the state, without a model."""

from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from kangaroo_kernels.contract import Top1
from kangaroo_kernels.model.drafters.kangaroo import AdapterMemory, KangarooDrafter
from kangaroo_kernels.model.loop.state import TextState
from kangaroo_kernels.model.target.cache import KVCache
from kangaroo_kernels.reference.accept import accept

STALE = -1.0


class Paper:
    """Stands in for target and adapter: "hidden states" and "keys" are the number of the text that made them."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.config = self
        self.exit_layer = 1

    def embed(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor(tokens).float()[:, None]

    def run(self, hidden: torch.Tensor, cache: "Ledger", position: int, first: int, last: int) -> torch.Tensor:
        """A shallow "hidden state" names its position and its token."""
        cache.write(position, hidden[:, 0].tolist())
        return torch.tensor([[1000.0 * (position + row) + float(token)] for row, token in enumerate(hidden[:, 0])])


@dataclass
class Ledger(KVCache):
    """A cache that remembers, for each position, what was written there last."""

    rows: list[float] = field(default_factory=list)

    def write(self, position: int, values: list[float]) -> None:
        self.rows += [STALE] * (position + len(values) - len(self.rows))
        self.rows[position : position + len(values)] = values


class PaperDrafter(KangarooDrafter):
    """Says what it is told and writes the adapter's "keys"."""

    def __init__(self, paper: Paper) -> None:
        self.target, self.adapter, self.first_layer = paper, self, 1
        self.script: list[tuple[int, float]] = []

    def run(self, exit_hidden, cache, position, states):
        cache.write(position, exit_hidden[:, 0].tolist())
        return exit_hidden

    def guess(self, hidden, chooser, position, drafted=()):
        token, confidence = self.script.pop(0)
        return Top1(torch.tensor([token]), torch.tensor([confidence])), None


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    gamma=st.integers(1, 6),
    steps=st.lists(
        st.tuples(
            st.integers(0, 6),  # drafts that are right
            st.lists(st.sampled_from([0.2, 0.9]), min_size=6, max_size=6),
            st.integers(1, 7),  # the limit
            st.booleans(),  # whether drafts are asked for
        ),
        min_size=1,
        max_size=8,
    ),
    data=st.data(),
)
def test_every_row_is_that_of_the_committed_text(prompt, gamma, steps, data):
    """After any run of drafts, acceptances, early ends and limits, what counts as valid belongs to the text."""
    paper = Paper()
    drafter = PaperDrafter(paper)
    memory = AdapterMemory(Ledger.__new__(Ledger), len(prompt) - 1, torch.full((gamma + 2, 1), STALE))
    state = TextState(list(prompt), Ledger.__new__(Ledger), memory)
    state.cache.rows, memory.cache.rows = [], []
    if len(prompt) > 1:  # as prefill leaves it
        hidden = paper.run(paper.embed(prompt[:-1]), state.cache, 0, 0, 1)
        memory.cache.write(0, hidden[:, 0].tolist())
    for right, confidences, limit, asked in steps:
        most, behind = gamma if asked else 0, state.newest - memory.length
        said = data.draw(st.lists(st.integers(0, 9), min_size=most, max_size=most))
        drafter.script = list(zip(said, confidences, strict=False))
        draft = drafter.propose(state, None, most, 0.5)
        tokens = draft.tokens.tolist()
        assert tokens == said[: len(tokens)]
        assert len(tokens) == most or confidences[len(tokens) - 1] < 0.5
        chain = [state.tokens[-1], *tokens]
        assert draft.hidden[:, 0].tolist() == [1000.0 * (state.newest + row) + token for row, token in enumerate(chain)]
        wanted = [token if place < right else (token + 1) % 10 for place, token in enumerate(tokens)] + [7]
        before = list(state.tokens)
        none = torch.empty(0, dtype=torch.int64)
        accepted, length, _ = accept(
            draft.tokens, torch.tensor(wanted), none, len(before), len(before) + limit
        ).tolist()
        committed = wanted[: length - len(before)]
        state.tokens += committed
        drafter.commit(state, len(committed))

        text = state.tokens
        assert text == before + committed
        assert state.cache.rows[: state.newest] == [float(token) for token in text[: state.newest]]
        hidden = [1000.0 * position + token for position, token in enumerate(text)]
        assert memory.cache.rows[: memory.length] == hidden[: memory.length]
        missed = torch.cat(memory.missed)[:, 0].tolist() if memory.missed else []
        assert missed == hidden[memory.length : state.newest]
        # the adapter lags by one after full acceptance, by one more after every pause, and never else
        full = accepted == len(tokens) and len(committed) == len(tokens) + 1
        assert len(missed) == (full if asked else behind + 1)


def test_by_hand():
    memory = AdapterMemory(Ledger.__new__(Ledger), 6, torch.arange(6.0)[:, None])
    text, drafter = TextState([1, 2, 3, 4, 5, 6], Ledger.__new__(Ledger), memory), PaperDrafter(Paper())
    drafter.commit(text, 3)
    assert text.newest == 5
    assert memory.length == 5
    assert memory.missed == []
    text.tokens.append(9)
    drafter.commit(text, 1)
    assert memory.length == 5  # one behind: the row before the newest token has not been through the adapter
    assert [rows.tolist() for rows in memory.missed] == [[[1.0]]]
    assert text.newest == 6
