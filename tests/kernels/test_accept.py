from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs

from kangaroo_kernels.accept import accept as kernel
from kangaroo_kernels.contract import MAX_STOPS
from kangaroo_kernels.reference.accept import accept as reference

FEW = st.integers(0, 3)  # few different tokens, so that drafts agree and stop tokens turn up
GARBAGE = -99
EITHER = pytest.mark.parametrize("accept", [reference, kernel], ids=["reference", "kernel"])


class Step(NamedTuple):
    """What a step says: how many drafts stand, the tokens that it commits, and whether the text ends there."""

    accepted: int
    committed: list[int]
    stopped: bool


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], frozenset[int], int]:
    target = draw(st.lists(FEW, min_size=1, max_size=16))
    draft = draw(st.lists(FEW, min_size=len(target) - 1, max_size=len(target) - 1))
    right = draw(st.integers(0, len(draft)))
    draft[:right] = target[:right]
    return draft, target, frozenset(draw(st.sets(FEW, max_size=2))), draw(st.integers(1, 20))


def row(tokens: list[int], device: torch.device) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def call(
    accept: Callable[..., Tensor],
    device: torch.device,
    draft: list[int],
    target: list[int],
    stop: frozenset[int] = frozenset(),
    room: int = 99,
    length: int = 7,
    **settings: int | Tensor,
) -> Step:
    result = accept(
        row(draft, device), row(target, device), row(sorted(stop), device), length, length + room, **settings
    )
    assert result.shape == (3,)
    assert result.dtype == torch.int64
    accepted, new_length, stopped = result.tolist()
    assert stopped in {0, 1}
    return Step(accepted, target[: new_length - length], stopped == 1)


def plain_decoding(draft: list[int], target: list[int], stop: frozenset[int], room: int) -> Step:
    """One token at a time: take the target's, go on while it was the draft, end at a stop or the limit."""
    text: list[int] = []
    for index, token in enumerate(target):
        text.append(token)
        if token in stop or len(text) == room or index == len(draft) or draft[index] != token:
            break
    agree = [index for index, token in enumerate(draft) if token != target[index]]
    return Step(agree[0] if agree else len(draft), text, text[-1] in stop)


@EITHER
@given(step=steps())
def test_accepted_is_the_longest_common_prefix(device, accept, step):
    draft, target, stop, room = step
    accepted = call(accept, device, draft, target, stop, room).accepted
    assert draft[:accepted] == target[:accepted]
    assert accepted == len(draft) or draft[accepted] != target[accepted]


@EITHER
@given(step=steps())
def test_commits_are_a_prefix_of_what_the_target_said(device, accept, step):
    draft, target, stop, room = step
    decided = call(accept, device, draft, target, stop, room)
    committed = decided.committed
    assert committed == target[: len(committed)]
    assert 1 <= len(committed) <= min(decided.accepted + 1, room)
    # every committed token but the last was drafted: nothing depends on a token that was not there
    assert committed[:-1] == draft[: len(committed) - 1]


@EITHER
@given(step=steps())
def test_only_a_stop_or_the_limit_shortens_a_commit(device, accept, step):
    draft, target, stop, room = step
    decided = call(accept, device, draft, target, stop, room)
    assert decided.stopped == (decided.committed[-1] in stop)
    assert not set(decided.committed[:-1]) & stop
    if not decided.stopped:
        assert len(decided.committed) == min(decided.accepted + 1, room)


@EITHER
@given(step=steps())
def test_it_is_plain_decoding_in_disguise(device, accept, step):
    draft, target, stop, room = step
    assert call(accept, device, draft, target, stop, room) == plain_decoding(draft, target, stop, room)


@EITHER
@pytest.mark.parametrize(
    ("draft", "target", "stop", "room", "wanted"),
    [
        ([], [5], set(), 9, Step(0, [5], False)),
        ([1, 2, 3], [1, 2, 3, 4], set(), 9, Step(3, [1, 2, 3, 4], False)),
        ([1, 2, 3], [9, 2, 3, 4], set(), 9, Step(0, [9], False)),
        ([1, 2, 3], [1, 9, 3, 4], set(), 9, Step(1, [1, 9], False)),
        ([1, 2, 3], [1, 2, 3, 4], set(), 4, Step(3, [1, 2, 3, 4], False)),
        ([1, 2, 3], [1, 2, 3, 4], set(), 3, Step(3, [1, 2, 3], False)),
        ([1, 2, 3], [1, 2, 3, 4], set(), 1, Step(3, [1], False)),
        ([1, 2, 3], [1, 2, 3, 4], {2}, 9, Step(3, [1, 2], True)),
        ([1, 2, 3], [1, 2, 3, 4], {4}, 9, Step(3, [1, 2, 3, 4], True)),
        ([1, 2, 3], [1, 2, 3, 4], {4}, 3, Step(3, [1, 2, 3], False)),
        ([1, 2, 3], [1, 9, 3, 4], {3, 4}, 9, Step(1, [1, 9], False)),
        ([1, 2, 3], [1, 9, 3, 4], {2}, 9, Step(1, [1, 9], False)),
        ([1, 2, 3], [1, 9, 3, 4], {9}, 9, Step(1, [1, 9], True)),
        ([], [5], {5}, 1, Step(0, [5], True)),
        ([0], [0, 0], {0}, 9, Step(1, [0], True)),
        ([2**40, 7], [2**40 + 1, 7, 8], set(), 9, Step(0, [2**40 + 1], False)),
    ],
)
def test_by_hand(device, accept, draft, target, stop, room, wanted):
    assert call(accept, device, draft, target, frozenset(stop), room) == wanted


@EITHER
def test_every_small_case(device, accept):
    """Two drafts or fewer of two tokens: every draft, target, number drafted, room and set of stop tokens."""
    for draft in product((0, 1), repeat=2):
        for target in product((0, 1), repeat=3):
            for drafted, room, stop in product((0, 1, 2), (1, 2, 3), (frozenset(), frozenset({1}), frozenset({0, 1}))):
                wanted = plain_decoding(list(draft[:drafted]), list(target[: drafted + 1]), stop, room)
                decided = call(accept, device, list(draft), list(target), stop, room, drafted=drafted)
                assert decided == wanted, (draft, target, drafted, room, stop)


@EITHER
@pytest.mark.parametrize("most", range(16))
def test_what_was_not_drafted_is_garbage(device, accept, most):
    """Buffers are as long as the longest draft: beyond lie the tokens of another step, which may well agree."""
    for drafted in {0, most // 2, max(most - 1, 0), most}:
        right = list(range(100, 100 + most + 1))
        wanted = Step(drafted, right[: drafted + 1], False)
        assert call(accept, device, right[:most], right, drafted=drafted) == wanted
        spoiled = right[:drafted] + [GARBAGE] * (most - drafted)
        beyond = right[: drafted + 1] + [GARBAGE] * (most - drafted)
        assert call(accept, device, spoiled, beyond, drafted=drafted) == wanted
        # a stop token out there ends nothing
        assert call(accept, device, right[:most], right, frozenset(right[drafted + 1 :]), drafted=drafted) == wanted
        for wrong in {0, drafted // 2, drafted - 1} & set(range(drafted)):
            missed = [*right[:wrong], GARBAGE, *right[wrong + 1 : most]]
            assert call(accept, device, missed, right, drafted=drafted) == Step(wrong, right[: wrong + 1], False)


@EITHER
@pytest.mark.parametrize("count", range(10))
def test_any_number_of_stop_tokens(device, accept, count):
    """Also where it is no power of two: what pads them is no token."""
    stops = list(range(50, 50 + count))
    for place in range(4):
        for stop in stops:
            target = [1, 2, 3, 4]
            target[place] = stop
            wanted = Step(3, target[: place + 1], True)
            assert call(accept, device, target[:3], target, frozenset(stops)) == wanted
    for token in (0, 49, 50 + count, 128_000):
        assert call(accept, device, [1], [1, token], frozenset(stops)) == Step(1, [1, token], False)


@EITHER
@pytest.mark.parametrize("order", [[8, 3, 5, 2], [2, 3, 5, 8], [3, 3, 3]])
def test_stop_tokens_come_in_any_order(device, accept, order):
    draft, target = row([1, 3, 8], device), row([1, 3, 8, 2], device)
    assert accept(draft, target, row(order, device), 10, 20).tolist() == [3, 12, 1]


@EITHER
@pytest.mark.parametrize(("length", "limit"), [(0, 1), (1, 3), (2**16 - 1, 2**16 + 1), (2**17, 2**17 + 2)])
def test_numbers_may_lie_on_the_device(device, accept, length, limit):
    """The same result from Python's integers and from ``[1]`` tensors, wherever in a buffer these begin."""
    draft, target, stop = row([1, 2, 3], device), row([1, 2, 9, 4], device), row([4], device)
    wanted = [2, min(limit, length + 3), 0]
    assert accept(draft, target, stop, length, limit, drafted=3).tolist() == wanted
    numbers = row([GARBAGE, length, limit, 3], device)
    on_device = accept(draft, target, stop, numbers[1:2], numbers[2:3], drafted=numbers[3:])
    assert on_device.tolist() == wanted
    assert numbers.tolist() == [GARBAGE, length, limit, 3]


@EITHER
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("most", [1, 2, 7, 15])
def test_drafts_may_be_counted_by_flags(device, accept, most, dtype):
    """One for each that there may be, of which those that are 1 come first; what lies beside them does not count."""
    right = list(range(100, 100 + most + 1))
    for drafted in range(most + 1):
        flags = torch.full((most + 2,), 1, dtype=dtype, device=device)
        flags[1 : most + 1] = (torch.arange(most) < drafted).to(flags)
        wanted = Step(drafted, right[: drafted + 1], False)
        assert call(accept, device, right[:most], right, drafted=flags[1 : most + 1]) == wanted


@EITHER
@pytest.mark.parametrize("first", [1, 2, 3])
def test_slices_may_begin_anywhere(device, accept, first):
    draft, target, stop = ([GARBAGE] * first + tokens for tokens in ([1, 2, 3], [1, 2, 3, 4], [7, 3]))
    parts = [row(tokens, device)[first:] for tokens in (draft, target, stop)]
    assert accept(*parts, 10, 20).tolist() == [3, 13, 1]


@EITHER
def test_out_is_written_in_place_and_nothing_beside_it(device, accept):
    buffer = torch.full((5,), GARBAGE, dtype=torch.int64, device=device)
    out = buffer[1:4]
    draft, target, stop = row([1, 2], device), row([1, 2, 3], device), row([3], device)
    assert accept(draft, target, stop, 4, 90, out=out).data_ptr() == out.data_ptr()
    assert buffer.tolist() == [GARBAGE, 2, 7, 1, GARBAGE]
    assert (draft.tolist(), target.tolist(), stop.tolist()) == ([1, 2], [1, 2, 3], [3])


@EITHER
@pytest.mark.parametrize(("most", "targets"), [(3, 3), (3, 5), (0, 2), (0, 0)])
def test_shapes_that_do_not_fit(device, accept, most, targets):
    tokens = torch.zeros(20, dtype=torch.int64, device=device)
    sentence = rf"^accept: draft is \[{most}\], target \[{targets}\]; they must be \[R\] and \[R \+ 1\]\.$"
    with pytest.raises(ValueError, match=sentence):
        accept(tokens[:most], tokens[:targets], tokens[:1], 0, 9)


@pytest.mark.parametrize(("most", "stops"), [(16, 0), (2, MAX_STOPS + 1)])
def test_more_than_the_kernel_takes(device, most, stops):
    tokens = torch.arange(MAX_STOPS + 1, device=device)
    sentence = rf"^accept takes fewer than 16 drafts and at most {MAX_STOPS} stop tokens, got {most} and {stops}; its"
    with pytest.raises(ValueError, match=sentence):
        kernel(tokens[:most], tokens[: most + 1], tokens[:stops], 0, 99)
    length, stopped = (1, 1) if stops else (most + 1, 0)
    found = reference(tokens[:most], tokens[: most + 1], tokens[:stops], 0, 99)
    assert found.tolist() == [most, length, stopped]


def test_as_many_stop_tokens_as_the_kernel_takes(device):
    stops = torch.arange(MAX_STOPS, device=device) + 50
    for last, stopped in ((49 + MAX_STOPS, 1), (50 + MAX_STOPS, 0)):
        assert kernel(row([1], device), row([1, last], device), stops, 4, 9).tolist() == [1, 6, stopped]


@EITHER
@pytest.mark.parametrize("name", ["draft", "target", "stop_tokens"])
def test_tokens_that_are_no_row_of_int64(device, accept, name):
    right = {"draft": row([1, 2], device), "target": row([1, 2, 3], device), "stop_tokens": row([3, 4], device)}
    tokens = right[name]
    for fault in (tokens.int(), tokens.float(), tokens.repeat_interleave(2)[::2], tokens[None], tokens[0]):
        with pytest.raises(TypeError, match=f"^accept: {name} is .*; it must be one contiguous row of int64 on "):
            accept(**(right | {name: fault}), length=0, limit=9)
    if name != "draft":  # which names the device of all
        with pytest.raises(TypeError, match=f"^accept: {name} is .* on meta; it must be .* on {device.type}"):
            accept(**(right | {name: tokens.to("meta")}), length=0, limit=9)


@EITHER
@pytest.mark.parametrize("name", ["length", "limit"])
def test_lengths_that_are_none(device, accept, name):
    tokens = row([1, 2, 3], device)
    for fault in (-1, 5.5, 1 << 63):
        with pytest.raises(ValueError, match=rf"^accept: {name} is {fault}; it must be a whole number from 0 to 2\^63"):
            accept(tokens[:2], tokens, tokens[:0], **({"length": 0, "limit": 9} | {name: fault}))
    for fault in (tokens[:2], tokens[:0], tokens[:1].int(), tokens[:1] + 4.5, tokens[:1].to("meta")):
        with pytest.raises(TypeError, match=rf"^accept: {name} is \[\d\] .*; it must be \[1\] torch.int64 on "):
            accept(tokens[:2], tokens, tokens[:0], **({"length": 0, "limit": 9} | {name: fault}))


@EITHER
def test_a_limit_below_the_length(device, accept):
    tokens = row([1, 2, 3], device)
    with pytest.raises(ValueError, match=r"^accept: limit is 6; it must not be below the length, 7\.$"):
        accept(tokens[:2], tokens, tokens[:0], 7, 6)
    assert accept(tokens[:2], tokens, tokens[:0], 7, 7).tolist() == [2, 7, 0]


@EITHER
def test_no_limit(device, accept):
    """A number of any size; nothing is made of its size."""
    tokens = row([1, 2, 3], device)
    for limit in (1 << 40, (1 << 63) - 1):
        assert accept(tokens[:2], tokens, tokens[:0], 7, limit).tolist() == [2, 10, 0]


@EITHER
def test_counts_of_drafts_that_are_none(device, accept):
    tokens = row([1, 2, 3], device)
    for fault in (-1, 3, 1.5):
        with pytest.raises(ValueError, match=rf"^accept: drafted is {fault}; it must be a whole number from 0 to 2\.$"):
            accept(tokens[:2], tokens, tokens[:0], 0, 9, drafted=fault)
    flags = torch.ones(8, dtype=torch.int32, device=device)
    for fault in (flags[:3], flags[:2].float(), flags[:2].bool(), flags[:4:2], flags[:2].to("meta")):
        with pytest.raises(
            TypeError, match=r"^accept: drafted is \[\d\] .*; it must be a count or at most 2 contiguous"
        ):
            accept(tokens[:2], tokens, tokens[:0], 0, 9, drafted=fault)
    assert accept(tokens[:0], tokens[:1], tokens[:0], 0, 9, drafted=flags[:0]).tolist() == [0, 1, 0]
    assert accept(tokens[:0], tokens[:1], tokens[:0], 0, 9, drafted=0 * flags[:1]).tolist() == [0, 1, 0]


@EITHER
def test_an_out_that_does_not_fit(device, accept):
    tokens, out = row([1, 2, 3], device), row([0] * 6, device)
    for fault in (out[:1], out[:4], out[None, :3], out[::2], out[:3].int(), out[:3].float(), out[:3].to("meta")):
        with pytest.raises(ValueError, match=r"^accept: out is .*; it must be \[3\] torch.int64 on \S+, last stride 1"):
            accept(tokens[:2], tokens, tokens[:0], 0, 9, out=fault)
    assert out.tolist() == [0] * 6


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    cpu = torch.device("cpu")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        kernel(row([1], cpu), row([1, 2], cpu), row([], cpu), 0, 9)


@EITHER
@pytest.mark.parametrize("bad", range(5))
def test_nothing_is_committed_from_a_row_that_is_not_finite_on(device, accept, bad):
    draft, target = row([1, 2, 3], device), row([1, 2, 3, 4], device)
    confidence = torch.full((4,), 0.5, device=device)
    confidence[bad:] = float("nan")
    for stop, drafted, room in (([], 3, 9), ([], 1, 9), ([3], 3, 9), ([], 3, 2)):
        stops = row(stop, device)
        free = accept(draft, target, stops, 5, 5 + room, drafted=drafted).tolist()
        decided = accept(draft, target, stops, 5, 5 + room, confidence=confidence, drafted=drafted).tolist()
        cut = bad < free[1] - 5
        assert decided == [min(free[0], bad), 5 + bad if cut else free[1], 0 if cut else free[2]]


@EITHER
def test_a_confidence_that_does_not_fit(device, accept):
    tokens = row([1, 2, 3], device)
    for fault in (torch.zeros(2, device=device), torch.zeros(3, dtype=torch.float64, device=device)):
        with pytest.raises(ValueError, match="confidence"):
            accept(tokens[:2], tokens, tokens[:0], 0, 9, confidence=fault)
