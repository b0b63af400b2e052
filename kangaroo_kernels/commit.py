"""``commit`` in Triton: update the text, the lengths and the rows that begin the next iteration, all on the device.

One program does all of it: it reads the old length before it writes the new one. Bytes moved: three rows of the
hidden size.
"""

import triton
import triton.language as tl
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS, RECORD_HEAD, Record
from kangaroo_kernels.shared.cache_keys import stable_key
from kangaroo_kernels.shared.chain import follow
from kangaroo_kernels.shared.checks import check_commit_counts, check_commit_states
from kangaroo_kernels.shared.launch import launch_options, require_interpreter
from kangaroo_kernels.shared.tiles import CHUNK

BLOCK = 2 * MAX_ROWS
BEFORE, REACHED, AGREED, DRAFTED, STOPPED = map(tl.constexpr, Record(*range(RECORD_HEAD)))
"""Where each word of a ``Record`` lies."""


@triton.jit
def copy_row(source_ptr, target_ptr, K):
    """``target[:] = source[:]``, K elements."""
    for first in range(0, K, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        tl.store(target_ptr + offs, tl.load(source_ptr + offs, mask=offs < K), mask=offs < K)


@stable_key
@triton.jit(do_not_specialize=["R", "CAPACITY", "POSITIONS"])
def commit_kernel(
    decision_ptr,  # [3] int64
    target_ptr,  # [R + 1] int64
    text_ptr,  # [capacity] int64
    length_ptr,  # [1] int64
    limit_ptr,  # [1] int64
    positions_ptr,  # [POSITIONS] int64
    flags_ptr,  # [R + 1] int32
    exit_hidden_ptr,  # [R + 2, K]
    embedding_ptr,  # [V, K]
    newest_ptr,  # [1, K]
    record_ptr,  # [RECORD_HEAD + R + 1] int64
    R,
    CAPACITY,
    POSITIONS,
    K,
    exit_row_stride,
    embedding_row_stride,
    RECORD_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program commits the whole iteration."""
    follow(CHAINED)
    agreed, reached, stopped = tl.load(decision_ptr), tl.load(decision_ptr + 1), tl.load(decision_ptr + 2)
    before = tl.load(length_ptr)
    limit = tl.load(limit_ptr)
    count = reached - before
    offs = tl.arange(0, BLOCK)
    drafted = tl.sum(tl.load(flags_ptr + offs, mask=offs < R, other=0), axis=0)
    target = tl.load(target_ptr + offs, mask=offs <= R, other=0)
    last = tl.load(target_ptr + tl.maximum(count - 1, 0))
    tl.debug_barrier()  # everything is read before anything is written

    tl.store(text_ptr + before + offs, target, mask=(offs < count) & (before + offs < CAPACITY))
    tl.store(record_ptr + BEFORE, before)
    tl.store(record_ptr + REACHED, reached)
    tl.store(record_ptr + AGREED, agreed)
    tl.store(record_ptr + DRAFTED, drafted.to(tl.int64))
    tl.store(record_ptr + STOPPED, stopped)
    tl.store(record_ptr + RECORD_HEAD + offs, target, mask=offs <= R)
    tl.store(length_ptr, reached)
    limit = tl.where(stopped != 0, reached, limit)
    tl.store(limit_ptr, limit)
    tl.store(positions_ptr + offs, reached - 2 + offs, mask=offs < POSITIONS)
    tl.store(flags_ptr + offs, ((offs == 0) & (reached < limit)).to(tl.int32), mask=offs <= R)
    if count > 0:
        copy_row(exit_hidden_ptr + count * exit_row_stride, exit_hidden_ptr, K)
        copy_row(embedding_ptr + last * embedding_row_stride, newest_ptr, K)


def commit(
    decision: Tensor,
    target: Tensor,
    text: Tensor,
    length: Tensor,
    limit: Tensor,
    positions: Tensor,
    flags: Tensor,
    exit_hidden: Tensor,
    embedding: Tensor,
    newest: Tensor,
    record: Tensor,
) -> None:
    """Commit one iteration, in place; arguments as for ``reference.commit``."""
    require_interpreter("commit", target)
    check_commit_counts(decision, target, text, length, limit, positions, flags, record)
    check_commit_states(target, exit_hidden, embedding, newest)
    most = len(target) - 1
    if most >= MAX_ROWS or len(positions) > BLOCK:
        raise ValueError(
            f"commit takes fewer than {MAX_ROWS} drafts and at most {BLOCK} positions, got {most} and "
            f"{len(positions)}; its reference takes any number."
        )
    commit_kernel[(1,)](
        decision,
        target,
        text,
        length,
        limit,
        positions,
        flags,
        exit_hidden,
        embedding,
        newest,
        record,
        most,
        len(text),
        len(positions),
        exit_hidden.shape[1],
        exit_hidden.stride(0),
        embedding.stride(0),
        RECORD_HEAD=RECORD_HEAD,
        BLOCK=BLOCK,
        num_warps=4,
        **launch_options(target),
    )
