"""``top1_head``: RMSNorm, LM head, top-1 token and its softmax probability, without keeping the logits.

Ties go to the lowest index, as with ``torch.argmax``. Bytes moved: the head, ``V * K`` elements, once.
"""

import torch
from torch import Tensor

from kangaroo_kernels.contract import LEAST_DOUBT, DraftVocabulary, Top1, TrainedConfidence
from kangaroo_kernels.packed_weight import Weight, out_features
from kangaroo_kernels.reference.rms_norm import norm_linear


def lm_head(x: Tensor, norm_weight: Tensor, weight: Weight, *, eps: float, active: Tensor | None = None) -> Tensor:
    """The logits themselves, ``[M, V]`` float32, for callers that need every one of them.

    Where ``active`` (``[1]`` int32) is 0, they are whatever new memory holds.
    """
    if active is not None and not active:
        return x.new_empty(len(x), out_features(weight), dtype=torch.float32)
    return norm_linear(x, norm_weight, eps, weight).float()


def confidence_of(logits: Tensor) -> Tensor:
    """The top-1 softmax probability of each row: ``[M, V]`` to ``[M]`` float32."""
    return torch.softmax(logits, dim=-1).amax(dim=-1)


def trained_confidence(x: Tensor, probability: Tensor, trained: TrainedConfidence | None, eps: float) -> Tensor:
    """The confidence of heads that were trained to have one: ``[M]`` float32.

    Args:
        x: ``[M, K]``, the head's input.
        probability: ``[M]`` float32, the top-1 probability of each row; without a trained confidence the result.
        trained: what the confidence is made of.
        eps: of the head's norm.
    """
    if trained is None:
        return probability
    wide, (scale, bias) = x.float(), trained.scale_bias
    seen = (wide @ trained.weight) * torch.rsqrt(wide.square().mean(dim=-1) + eps)
    return torch.sigmoid(scale * torch.logit(probability, LEAST_DOUBT) + seen + bias)


def token_of(row: Tensor, vocabulary: DraftVocabulary | None) -> Tensor:
    """The token of each of the head's rows ``[M]`` int64: the row's own number, unless a vocabulary names another."""
    return row if vocabulary is None else vocabulary.tokens_of(row)


def finish_step(
    found: Top1,
    threshold: float | Tensor | None,
    sure: Tensor | None,
    embedding: Tensor | None,
    embedded: Tensor | None,
    out: Top1 | None,
) -> Top1:
    """Finish a drafting step with what the head found: set the flag, fetch the embedding, fill ``out``."""
    if threshold is not None:
        assert sure is not None
        sure.copy_(found.confidence >= threshold)  # a NaN is unsure
    if embedding is not None:
        assert embedded is not None
        torch.index_select(embedding, 0, found.token, out=embedded)
    return found if out is None else Top1(out.token.copy_(found.token), out.confidence.copy_(found.confidence))


def top1_head(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    *,
    eps: float,
    vocabulary: DraftVocabulary | None = None,
    trained: TrainedConfidence | None = None,
    threshold: float | Tensor | None = None,
    active: Tensor | None = None,
    sure: Tensor | None = None,
    embedding: Tensor | None = None,
    embedded: Tensor | None = None,
    out: Top1 | None = None,
) -> Top1:
    """The most likely token of each row and how sure the head is of it.

    Args:
        x: ``[M, K]`` hidden states before the final norm.
        norm_weight: ``[K]``, same dtype.
        weight: ``[V, K]``, or ``[R, K]`` with a vocabulary of R tokens.
        eps: of the norm.
        vocabulary: the tokens of the weight's rows, where these are not all; the confidence is that among them.
        trained: takes the place of the softmax's probability as the confidence, also beside the threshold.
        threshold: for a drafting step, M = 1: ``sure`` says whether the confidence reaches it; a number, or ``[1]``
            float32 for captured work that serves every threshold.
        active: ``[1]`` int32; where it is 0 nothing is done, and the result is whatever ``out`` holds.
        sure: ``[1]`` int32, becomes 1 or 0; None means ``active`` itself, which becomes 0 below the threshold.
        embedding: ``[V, K]``, same dtype: its rows for the tokens are copied to ``embedded``, for the next step.
        embedded: ``[M, K]``.
        out: made if None.
    """
    if active is not None and not active:
        return Top1.empty(len(x), x.device) if out is None else out
    logits = lm_head(x, norm_weight, weight, eps=eps)
    confidence = trained_confidence(x, confidence_of(logits), trained, eps)
    found = Top1(token_of(logits.argmax(dim=-1), vocabulary), confidence)
    return finish_step(found, threshold, active if sure is None else sure, embedding, embedded, out)
