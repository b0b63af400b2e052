"""``draft_loop``: the whole drafting loop, until the drafter is unsure (Kangaroo, arXiv 2404.18911, section 3.2).

    for j = 0 .. R:  exit_hidden[j + 1] = the shallow layers on the newest token, which append to their caches
                     stop where j drafts exist and j = R or the last of them was unsure
                     the adapter over that row (over two rows where j = 0, for it may lag by one), then the head:
                     token j, its confidence, whether that reaches the threshold; its embedding is the newest token's

Bytes moved for each draft: the weights of the shallow layers, of the adapter and of the head, once, and their caches.
"""

from typing import Any

from torch import Tensor

from kangaroo_kernels.contract import TARGET_STREAM, DraftModel, Layer, Top1
from kangaroo_kernels.reference.attention import attention
from kangaroo_kernels.reference.gate_up import gate_up
from kangaroo_kernels.reference.linear_residual import linear_residual
from kangaroo_kernels.reference.qkv_rope import qkv_rope
from kangaroo_kernels.reference.sample_head import sample_head
from kangaroo_kernels.reference.top1_head import top1_head
from kangaroo_kernels.shared.checks import check_sampling


def run_layer(layer: Layer, hidden: Tensor, position: int) -> Tensor:
    """A layer on M rows at ``position, ...``; appends to its caches."""
    block, mlp = layer
    caches = block.k_cache, block.v_cache
    q = qkv_rope(hidden, block.norm, block.qkv, block.table, *caches, position, eps=block.eps)
    hidden = linear_residual(attention(q, *caches, position, scale=block.scale), block.output, hidden)
    if mlp is None:
        return hidden
    return linear_residual(gate_up(hidden, mlp.norm, mlp.gate_up, eps=block.eps), mlp.down, hidden)


def draft_loop(
    model: DraftModel,
    flags: Tensor,
    positions: Tensor,
    newest: Tensor,
    exit_hidden: Tensor,
    *,
    threshold: float | Tensor,
    temperature: float | Tensor | None = None,
    seed: int | Tensor = 0,
    stream: int = TARGET_STREAM,
    prepared: Any = None,
    out: Top1 | None = None,
) -> Top1:
    """Draft up to R tokens, in place.

    Args:
        model: the drafter and its caches, which grow by one position per row.
        flags: ``[R + 1]`` int32; ``flags[0]`` 0 means that there is nothing to do, and nothing is written.
            ``flags[j + 1]`` becomes 1 where draft j is sure, 0 where it is not; those after it stay as they were.
        positions: ``[>= 1]`` int64, the position before the newest token first; only that one is read.
        newest: ``[1, K]``, the newest token's embedding; at the end that of the last draft.
        exit_hidden: ``[R + 2, K]``; row 0, of the position before the newest token, is read, row ``j + 1`` is written
            for the newest token (j = 0) and every draft. Where the first position is -1, row 0 is masked.
        threshold: a confidence below it, or NaN, is unsure and ends the drafting; a number or ``[1]`` float32.
        temperature: of a sample, a number or ``[1]`` float32; None takes the most likely token. There are no filters:
            the kernel never has the whole row of logits that they need.
        seed, stream: as for ``sample_head``; without a temperature they have no effect.
        prepared: what the kernel's ``prepare_draft_loop`` made of ``model``; None prepares it on the spot.
        out: ``Top1([R], [R])``, made if None; entries after the last draft stay as they were.
    """
    most, device = len(flags) - 1, newest.device
    out = Top1.empty(most, device) if out is None else out
    if temperature is not None:
        check_sampling("draft_loop", temperature, None, None, seed, device)
    if not flags[0]:
        return out
    newest_position = int(positions[0]) + 1
    for drafted in range(most + 1):
        position = newest_position + drafted
        hidden = newest
        for layer in model.layers:
            hidden = run_layer(layer, hidden, position)
        exit_hidden[drafted + 1] = hidden[0]
        if drafted == most or not flags[drafted]:
            break
        lag = 1 if drafted == 0 and position > 0 else 0
        rows = exit_hidden[drafted + 1 - lag : drafted + 2]
        hidden = run_layer(model.adapter, rows, position - lag)[-1:]
        settings: dict[str, Any] = {
            "eps": model.eps,
            "vocabulary": model.vocabulary,
            "threshold": threshold,
            "sure": flags[drafted + 1 : drafted + 2],
            "embedding": model.embedding,
            "embedded": newest,
            "out": Top1(out.token[drafted : drafted + 1], out.confidence[drafted : drafted + 1]),
        }
        if temperature is None:
            top1_head(hidden, model.norm, model.head, **settings)
        else:
            settings |= {"temperature": temperature, "seed": seed, "stream": stream}
            sample_head(hidden, model.norm, model.head, position + 1, **settings)
    return out
