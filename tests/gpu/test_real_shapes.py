"""At real models' shapes: operations against float64, and their bits; a verification's rows; decodes; trees.

In a smoke run of the report the same comparisons go through a tiny shape in Triton's interpreter, where a row's bits
may depend on its neighbours (``docs/kernels.md``): there operations are held by their errors, decodes by their tokens.
"""

import gc
import random

import pytest
import torch
from accuracy import ALLOWED, first_results, first_rows, launcher, relative_error, same_bits, written
from random_model import SMOKE, random_kangaroo, random_prompt, sharing_weights
from trees import hold_bits, random_parents, shapes

from kangaroo_kernels.workloads import MODELS, Settings, workloads

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu
SHAPES, DTYPE = (MODELS, torch.bfloat16) if ON_GPU else ((SMOKE,), torch.float32)
ROWS, COUNTS = (16, range(1, 16)) if ON_GPU else (16, (1, 2))
QUIET = 0.1
"""What the layers behind the exit add: so little that about half of the drafts are right."""

CASES = [
    pytest.param(shape, each, id=f"{shape.name}-{each.op}-{each.role}") for shape in SHAPES for each in workloads(shape)
]


@pytest.mark.gpu_first
@pytest.mark.parametrize(("shape", "workload"), CASES)
@torch.inference_mode()
def test_an_operation(shape, workload, device):
    """On 16 rows and on their first M alone: near the truth, and the same bits."""
    op, kernel = workload.op, launcher(workload.op)
    arguments = workload.make(Settings(ROWS, 1000 if ON_GPU else 32, DTYPE, device))
    together = written(op, kernel, arguments)
    assert relative_error(op, together, arguments) <= ALLOWED[DTYPE]
    for count in COUNTS:
        few = first_rows(op, arguments, count)
        alone = written(op, kernel, few)
        assert relative_error(op, alone, few) <= ALLOWED[DTYPE], f"{count} rows"
        if ON_GPU:
            assert same_bits(alone, first_results(op, together, count)), f"{count} rows have other bits alone"


@pytest.mark.gpu_first
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@torch.inference_mode()
def test_the_rows_of_trees(shape, device):
    """Each has the bits that it has in a chain; the tests' interpreter keeps them, too."""
    dice = random.Random(0)
    if ON_GPU:
        hold_bits(shape, device, DTYPE, shapes(dice, 9))
    else:
        hold_bits(shape, device, DTYPE, [random_parents(dice, 4)], (60,))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def decoder(request, device):
    """A random model, some of whose drafts are right, and a prompt."""
    yield (
        random_kangaroo(request.param, device, DTYPE, quiet=QUIET),
        random_prompt(request.param, 300 if ON_GPU else 20),
    )
    gc.collect()
    torch.cuda.empty_cache()


@torch.inference_mode()
def test_a_verifications_rows(decoder, device):
    """The deep layers and the head over 16 rows at once, as in verification, and row by row, as in plain decoding."""
    kangaroo, prompt = decoder
    target, position = kangaroo.target, len(prompt)
    config, weights, cache = target.config, target.weights, target.new_cache()
    states = torch.randn(ROWS if ON_GPU else 3, config.hidden_size, dtype=DTYPE, device=device)
    cache.reserve(position + len(states))
    target.run(target.embed(prompt), cache, 0, 0, config.num_hidden_layers)

    def verify(first, last):
        deep = kangaroo.drafter.first_layer, config.num_hidden_layers
        hidden = target.run(states[first:last], cache, position + first, *deep)
        best = target.backend.top1_head(hidden, weights.norm, weights.head, eps=config.rms_norm_eps)
        # the library multiplies one row at a time, which is one shape for it: equal states have equal logits
        logits = torch.cat([target.logits(hidden[row : row + 1]) for row in range(len(hidden))])
        return hidden, best.token, best.confidence, logits

    together = verify(0, len(states))
    alone = [torch.cat(parts) for parts in zip(*(verify(row, row + 1) for row in range(len(states))), strict=True)]
    for name, ours, theirs in zip(("states", "tokens", "confidences", "logits"), together, alone, strict=True):
        if ON_GPU or not ours.is_floating_point():
            assert torch.equal(ours, theirs), name
        else:
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-4), name


@pytest.mark.parametrize("temperature", [0.0, 0.8] if ON_GPU else [0.0])
def test_a_decode(decoder, temperature):
    compare_decodes(*decoder, temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.8] if ON_GPU else [0.0])
def test_a_decode_of_trees(decoder, temperature):
    kangaroo, prompt = decoder
    trees = sharing_weights(kangaroo, draft_tree=15 if ON_GPU else 2)
    compare_decodes(trees, prompt, temperature, ((6, 0.1), (15, 0.0)) if ON_GPU else ((2, 0.0),))


LIMITS = ((6, 0.6), (6, 0.0), (15, 0.0), (1, 1.0)) if ON_GPU else ((6, 0.0),)


def compare_decodes(kangaroo, prompt, temperature, limits=LIMITS):
    """Plain decoding's tokens at several settings; nothing would be compared if no draft were accepted."""
    settings, lengths = {"max_new_tokens": 96 if ON_GPU else 8, "temperature": temperature}, []
    wanted = kangaroo.generate(prompt, plain=True, **settings).tokens
    for drafts, threshold in limits:
        most = {"num_speculative_tokens": drafts, "draft_confidence_threshold": threshold}
        got = kangaroo.generate(prompt, **most, **settings)
        assert got.tokens == wanted, most
        lengths.append(got.stats.mean_acceptance_length)
    assert max(lengths) > 1
