import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kangaroo_kernels.accept_ref import Acceptance, accept

FEW = st.integers(0, 3)  # few different tokens, so that drafts agree and stop tokens turn up


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], frozenset[int], int]:
    target = draw(st.lists(FEW, min_size=1, max_size=16))
    draft = draw(st.lists(FEW, min_size=len(target) - 1, max_size=len(target) - 1))
    right = draw(st.integers(0, len(draft)))
    draft[:right] = target[:right]
    return draft, target, frozenset(draw(st.sets(FEW, max_size=2))), draw(st.integers(1, 20))


def call(draft: list[int], target: list[int], stop: frozenset[int] = frozenset(), limit: int = 99) -> Acceptance:
    return accept(torch.tensor(draft, dtype=torch.int64), torch.tensor(target), stop, limit)


@given(steps())
def test_accepted_is_the_longest_common_prefix(step):
    draft, target, stop, limit = step
    accepted = call(draft, target, stop, limit).accepted
    assert draft[:accepted] == target[:accepted]
    assert accepted == len(draft) or draft[accepted] != target[accepted]


@given(steps())
def test_commits_are_a_prefix_of_what_the_target_said(step):
    draft, target, stop, limit = step
    acceptance = call(draft, target, stop, limit)
    committed = acceptance.committed
    assert committed == target[: len(committed)]
    assert 1 <= len(committed) <= min(acceptance.accepted + 1, limit)
    # every committed token but the last was drafted: nothing depends on a token that was not there
    assert committed[:-1] == draft[: len(committed) - 1]


@given(steps())
def test_only_a_stop_or_the_limit_shortens_a_commit(step):
    draft, target, stop, limit = step
    acceptance = call(draft, target, stop, limit)
    assert acceptance.stopped == (acceptance.committed[-1] in stop)
    assert not set(acceptance.committed[:-1]) & stop
    if not acceptance.stopped:
        assert len(acceptance.committed) == min(acceptance.accepted + 1, limit)


@given(steps())
def test_it_is_plain_decoding_in_disguise(step):
    """One token at a time: take the target's, go on while it was the draft, end at a stop or the limit."""
    draft, target, stop, limit = step
    text: list[int] = []
    for row, token in enumerate(target):
        text.append(token)
        if token in stop or len(text) == limit or row == len(draft) or draft[row] != token:
            break
    assert call(draft, target, stop, limit).committed == text


@pytest.mark.parametrize(
    ("draft", "target", "stop", "limit", "wanted"),
    [
        ([], [5], set(), 9, Acceptance(0, [5], False)),
        ([1, 2, 3], [1, 2, 3, 4], set(), 9, Acceptance(3, [1, 2, 3, 4], False)),
        ([1, 2, 3], [9, 2, 3, 4], set(), 9, Acceptance(0, [9], False)),
        ([1, 2, 3], [1, 9, 3, 4], set(), 9, Acceptance(1, [1, 9], False)),
        ([1, 2, 3], [1, 2, 3, 4], set(), 4, Acceptance(3, [1, 2, 3, 4], False)),
        ([1, 2, 3], [1, 2, 3, 4], set(), 3, Acceptance(3, [1, 2, 3], False)),
        ([1, 2, 3], [1, 2, 3, 4], set(), 1, Acceptance(3, [1], False)),
        ([1, 2, 3], [1, 2, 3, 4], {2}, 9, Acceptance(3, [1, 2], True)),
        ([1, 2, 3], [1, 2, 3, 4], {4}, 9, Acceptance(3, [1, 2, 3, 4], True)),
        ([1, 2, 3], [1, 2, 3, 4], {4}, 3, Acceptance(3, [1, 2, 3], False)),
        ([1, 2, 3], [1, 9, 3, 4], {3, 4}, 9, Acceptance(1, [1, 9], False)),
        ([1, 2, 3], [1, 9, 3, 4], {2}, 9, Acceptance(1, [1, 9], False)),
        ([1, 2, 3], [1, 9, 3, 4], {9}, 9, Acceptance(1, [1, 9], True)),
        ([], [5], {5}, 1, Acceptance(0, [5], True)),
    ],
)
def test_by_hand(draft, target, stop, limit, wanted):
    assert call(draft, target, frozenset(stop), limit) == wanted
