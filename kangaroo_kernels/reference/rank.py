"""``rank``: the likeliest tokens behind each row, for a tree of drafts, from logits that a head has written.

    scores = logits, or filter(logits / T) + noise;  tokens = top C of scores;  confidences = softmax(scores)[tokens]

Drafter and target share the noise of a position. So where tokens are sampled, the noisy scores rank what the target may
choose, and their softmax says how sure that is. Bytes moved: the logits, twice.
"""

import torch
from torch import Tensor

from kangaroo_kernels.contract import TARGET_STREAM, DraftVocabulary, Ranked
from kangaroo_kernels.reference.ancestors import depths
from kangaroo_kernels.reference.noise import gumbel_rows
from kangaroo_kernels.reference.sample_head import filter_logits
from kangaroo_kernels.shared.checks import SEEDS, check_rank


def rank(
    logits: Tensor,
    count: int,
    position: int | Tensor,
    *,
    temperature: float | Tensor | None = None,
    seed: int | Tensor = 0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    vocabulary: DraftVocabulary | None = None,
    ancestors: Tensor | None = None,
    active: Tensor | None = None,
    out: Ranked | None = None,
) -> Ranked:
    """Name the ``count`` best tokens behind each row, the best first.

    Args:
        logits: ``[M, V]`` float32, or ``[M, R]`` with a vocabulary of R tokens; contiguous.
        count: C, at least 1 and at most V.
        position: as for ``sample_head``.
        temperature: as for ``sample_head``; None is greedy, without noise and filters.
        seed, top_k, top_p, vocabulary: as for ``sample_head``; the noise is that of the target's stream.
        ancestors: ``[M]`` int32, for rows of a tree (``reference/ancestors.py``), of which ``position`` is where the
            token behind the root stands. None means rows of a chain.
        active: ``[1]`` int32; where it is 0 nothing is done, and the result is whatever ``out`` holds.
        out: made if None.

    Returns:
        Tokens and their confidences, ``[M, C]`` each. Confidences of a row that holds a NaN are NaN.

    Raises:
        ValueError: shapes or numbers that do not fit each other.
        TypeError: a tensor that takes a number's place and has another dtype or device.
    """
    check_rank(logits, count, position, temperature, seed, ancestors, vocabulary, out)
    if out is None:
        out = Ranked.empty(len(logits), count, logits.device)
    if active is not None and not active:
        return out
    scores = logits
    if temperature is not None:
        places = torch.arange(len(logits), device=logits.device) if ancestors is None else depths(ancestors)
        size = logits.shape[1] if vocabulary is None else vocabulary.size
        first, seed = int(position), int(seed) % SEEDS
        noise = gumbel_rows(seed, TARGET_STREAM, first, int(places.max()) + 1, size, logits.device)[places]
        noise = noise if vocabulary is None else noise.index_select(1, vocabulary.tokens)
        scores = filter_logits(logits, temperature, top_k, top_p) + noise
    best, rows = torch.softmax(scores, dim=-1).topk(count)
    out.tokens.copy_(rows if vocabulary is None else vocabulary.tokens_of(rows))
    out.confidences.copy_(best)
    return out
