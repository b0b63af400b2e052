"""Heads that have the rows of some tokens alone: tokens, noise and bits are those of the whole head's rows."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from draft_steps import VOCAB, draft, make_model
from torch import Tensor

from kangaroo_kernels import sample_head as sampled
from kangaroo_kernels import top1_head as top1
from kangaroo_kernels.contract import DraftModel, DraftVocabulary, Top1
from kangaroo_kernels.draft_loop import DraftLoop
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference import sample_head as sampled_ref
from kangaroo_kernels.reference import top1_head as top1_ref
from kangaroo_kernels.reference.noise import gumbel
from kangaroo_kernels.shared.launch import device_seed
from kangaroo_kernels.shared.noise import gumbel_of

SIZE, INNER = 301, 48
WAYS: dict[str, dict[str, Any] | None] = {
    "greedy": None,
    "sampled": {"temperature": 1.3, "seed": 2**63 + 5},
    "top-k": {"temperature": 1.3, "seed": 9, "top_k": 7},
    "top-p": {"temperature": 1.1, "seed": 9, "top_p": 0.7},
}
WAY = pytest.mark.parametrize("way", WAYS)


def some(count: int, size: int = SIZE, seed: int = 0, device: torch.device | str = "cpu") -> DraftVocabulary:
    """So many tokens, drawn at random."""
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    return DraftVocabulary(drawn.sort().values.to(device, torch.int32), size)


def problem(device: torch.device, rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, norm and a whole head."""
    generator = torch.Generator().manual_seed(seed)
    x, head = (torch.randn(count, INNER, generator=generator) for count in (rows, SIZE))
    return x.to(device), (1 + 0.1 * torch.randn(INNER, generator=generator)).to(device), head.to(device)


def choose(module: tuple[Any, Any], way: str, x: Tensor, norm: Tensor, head: Any, **step: Any) -> Top1:
    """A head's choice, by its kernel or its reference: ``module`` has that of ``top1_head`` and of ``sample_head``."""
    settings = WAYS[way]
    if settings is None:
        return module[0].top1_head(x, norm, head, eps=1e-5, **step)
    return module[1].sample_head(x, norm, head, 40, eps=1e-5, **settings, **step)


KERNELS, REFERENCES = (top1, sampled), (top1_ref, sampled_ref)
EITHER = pytest.mark.parametrize("heads", [REFERENCES, KERNELS], ids=["reference", "kernel"])


@triton.jit
def gumbel_of_kernel(tokens_ptr, seed_ptr, out_ptr, stream, position, rows: tl.constexpr, cols: tl.constexpr):
    tokens = tl.load(tokens_ptr + tl.arange(0, cols))
    noise = gumbel_of(tl.load(seed_ptr), stream, position + tl.arange(0, rows), tokens, rows, cols)
    tl.store(out_ptr + tl.arange(0, rows)[:, None] * cols + tl.arange(0, cols)[None, :], noise)


@pytest.mark.parametrize(("seed", "stream", "position"), [(0, 0, 0), (2**64 - 1, 2, 2**20)])
def test_the_noise_of_any_tokens(device, seed, stream, position):
    """Neighbours, and tokens of every place among the four that share a word of the generator."""
    tokens = torch.tensor([0, 1, 2, 3, 5, 10, 15, 16, 21, 22, 255, 300, 1000, 49151, 128255, 999999], dtype=torch.int32)
    out = torch.empty(4, 16, device=device)
    gumbel_of_kernel[(1,)](tokens.to(device), device_seed(seed, device), out, stream, position, 4, 16)
    wanted = gumbel(seed, stream, position + torch.arange(4), 1_000_000)[:, tokens.long()]
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("guarded_workspaces")
@WAY
@pytest.mark.parametrize("count", [1, 31, 32, 33, 150, 300])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_token_is_the_references(device, way, count, rows):
    x, norm, head = problem(device, rows, seed=count)
    vocabulary = some(count, device=device)
    ours = choose(KERNELS, way, x, norm, head[vocabulary.tokens.long()], vocabulary=vocabulary)
    theirs = choose(REFERENCES, way, x, norm, head[vocabulary.tokens.long()], vocabulary=vocabulary)
    assert torch.equal(ours.token, theirs.token)
    assert torch.isin(ours.token, vocabulary.tokens).all()
    torch.testing.assert_close(ours.confidence, theirs.confidence, rtol=1e-5, atol=0)


@WAY
@EITHER
def test_all_tokens_are_the_whole_head(device, heads, way):
    """To the bit: noise, order and confidence."""
    x, norm, head = problem(device, 16)
    whole = choose(heads, way, x, norm, head)
    listed = choose(heads, way, x, norm, head, vocabulary=some(SIZE, device=device))
    assert torch.equal(whole.token, listed.token)
    assert torch.equal(whole.confidence.view(torch.int32), listed.confidence.view(torch.int32))


@EITHER
@pytest.mark.parametrize("places", [[0, 1], [31, 32], [7, 8, 90]])
def test_ties_go_to_the_lowest_token(device, heads, places):
    vocabulary, bias = some(100, device=device), torch.zeros(100, device=device)
    bias[places] = 3.0
    head = PackedWeight(torch.zeros(100, 4, device=device), bias, Layout.ROWS)
    arguments = torch.ones(2, 4, device=device), torch.ones(4, device=device), head
    top = choose(heads, "greedy", *arguments, vocabulary=vocabulary)
    assert top.token.tolist() == [int(vocabulary.tokens[places[0]])] * 2


@WAY
@EITHER
def test_a_drafting_step_gets_the_tokens_embedding(device, heads, way):
    x, norm, head = problem(device)
    vocabulary = some(50, device=device)
    embedding, embedded = torch.randn(SIZE, INNER, device=device), torch.empty(1, INNER, device=device)
    flags = torch.tensor([1, 7], dtype=torch.int32, device=device)
    step = {"embedding": embedding, "embedded": embedded, "threshold": 0.0, "active": flags[:1], "sure": flags[1:]}
    top = choose(heads, way, x, norm, head[vocabulary.tokens.long()], vocabulary=vocabulary, **step)
    assert torch.equal(embedded[0], embedding[top.token[0]])
    assert flags.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of them
@WAY
@EITHER
def test_logits_that_are_none_give_a_token_of_the_vocabulary(device, heads, way):
    x, norm, head = problem(device)
    vocabulary = some(50, device=device)
    top = choose(heads, way, x * float("nan"), norm, head[vocabulary.tokens.long()], vocabulary=vocabulary)
    assert int(top.token) == int(vocabulary.tokens[0])
    assert top.confidence.isnan().all()


@WAY
def test_vocabularies_that_do_not_fit(device, way):
    x, norm, head = problem(device)
    vocabulary, rows = some(50, device=device), head[:50]
    for wrong, message in (
        (vocabulary._replace(tokens=vocabulary.tokens[:49]), r"\[49\] torch.int32 .* must be \[50\]"),
        (vocabulary._replace(tokens=vocabulary.tokens.long()), "torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(KERNELS, way, x, norm, rows, vocabulary=wrong)
    short = {"embedding": head[:60], "embedded": torch.empty(1, INNER, device=device)}
    with pytest.raises(ValueError, match="embedding has 60 rows"):
        choose(KERNELS, way, x, norm, rows, vocabulary=vocabulary, **short)


# ---- the drafting loop as one launch


def with_some(model: DraftModel, count: int, device: torch.device) -> DraftModel:
    """The same drafter with the head's rows of some tokens."""
    vocabulary = some(count, VOCAB, device=device)
    rows, places = model.head, vocabulary.tokens.long()
    bias = None if rows.bias is None else rows.bias[places]
    return model._replace(head=PackedWeight(rows.rows[places], bias, Layout.ROWS), vocabulary=vocabulary)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.4, "seed": 11}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("count", [2, 33, 66])
@pytest.mark.parametrize("biases", [(), ("head", "qkv")])
def test_one_launch_drafts_what_the_steps_draft(device, settings, count, biases):
    model = with_some(make_model(device, layers=1, biases=biases), count, device)
    step, drafted = draft(model, 3, 20, threshold=0.0, **settings)  # holds it to the stages and to the reference
    assert drafted == 3
    assert torch.isin(step.out.token, model.vocabulary.tokens).all()


def test_a_vocabulary_that_does_not_fit_the_loop(device):
    model = with_some(make_model(device, layers=1), 20, device)
    with pytest.raises(ValueError, match=r"the head is \[20, 40\]"):
        DraftLoop(model._replace(vocabulary=None), 1)
    with pytest.raises(ValueError, match="embedding has 66 rows"):
        DraftLoop(model._replace(embedding=model.embedding[:66]), 1)
