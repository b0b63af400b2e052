"""``commit``: kernel and reference move the same state, and the state is that of the text."""

import inspect

import pytest
import torch
from torch import Tensor

from kangaroo_kernels import commit as commit_triton
from kangaroo_kernels import commit_ref

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
        "record": torch.full((commit_ref.RECORD_HEAD + most + 1,), -9),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def copy(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in given.items()}


def test_launcher_and_reference_have_one_signature():
    assert inspect.signature(commit_triton.commit) == inspect.signature(commit_ref.commit)


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


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("decision", 4, r"decision is \[4\]; for 4 drafts it must be \[3\]"),
        ("flags", 4, "flags"),
        ("record", 9, "record"),
    ],
)
def test_shapes_that_do_not_fit(device, name, size, message):
    given = state(4, device)
    given[name] = given[name].new_zeros(size)
    with pytest.raises(ValueError, match=message):
        commit_triton.commit(**given)
