"""``sample_head``: RMSNorm, LM head, and a sample by Gumbel-max, ``argmax(filter(logits / T) + noise)``.

Top-k and top-p (Holtzman et al., arXiv 1904.09751) act on the tempered distribution, top-k first, as in transformers.
Bytes moved: the head, ``V * K`` elements, once.
"""

import torch
from torch import Tensor

from kangaroo_kernels.contract import TARGET_STREAM, DraftVocabulary, Top1, TrainedConfidence
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.reference.ancestors import depths
from kangaroo_kernels.reference.noise import gumbel_rows
from kangaroo_kernels.reference.top1_head import confidence_of, finish_step, lm_head, token_of, trained_confidence
from kangaroo_kernels.shared.checks import SEEDS, check_ancestors, check_count, check_sampling


def filter_logits(
    logits: Tensor, temperature: float | Tensor, top_k: int | Tensor | None, top_p: float | Tensor | None
) -> Tensor:
    """``logits / temperature`` with -inf outside of the top-k and top-p sets: ``[M, V]`` float32, a new tensor.

    Top-k keeps every token that ties with the k-th. Top-p keeps the fewest most likely tokens whose probabilities
    reach ``top_p``, at least one, and every token that ties with the last of them.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = torch.topk(logits, int(top_k), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1.0:
        descending = torch.sort(logits, dim=-1, descending=True).values
        probabilities = torch.softmax(descending, dim=-1)
        kept = (probabilities.cumsum(dim=-1) - probabilities < top_p).sum(dim=-1, keepdim=True).clamp_(min=1)
        logits = logits.masked_fill(logits < descending.gather(-1, kept - 1), float("-inf"))
    return logits


def sample_head(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    position: int | Tensor,
    *,
    eps: float,
    temperature: float | Tensor,
    seed: int | Tensor,
    stream: int = TARGET_STREAM,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    vocabulary: DraftVocabulary | None = None,
    trained: TrainedConfidence | None = None,
    ancestors: Tensor | None = None,
    threshold: float | Tensor | None = None,
    active: Tensor | None = None,
    sure: Tensor | None = None,
    embedding: Tensor | None = None,
    embedded: Tensor | None = None,
    out: Top1 | None = None,
) -> Top1:
    """Sample a token for each row; the confidence is that of the un-tempered, unfiltered distribution.

    Args:
        x: ``[M, K]`` hidden states before the final norm.
        norm_weight: ``[K]``, same dtype.
        weight: ``[V, K]``, or ``[R, K]`` with a vocabulary of R tokens.
        position: of the first row's new token; a tensor ``[1]`` int64 for a kernel that must not ask the host.
        eps: of the norm.
        temperature: above 0, finite.
        seed: of the noise, from 0 to 2^64 - 1; as a tensor, ``[1]`` int64 of the same bits.
        stream: of the noise; ``contract`` names the three in use.
        top_k: keep this many tokens, at least 1; None keeps all.
        top_p: keep this share of the probability, above 0; None keeps all.
            Temperature, top-k and top-p may also be ``[1]`` float32, int64 and float32 on the device; a captured graph
            then serves all values.
        vocabulary: as for ``top1_head``. A token has the noise that it has in the whole vocabulary; top-k and top-p
            choose among the weight's rows.
        ancestors: ``[M]`` int32, for rows that are a whole tree (``reference/ancestors.py``), the root first: siblings
            are followed by tokens at one position, which share its noise.
        trained, threshold, active, sure, embedding, embedded, out: as for ``top1_head``.

    Raises:
        ValueError: a number out of these bounds; numbers that lie on the device are not checked.
        TypeError: a tensor that takes a number's place and has another dtype or device.
    """
    check_count("sample_head", "position", position, x.device)
    check_sampling("sample_head", temperature, top_k, top_p, seed, x.device)
    check_ancestors("sample_head", ancestors, len(x), x.device)
    if active is not None and not active:
        return Top1.empty(len(x), x.device) if out is None else out
    logits = lm_head(x, norm_weight, weight, eps=eps)
    size = logits.shape[1] if vocabulary is None else vocabulary.size
    noise = gumbel_rows(int(seed) % SEEDS, stream, int(position), logits.shape[0], size, logits.device)
    if ancestors is not None:
        noise = noise[depths(ancestors)]
    if vocabulary is not None:
        noise = noise.index_select(1, vocabulary.tokens)
    row = filter_logits(logits, temperature, top_k, top_p).add_(noise).argmax(dim=-1)
    verdict = active if sure is None else sure
    found = Top1(token_of(row, vocabulary), trained_confidence(x, confidence_of(logits), trained, eps))
    return finish_step(found, threshold, verdict, embedding, embedded, out)
