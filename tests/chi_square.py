"""Pearson's chi-square test, and probability integral transforms of a decode."""

import torch
from torch import Tensor

REJECTED = 1e-4
"""A correct sampler falls below this p-value once in ten thousand sets of seeds; the seeds of the tests are fixed."""


def p_value(counts: Tensor, probabilities: Tensor, least_expected: float = 8.0) -> float:
    """How probable counts at least as far from ``probabilities`` are; 0 where something impossible was counted.

    Outcomes that are expected fewer than ``least_expected`` times are counted as one.
    """
    counts, probabilities = counts.double().flatten(), probabilities.double().flatten()
    assert abs(float(probabilities.sum()) - 1) < 1e-5
    if counts[probabilities == 0].any():
        return 0.0
    expected = counts.sum() * probabilities / probabilities.sum()
    rare = expected < least_expected
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def uniform_p_value(values: Tensor, bins: int = 16) -> float:
    """Of numbers that should be uniform on (0, 1) and independent: of each, and of neighbours together."""
    places = (values * bins).long().clamp(0, bins - 1)
    single = p_value(places.bincount(minlength=bins), torch.full((bins,), 1 / bins))
    coarse = (values * 5).long().clamp(0, 4)
    pairs = (coarse[0:-1:2] * 5 + coarse[1::2]).bincount(minlength=25)
    return min(single, p_value(pairs, torch.full((25,), 1 / 25)))


def transform(tokens: Tensor, probabilities: Tensor, order: Tensor, seed: int = 0) -> Tensor:
    """Randomised probability integral transform: uniform and independent if ``tokens[i]`` ~ ``probabilities[i]``.

    Args:
        tokens: ``[N]``, each drawn with all before it known.
        probabilities: ``[N, V]``.
        order: ``[N, V]``, a permutation of the tokens for each, the one in which probabilities are accumulated. Any
            that does not look at ``tokens`` will do; the power of the test depends on it.
    """
    ordered = probabilities.double().gather(1, order)
    place = (order == tokens[:, None]).int().argmax(dim=1, keepdim=True)
    mass = ordered.gather(1, place)[:, 0]
    assert (mass > 0).all(), "a token of probability zero was drawn"
    below = ordered.cumsum(dim=1).gather(1, place)[:, 0] - mass
    dice = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (below + dice * mass).clamp(0, 1)
