"""``commit``: kernel and reference move the same state, and the state is that of the text."""

import pytest
import torch
from torch import Tensor

from kangaroo_kernels import commit as commit_triton
from kangaroo_kernels.contract import RECORD_HEAD
from kangaroo_kernels.reference import commit as commit_ref

EITHER = pytest.mark.parametrize("commit", [commit_ref.commit, commit_triton.commit], ids=["reference", "kernel"])
VOCAB, CAPACITY = 11, 40


def state(most: int, device: torch.device, hidden: int = 24, length: int = 7, limit: int = 30) -> dict[str, Tensor]:
    """A text of ``length`` tokens before a commit of at most ``most`` drafts; what is not to be read is poison."""
    generator = torch.Generator().manual_seed(most)

    def numbers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    made = {
        "decision": numbers(0, length + 1, 0),
        "target": torch.randint(0, VOCAB, (most + 1,), generator=generator),
        "text": torch.cat((torch.arange(length), torch.full((CAPACITY - length,), -9))),
        "length": numbers(length),
        "limit": numbers(limit),
        "positions": torch.full((most + 3,), -9),
        "flags": torch.ones(most + 1, dtype=torch.int32),
        "exit_hidden": torch.randn(most + 2, hidden, generator=generator),
        "embedding": torch.randn(VOCAB, hidden, generator=generator),
        "newest": torch.full((1, hidden), float("nan")),
        "record": torch.full((RECORD_HEAD + most + 1,), -9),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def copy(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in given.items()}


@EITHER
@pytest.mark.parametrize("most", [0, 1, 4, 15])
@pytest.mark.parametrize("hidden", [24, 1500])  # more than a chunk of the kernel
def test_the_state_is_that_of_the_longer_text(device, commit, most, hidden):
    for count in range(1, most + 2):
        given = state(most, device, hidden)
        before = copy(given)
        given["decision"].copy_(torch.tensor([count - 1, 7 + count, 0]))
        given["flags"][max(1, count) :] = 0  # so many were drafted
        drafted = int(given["flags"][:most].sum())
        commit(**given)
        target = before["target"].tolist()
        assert given["text"].tolist() == [*range(7), *target[:count], *[-9] * (CAPACITY - 7 - count)]
        assert given["length"].tolist() == [7 + count]
        assert given["limit"].tolist() == [30]
        assert given["positions"].tolist() == list(range(5 + count, 5 + count + most + 3))
        assert given["flags"].tolist() == [1] + [0] * most
        assert torch.equal(given["exit_hidden"][0], before["exit_hidden"][count])
        assert torch.equal(given["exit_hidden"][1:], before["exit_hidden"][1:])
        assert torch.equal(given["newest"][0], before["embedding"][target[count - 1]])
        assert given["record"].tolist() == [7, 7 + count, count - 1, drafted, 0, *target]
        assert torch.equal(given["target"], before["target"])


@EITHER
def test_a_stop_token_ends_the_text_for_good(device, commit):
    given = state(4, device)
    given["decision"].copy_(torch.tensor([3, 9, 1]))
    commit(**given)
    assert given["length"].tolist() == given["limit"].tolist() == [9]
    assert given["flags"].tolist() == [0] * 5
    assert given["record"].tolist()[:5] == [7, 9, 3, 4, 1]


@EITHER
def test_a_text_at_its_limit_stays(device, commit):
    """The host learns of the end an iteration late."""
    given = state(4, device, limit=7)
    given["decision"].copy_(torch.tensor([2, 7, 0]))
    before = copy(given)
    commit(**given)
    for name in ("text", "length", "limit", "exit_hidden"):
        assert torch.equal(given[name], before[name]), name
    assert bool(given["newest"].isnan().all())
    assert given["flags"].tolist() == [0] * 5
    assert given["positions"].tolist() == list(range(5, 12))


@EITHER
def test_reaching_the_limit_lowers_the_flag(device, commit):
    given = state(2, device, limit=9)
    given["decision"].copy_(torch.tensor([1, 9, 0]))
    commit(**given)
    assert given["flags"].tolist() == [0, 0, 0]


INT = r"torch.int64 on \S+, last stride 1"
SHAPES = [
    ("decision", lambda x: x.new_zeros(4), rf"decision is \[4\] {INT}; it must be \[3\] {INT}\."),
    ("decision", lambda x: x[:2], r"decision is \[2\]"),
    ("target", lambda x: x[None], r"target is \[1, 5\] .* must be \[5\]"),
    ("target", lambda x: x[0], r"target is \[\] torch.int64 on \S+; it must be \[1\]"),
    ("target", lambda x: x[:0], r"target is \[0\] .* must be \[1\]"),
    ("text", lambda x: x[None], r"text is \[1, 40\] .* must be \[40\]"),
    ("text", lambda x: x.repeat_interleave(2)[::2], "text is .* last stride 2; it must be .* last stride 1"),
    ("length", lambda x: x[:0], r"length is \[0\] .* must be \[1\]"),
    ("length", lambda x: x[0], r"length is \[\] .* must be \[1\]"),
    ("limit", lambda x: x.expand(2), r"limit is \[2\] .* must be \[1\]"),
    ("positions", lambda x: x[:, None], r"positions is \[7, 1\] .* must be \[7\]"),
    ("positions", lambda x: x.repeat_interleave(2)[::2], "positions is .* last stride 2"),
    ("flags", lambda x: x[:4], r"flags is \[4\] torch.int32 .* must be \[5\] torch.int32"),
    ("flags", lambda x: x.repeat_interleave(2)[::2], "flags is .* last stride 2"),
    ("record", lambda x: x[:9], r"record is \[9\] .* must be \[10\]"),
    ("exit_hidden", lambda x: x[:5], r"exit_hidden is \[5, 24\] .* must be \[6, 24\]"),
    ("exit_hidden", lambda x: x[0], r"exit_hidden is \[24\] .* must be \[6, 24\]"),
    ("exit_hidden", lambda x: x.t().contiguous().t(), "exit_hidden is .* last stride 6; it must be .* last stride 1"),
    ("embedding", lambda x: x[:, :8], r"embedding is \[11, 8\] .* must be \[11, 24\]"),
    ("embedding", lambda x: x[0], r"embedding is \[24\] .* must be \[24, 24\]"),
    ("embedding", lambda x: x.t().contiguous().t(), "embedding is .* last stride 11"),
    ("newest", lambda x: x[:, :8], r"newest is \[1, 8\] .* must be \[1, 24\]"),
    ("newest", lambda x: x[0], r"newest is \[24\] .* must be \[1, 24\]"),
    ("newest", lambda x: x.repeat_interleave(2, dim=1)[:, ::2], "newest is .* last stride 2"),
]


@EITHER
@pytest.mark.parametrize(("name", "change", "message"), SHAPES, ids=[case[2] for case in SHAPES])
def test_shapes_that_do_not_fit(device, commit, name, change, message):
    given = state(4, device)
    given[name] = change(given[name])
    before = copy(given)
    with pytest.raises(ValueError, match=f"^commit: {message}"):
        commit(**given)
    assert all(torch.equal(given[part], before[part]) for part in before if part != "newest")  # which is NaN


@EITHER
@pytest.mark.parametrize("name", state(4, torch.device("cpu")))
def test_another_dtype_or_device(device, commit, name):
    """The target's tokens name the device, the exit layer's rows the dtype of the others."""
    given = state(4, device)
    dtype = {torch.int64: torch.int32, torch.int32: torch.int64, torch.float32: torch.float16}[given[name].dtype]
    if name != "exit_hidden":
        with pytest.raises(ValueError, match=rf"^commit: {name} is \[.*\] {dtype} on .*; it must be "):
            commit(**given | {name: given[name].to(dtype)})
    with pytest.raises(ValueError, match=r"^commit: .* on meta"):
        commit(**given | {name: given[name].to("meta")})
    commit(**given)


@pytest.mark.parametrize(("most", "positions"), [(16, 19), (4, 33)])
def test_more_than_the_kernel_takes(device, most, positions):
    given = state(most, device)
    given["positions"] = given["positions"].new_zeros(positions)
    sentence = f"^commit takes fewer than 16 drafts and at most 32 positions, got {most} and {positions}; its reference"
    with pytest.raises(ValueError, match=sentence):
        commit_triton.commit(**given)
    commit_ref.commit(**given)
    assert given["positions"].tolist() == list(range(6, 6 + positions))


@EITHER
def test_rows_may_lie_apart(device, commit):
    """Of the exit layer's rows and the embedding; the text begins anywhere."""
    given = state(4, device)
    wanted = copy(given)
    for each in (wanted, given):
        each["decision"].copy_(torch.tensor([2, 10, 0]))
    commit(**wanted)
    for name in ("exit_hidden", "embedding"):
        given[name] = torch.cat((given[name], torch.full_like(given[name], 9.0)), dim=1)[:, :24]
    given["text"] = torch.cat((given["text"][:1], given["text"]))[1:]
    commit(**given)
    for name, tensor in wanted.items():
        assert torch.equal(given[name], tensor), name


def test_nothing_is_written_beyond_the_text(device):
    """The kernel learns the length from the device: what has no room is left out."""
    given = state(4, device)
    buffer = given["text"]
    given["text"] = buffer[:8]
    given["decision"].copy_(torch.tensor([3, 11, 0]))
    commit_triton.commit(**given)
    assert buffer.tolist() == [*range(7), int(given["target"][0]), *[-9] * (CAPACITY - 8)]
