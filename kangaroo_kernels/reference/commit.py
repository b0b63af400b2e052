"""``commit``: apply what ``accept`` decided to the text and to everything that begins the next iteration.

    text[length : reached] = target[: reached - length];  length = reached
    positions = reached - 2, reached - 1, ...;  exit_hidden[0] = exit_hidden[reached - length]
    newest = embedding[the last committed token];  flags = 1, 0, 0, ... while the text may grow, else all 0

Nothing in a cache is copied: what lies beyond the new length is overwritten before it is read (rollback by length).
Bytes moved: three rows of the hidden size.
"""

from torch import Tensor

from kangaroo_kernels.contract import Record
from kangaroo_kernels.shared.checks import check_commit_counts, check_commit_states


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
    """Commit one iteration of at most R drafts, in place.

    Args:
        decision: ``[3]`` int64 from ``accept``: drafts agreed, new length, stopped.
        target: ``[R + 1]`` int64, the target's tokens.
        text: ``[capacity]`` int64; the committed tokens are appended, the kernel leaves out those beyond the capacity.
        length: ``[1]`` int64, of the text; moved to the new length.
        limit: ``[1]`` int64; lowered to the new length by a stop token, so that later iterations commit nothing.
        positions: ``[P]`` int64; becomes ``length - 2, length - 1, ...``.
        flags: ``[R + 1]`` int32; how far drafting went, made ready for the next iteration.
        exit_hidden: ``[R + 2, K]``; row 0 becomes that of the position before the newest token.
        embedding: ``[V, K]``.
        newest: ``[1, K]``; becomes the embedding of the last committed token.
        record: ``[RECORD_HEAD + R + 1]`` int64: a ``Record``, then the target's tokens.

    Raises:
        ValueError: a tensor of another shape, dtype or device, or with rows that are not contiguous.
    """
    check_commit_counts(decision, target, text, length, limit, positions, flags, record)
    check_commit_states(target, exit_hidden, embedding, newest)
    agreed, reached, stopped = decision.tolist()
    before, most = int(length), len(target) - 1
    count = reached - before
    drafted = int(flags[:most].sum())
    head = Record(before, reached, agreed, drafted, stopped)
    record.copy_(record.new_tensor([*head, *target.tolist()]))
    text[before:reached] = target[:count]
    length.fill_(reached)
    if stopped:
        limit.fill_(reached)
    positions.copy_(positions.new_tensor(range(reached - 2, reached - 2 + len(positions))))
    flags.zero_()
    flags[0] = reached < int(limit)
    if count > 0:
        exit_hidden[0] = exit_hidden[count]
        newest[0] = embedding[target[count - 1]]
