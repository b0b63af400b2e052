"""Right before fast: nothing is timed before ``relative_error`` held what it wrote against float64."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels.operation import OPERATIONS, Arguments
from kangaroo_kernels.reference.noise import gumbel_rows
from kangaroo_kernels.reference.sample_head import filter_logits
from kangaroo_kernels.reference.top1_head import confidence_of, lm_head

ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative errors beyond which nothing is timed: several roundings of the dtype."""


def launcher(op: str) -> Callable[..., Any]:
    """The kernel's."""
    return OPERATIONS[op].launcher


def reference(op: str) -> Callable[..., Any]:
    """The operation in PyTorch."""
    return OPERATIONS[op].reference


def row_operands(op: str) -> tuple[int, ...]:
    """Which arguments have a row a token in flight."""
    return (0, 2) if op == "linear_residual" else (0,)


def first_rows(op: str, arguments: Arguments, rows: int) -> Arguments:
    """Arguments of the first ``rows`` tokens in flight."""
    positional, named = arguments
    return tuple(each[:rows] if index in row_operands(op) else each for index, each in enumerate(positional)), named


def first_results(op: str, results: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The same of what ``written`` gave for all; an appended cache has its rows in the second dimension."""
    return [each[:, :rows] if op == "qkv_rope" and index else each[:rows] for index, each in enumerate(results)]


def _tensors(op: str, result: Any, arguments: Arguments) -> Iterator[Tensor]:
    """A result's tensors, then the rows of the caches that the operation appends."""
    yield from (result if isinstance(result, tuple) else (result,))
    if op == "qkv_rope":
        x, *_, k_cache, v_cache, position = arguments[0]
        first, last = int(position), int(position) + x.shape[0]
        yield from (k_cache[:, first:last], v_cache[:, first:last])


def written(op: str, function: Callable[..., Any], arguments: Arguments, takes_out: bool = True) -> tuple[Tensor, ...]:
    """Copies of all that a call writes, into poisoned memory where the function has ``out``."""
    positional, named = arguments
    result = function(*positional, **named)
    if takes_out:
        for tensor in _tensors(op, result, arguments):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        result = function(*positional, **named, out=result)
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in _tensors(op, result, arguments))


def agreeing(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens of two texts are the same before the first other one."""
    return sum(takewhile(bool, map(int.__eq__, ours, theirs)))


def same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two results of ``written`` are equal to the last bit: a zero's sign counts."""
    pairs = zip(ours, theirs, strict=True)
    return all(
        torch.equal(one[..., None].view(torch.uint8), other[..., None].view(torch.uint8)) for one, other in pairs
    )


def relative_error(op: str, got: tuple[Tensor, ...], arguments: Arguments, same_noise: bool = True) -> float:
    """How far ``got`` (of ``written``) is from the reference in float64; infinity for a NaN or an impossible token.

    It is the largest |got - truth| / |truth| over what was written. For a head it is the confidences' distance, or how
    far below the best score the chosen tokens' are, over the largest score, whichever is more: a near tie may go either
    way. Without ``same_noise`` a sampled token says nothing but that it is one.
    """
    positional, named = arguments
    wide = tuple(each.double() if getattr(each, "dtype", None) in ALLOWED else each for each in positional)
    if "head" in op:
        errors = _head_errors(op, got, (wide, named), same_noise)
    else:
        truth = written(op, reference(op), (wide, named), takes_out=False)
        errors = [_distance(ours, exact) for ours, exact in zip(got, truth, strict=True)]
    return max(float("inf") if math.isnan(error) else error for error in errors)


def _distance(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def _head_errors(op: str, got: tuple[Tensor, ...], arguments: Arguments, same_noise: bool) -> list[float]:
    (x, norm_weight, weight, *rest), named = arguments
    scores = lm_head(x, norm_weight, weight, eps=named["eps"])
    token, confidence = got
    if not bool(((token >= 0) & (token < scores.shape[1])).all()):
        return [float("inf")]
    distance = _distance(confidence, confidence_of(scores))
    if op == "sample_head" and not same_noise:
        return [distance]
    if op == "sample_head":
        noise = gumbel_rows(
            int(named["seed"]) % (1 << 64), 0, int(rest[0]), scores.shape[0], scores.shape[1], scores.device
        )
        scores = filter_logits(scores, named["temperature"], None, None) + noise
    lost = scores.amax(dim=-1) - scores.gather(-1, token[:, None])[:, 0]
    return [distance, float(lost.max() / scores.abs().max())]
