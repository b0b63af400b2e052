"""Heads whose confidence was trained: its formula, in every way through kernels and references, and what follows it."""

from typing import Any

import pytest
import torch
from kernel_inputs import poisoned_top1, same_top1
from recorded import Recorded
from torch import Tensor

from kangaroo_kernels import sample_head as sampled
from kangaroo_kernels import top1_head as top1
from kangaroo_kernels.contract import DraftVocabulary, Top1, TrainedConfidence
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference import sample_head as sampled_ref
from kangaroo_kernels.reference import top1_head as top1_ref
from kangaroo_kernels.sample_head import filtered_sample_kernel
from kangaroo_kernels.shared.head import TileResults, check_trained, merge_tiles, merge_tiles_kernel

NAN = float("nan")
NANS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of them
FLOAT, HALF = torch.float32, torch.float16
EPS, VOCAB = 0.25, 67  # an eps that counts
WAYS: dict[str, dict[str, Any] | None] = {
    "greedy": None,
    "sampled": {"temperature": 1.3, "seed": 5},
    "top-k": {"temperature": 1.3, "seed": 9, "top_k": 7},
    "top-p": {"temperature": 1.1, "seed": 9, "top_p": 0.7},
}
WAY = pytest.mark.parametrize("way", WAYS)
KERNELS, REFERENCES = (top1, sampled), (top1_ref, sampled_ref)
EITHER = pytest.mark.parametrize("heads", [REFERENCES, KERNELS], ids=["reference", "kernel"])


def choose(heads: tuple[Any, Any], way: str, x: Tensor, norm: Tensor, head: Any, **step: Any) -> Top1:
    """A head's choice, by its kernel or its reference: ``heads`` has that of ``top1_head`` and of ``sample_head``."""
    settings = WAYS[way]
    if settings is None:
        return heads[0].top1_head(x, norm, head, eps=EPS, **step)
    return heads[1].sample_head(x, norm, head, 40, eps=EPS, **settings, **step)


def problem(
    device: torch.device, rows: int = 1, inner: int = 48, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor, Tensor], TrainedConfidence]:
    """Hidden states, norm and head; and a trained confidence, behind whose weight there is NaN."""
    generator = torch.Generator().manual_seed(rows + inner)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x, norm, head = 0.5 * draw(rows, inner), 1 + 0.1 * draw(inner), 2 * inner**-0.5 * draw(VOCAB, inner)
    weight = torch.full((inner + 1024,), NAN, device=device)[:inner].copy_(inner**-0.5 * draw(inner))
    given = tuple(each.to(device, dtype) for each in (x, norm, head))
    return given, TrainedConfidence(weight, torch.tensor([0.7, 0.4], device=device))


def hold(x: Tensor, probability: Tensor, trained: TrainedConfidence, confidence: Tensor) -> None:
    """The formula in float64, within what float32 may lose: a rounding a sum's term, four a logit."""
    wide, p = x.double().cpu(), probability.cpu().clamp(1e-6, 1 - 1e-6).double()  # the bounds are float32's
    weight, (scale, bias) = trained.weight.double().cpu(), trained.scale_bias.double().cpu()
    factor = torch.rsqrt(wide.square().mean(dim=1) + EPS)
    wanted = torch.sigmoid(scale * torch.logit(p) + (wide @ weight) * factor + bias)
    terms = x.shape[1] * (wide.abs() @ weight.abs()) * factor + 4 * scale.abs() * (1 + torch.logit(p).abs()) + 4
    error = torch.finfo(torch.float32).eps * (terms / 4 + 4)  # a sigmoid is at most as steep as 1 / 4
    assert ((confidence.double().cpu() - wanted).abs() <= error).all()


@pytest.mark.usefixtures("guarded_workspaces")
@EITHER
@WAY
@pytest.mark.parametrize(
    ("rows", "inner", "dtype"),
    [(1, 48, FLOAT), (3, 1, FLOAT), (16, 48, HALF), (2, 1024, HALF), (3, 1030, FLOAT), (1, 2050, HALF)],
)
def test_formula(device, heads, way, rows, inner, dtype):
    """Beside the tokens of a head without it, K a multiple of a chunk or not."""
    given, trained = problem(device, rows, inner, dtype)
    plain = choose(heads, way, *given)
    out = poisoned_top1(rows, device)
    found = choose(heads, way, *given, trained=trained, out=out)
    assert found.token is out.token
    assert torch.equal(found.token, plain.token)
    hold(given[0], plain.confidence, trained, found.confidence)
    assert ((found.confidence - plain.confidence).abs() > 1e-3).all()


@EITHER
@WAY
def test_rows_of_some_tokens(device, heads, way):
    """The probability is that among them."""
    (x, norm, head), trained = problem(device, 3)
    vocabulary = DraftVocabulary(torch.arange(3, VOCAB, 2, dtype=torch.int32, device=device), VOCAB)
    part = head[vocabulary.tokens.long()]
    plain = choose(heads, way, x, norm, part, vocabulary=vocabulary)
    found = choose(heads, way, x, norm, part, vocabulary=vocabulary, trained=trained)
    assert torch.equal(found.token, plain.token)
    hold(x, plain.confidence, trained, found.confidence)


@pytest.mark.parametrize("place", [(2, slice(None)), (slice(None), slice(5, 53))], ids=["row", "columns"])
@WAY
def test_rows_of_a_buffer(device, way, place):
    (x, norm, head), trained = problem(device, 1)
    wanted = choose(KERNELS, way, x, norm, head, trained=trained)
    buffer = torch.full((3, 48) if place[0] == 2 else (1, 60), NAN, device=device)
    buffer[place] = x
    inside = buffer[2:] if place[0] == 2 else buffer[place]
    assert same_top1(choose(KERNELS, way, inside, norm, head, trained=trained), wanted)


@NANS
@EITHER
@WAY
def test_a_nan_makes_its_row_unsure_and_no_other(device, heads, way):
    (x, norm, head), trained = problem(device, 5)
    clean = choose(heads, way, x, norm, head, trained=trained)
    x[2, 7] = NAN
    found = choose(heads, way, x, norm, head, trained=trained)
    assert found.confidence.isnan().tolist() == [False, False, True, False, False]
    others = [0, 1, 3, 4]
    torch.testing.assert_close(found.confidence[others], clean.confidence[others])


@NANS
@EITHER
@WAY
@pytest.mark.parametrize("what", ["logits", "weight", "scale"])
def test_a_nan_is_unsure(device, heads, way, what):
    """No logit at all, though the input is fine; a weight that is NaN."""
    (x, norm, head), trained = problem(device)
    if what == "logits":
        nothing = torch.full((VOCAB,), -torch.inf, device=device)
        head = PackedWeight(torch.zeros_like(head), nothing, Layout.ROWS)
    else:
        (trained.weight if what == "weight" else trained.scale_bias)[0] = NAN
    flag = torch.ones(1, dtype=torch.int32, device=device)
    found = choose(heads, way, x, norm, head, trained=trained, threshold=0.0, active=flag)
    assert found.confidence.isnan().all()
    assert flag.tolist() == [0]


@EITHER
@WAY
@pytest.mark.parametrize("scale", [0.1, -0.1, 1e30])
def test_a_probability_of_one(device, heads, way, scale):
    """Its logit is finite."""
    (x, norm, head), trained = problem(device)
    trained.scale_bias[0] = scale
    bias = torch.zeros(VOCAB, device=device)
    bias[4] = 200.0
    certain = choose(heads, way, x, norm, PackedWeight(torch.zeros_like(head), bias, Layout.ROWS), trained=trained)
    if scale == 1e30:
        assert certain.confidence.tolist() == [1.0]
    else:
        hold(x, torch.ones(1), trained, certain.confidence)


@NANS
@pytest.mark.parametrize(("total", "probability"), [(1.0, 1.0), (1e8, 1e-8), (4.0, 0.25), (NAN, NAN)])
def test_probabilities_far_out(device, total, probability):
    """In the merge and in the reference, which also has them far below what any head of a test gives."""
    (x, _, _), trained = problem(device)
    tiles = TileResults(1, 3, device, sampled=False)
    tiles.largest.fill_(-torch.inf)[:, 1] = 2.0
    tiles.sums.zero_()[:, 1] = total
    tiles.indices.copy_(torch.arange(3))
    operands = check_trained("merge", x, trained, EPS)
    merged = merge_tiles(tiles, poisoned_top1(1, device), *[None] * 6, operands).confidence
    given = torch.tensor([probability], device=device)
    for confidence in (merged, top1_ref.trained_confidence(x, given, trained, EPS)):
        if probability == probability:  # noqa: PLR0124 (a NaN differs from itself)
            hold(x, given, trained, confidence)
        else:
            assert confidence.isnan().all()


@EITHER
@WAY
def test_the_threshold_is_compared_with_it(device, heads, way):
    given, trained = problem(device)
    sure = choose(heads, way, *given, trained=trained).confidence
    above = float(torch.nextafter(sure, torch.ones_like(sure)))
    verdict = torch.tensor([7], dtype=torch.int32, device=device)
    for threshold, up in ((float(sure), 1), (above, 0)):
        choose(heads, way, *given, trained=trained, threshold=threshold, sure=verdict)
        assert verdict.tolist() == [up]
    for bias, up in ((-20.0, 0), (20.0, 1)):
        trained.scale_bias[1] = bias
        choose(heads, way, *given, trained=trained, threshold=0.5, sure=verdict)
        assert verdict.tolist() == [up]


@EITHER
@WAY
def test_a_flag_that_is_down(device, heads, way):
    given, trained = problem(device)
    flag, out = torch.zeros(1, dtype=torch.int32, device=device), poisoned_top1(1, device)
    assert choose(heads, way, *given, trained=trained, threshold=0.0, active=flag, out=out) is out
    assert same_top1(out, poisoned_top1(1, device))
    assert flag.tolist() == [0]


@WAY
@pytest.mark.parametrize("inner", [48, 37])
def test_one_binary_serves_any_number_of_rows(device, monkeypatch, way, inner):
    """Wherever in a buffer they and the two numbers begin."""
    merge, filtered = Recorded(merge_tiles_kernel), Recorded(filtered_sample_kernel)
    monkeypatch.setattr("kangaroo_kernels.shared.head.merge_tiles_kernel", merge)
    monkeypatch.setattr("kangaroo_kernels.sample_head.filtered_sample_kernel", filtered)
    (x, norm, head), trained = problem(device, 20, inner, torch.float16)
    numbers = torch.ones(8, device=device)
    for rows, first in ((1, 0), (2, 1), (7, 4), (16, 3)):
        some = trained._replace(scale_bias=numbers[first : first + 2])
        choose(KERNELS, way, x[first : first + rows], norm, head, trained=some)
    assert len(merge.launches) + len(filtered.launches) == 4
    assert len(merge.binaries()) + len(filtered.binaries()) == 1


@WAY
def test_what_does_not_fit(device, way):
    given, trained = problem(device)
    weight, numbers = trained
    for wrong, message in (
        ({"weight": weight[:40]}, r"weight is \[40\] torch.float32 on .*; it must be \[48\] torch.float32"),
        ({"weight": weight.half()}, r"weight is \[48\] torch.float16"),
        ({"weight": weight.repeat(2)[::2]}, "contiguous"),
        ({"weight": weight.to("meta")}, "on meta"),
        ({"scale_bias": numbers[:1]}, r"scale_bias is \[1\] .* must be \[2\]"),
        ({"scale_bias": numbers.double()}, "torch.float64"),
    ):
        op = "top1_head" if way == "greedy" else "sample_head"
        with pytest.raises(ValueError, match=rf"^{op}: the trained confidence.*{message}"):
            choose(KERNELS, way, *given, trained=trained._replace(**wrong))
