"""What a kernel's launcher and its reference check alike: values of numbers; shapes, dtypes and devices of tensors."""

from collections.abc import Sequence
from numbers import Integral
from typing import TypeGuard

import torch
from torch import Tensor

from kangaroo_kernels.contract import (
    CANDIDATES,
    MAX_CHILDREN,
    MAX_ROWS,
    RECORD_HEAD,
    DraftVocabulary,
    Experience,
    Hint,
    Match,
    Ranked,
    Tree,
    Walk,
    Weighed,
)

SEEDS = 1 << 64
COUNTS = 1 << 63
"""Above every position and length: they are kept in 64 bits, one of them the sign."""

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number, Python's or NumPy's; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_one(op: str, name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a number in device memory is one element of ``dtype`` on ``device``."""
    if value.dtype != dtype or value.numel() != 1 or value.device != device:
        raise TypeError(
            f"{op}: {name} is {list(value.shape)} {value.dtype} on {value.device}; "
            f"it must be [1] {dtype} on {device}, or a number where the host knows it."
        )


def check_count(op: str, name: str, value: int | Tensor, device: torch.device) -> None:
    """Raise unless a position or length is a whole number from 0 on, or ``[1]`` int64 on ``device``."""
    if isinstance(value, Tensor):
        check_one(op, name, value, torch.int64, device)
    elif not is_whole(value) or not 0 <= value < COUNTS:
        raise ValueError(f"{op}: {name} is {value!r}; it must be a whole number from 0 to 2^63 - 1, or [1] int64.")


def check_sampling(
    op: str,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    seed: int | Tensor,
    device: torch.device,
) -> None:
    """Raise for numbers that no token can be drawn with.

    The temperature is kept as a float32. If it were infinite there, -inf / inf would make a NaN of the scores beyond
    the end of the vocabulary, and a NaN wins.
    """
    if isinstance(temperature, Tensor):
        check_one(op, "temperature", temperature, torch.float32, device)
    elif not SMALLEST <= temperature <= LARGEST:
        raise ValueError(f"{op}: temperature is {temperature!r}; it must be above 0 and finite, as a float32.")
    if isinstance(top_k, Tensor):
        check_one(op, "top_k", top_k, torch.int64, device)
    elif top_k is not None and not (is_whole(top_k) and top_k >= 1):
        raise ValueError(f"{op}: top_k is {top_k!r}; it must be a whole number of at least 1, or None to keep all.")
    if isinstance(top_p, Tensor):
        check_one(op, "top_p", top_p, torch.float32, device)
    elif top_p is not None and not top_p > 0:
        raise ValueError(f"{op}: top_p is {top_p!r}; it must be above 0, or None to keep all.")
    if isinstance(seed, Tensor):
        check_one(op, "seed", seed, torch.int64, device)
    elif not is_whole(seed) or not 0 <= seed < SEEDS:
        raise ValueError(f"{op}: seed is {seed!r}; it must be a whole number from 0 to 2^64 - 1, or [1] int64.")


def check_tensor(
    op: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless ``tensor`` has this shape (at least a dimension), dtype and device, and contiguous rows."""
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    if not fits or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        stride = f", last stride {tensor.stride(-1)}" if tensor.ndim else ""
        raise ValueError(
            f"{op}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}{stride}; "
            f"it must be {list(shape)} {dtype} on {device}, last stride 1."
        )


def check_max_length(max_length: int | None, position: int | Tensor, rows: int) -> None:
    """Raise for a bound below where the rows end, as far as the host knows the position."""
    least = 1 if isinstance(position, Tensor) else position + rows
    if max_length is not None and max_length < least:
        raise ValueError(
            f"attention: max_length is {max_length}; it bounds position + M, so it must be at least {least}."
        )


def check_ancestors(op: str, ancestors: Tensor | None, rows: int, device: torch.device) -> None:
    """Raise unless the rows of a tree have a mask each, or there is none, as the rows are a chain."""
    if ancestors is not None:
        check_tensor(op, "ancestors", ancestors, (rows,), torch.int32, device)
        if rows > MAX_ROWS:
            raise ValueError(f"{op}: a tree has {rows} rows; its masks hold at most {MAX_ROWS}.")


def check_accept(
    draft: Tensor,
    target: Tensor,
    stop_tokens: Tensor,
    length: int | Tensor,
    limit: int | Tensor,
    confidence: Tensor | None,
    drafted: int | Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise where the arguments of ``accept`` do not fit each other."""
    device = draft.device
    for name, tokens in (("draft", draft), ("target", target), ("stop_tokens", stop_tokens)):
        is_row = tokens.ndim == 1 and tokens.is_contiguous()
        if not is_row or tokens.dtype != torch.int64 or tokens.device != device:
            raise TypeError(
                f"accept: {name} is {list(tokens.shape)} {tokens.dtype} on {tokens.device}; it must be one contiguous "
                f"row of int64 on {device}."
            )
    most = len(draft)
    if len(target) != most + 1:
        raise ValueError(f"accept: draft is [{most}], target [{len(target)}]; they must be [R] and [R + 1].")
    check_count("accept", "length", length, device)
    check_count("accept", "limit", limit, device)
    if not isinstance(length, Tensor) and not isinstance(limit, Tensor) and limit < length:
        raise ValueError(f"accept: limit is {limit}; it must not be below the length, {length}.")
    if confidence is not None:
        check_tensor("accept", "confidence", confidence, (most + 1,), torch.float32, device)
    if isinstance(drafted, Tensor):
        is_row = drafted.numel() <= max(1, most) and drafted.is_contiguous()
        if not is_row or drafted.dtype not in (torch.int32, torch.int64) or drafted.device != device:
            raise TypeError(
                f"accept: drafted is {list(drafted.shape)} {drafted.dtype} on {drafted.device}; it must be a count or "
                f"at most {most} contiguous flags, int32 or int64 on {device}."
            )
    elif drafted is not None and not (is_whole(drafted) and 0 <= drafted <= most):
        raise ValueError(f"accept: drafted is {drafted!r}; it must be a whole number from 0 to {most}.")
    if out is not None:
        check_tensor("accept", "out", out, (3,), torch.int64, device)


def check_rank(
    logits: Tensor,
    count: int,
    position: int | Tensor,
    temperature: float | Tensor | None,
    seed: int | Tensor,
    ancestors: Tensor | None,
    vocabulary: DraftVocabulary | None,
    out: Ranked | None,
) -> None:
    """Raise where the arguments of ``rank`` do not fit each other."""
    device, rows = logits.device, len(logits)
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(
            f"rank: logits is {list(logits.shape)} {logits.dtype}, strides {logits.stride()}; it must be [M, V], "
            "contiguous float32."
        )
    if not is_whole(count) or not 1 <= count <= logits.shape[1]:
        raise ValueError(f"rank: count is {count!r}; it must be a whole number from 1 to {logits.shape[1]}.")
    if vocabulary is not None:
        check_tensor("rank", "the vocabulary", vocabulary.tokens, logits.shape[1:], torch.int32, device)
    check_ancestors("rank", ancestors, rows, device)
    check_count("rank", "position", position, device)
    check_sampling("rank", 1.0 if temperature is None else temperature, None, None, seed, device)
    if out is not None:
        check_tensor("rank", "tokens", out.tokens, (rows, count), torch.int64, device)
        check_tensor("rank", "confidences", out.confidences, (rows, count), torch.float32, device)


def check_grow(
    tree: Tree,
    ranked: Ranked,
    first: int,
    count: int,
    threshold: Tensor,
    hint: Hint | None,
    active: Tensor | None,
    flags: Tensor | None,
    following: Tensor | None,
) -> None:
    """Raise where the arguments of ``grow`` do not fit each other."""
    device, rows, size = ranked.tokens.device, tree.tokens.numel(), tuple(ranked.tokens.shape)
    if len(size) != 2 or not size[0] or not 1 <= size[1] <= MAX_CHILDREN:
        raise ValueError(f"grow: ranked has {list(size)} tokens; it must have 1 to {MAX_CHILDREN} a row.")
    check_tensor("grow", "the ranked tokens", ranked.tokens, size, torch.int64, device)
    check_tensor("grow", "the ranked confidences", ranked.confidences, size, torch.float32, device)
    whole = is_whole(first) and is_whole(count) and first >= 0 and 1 <= count <= MAX_CHILDREN
    if not whole or rows > MAX_ROWS or first + size[0] + count > rows:
        raise ValueError(
            f"grow: {size[0]} rows from {first!r} on and {count!r} new ones; they must fit into the tree's {rows}, "
            f"which are at most {MAX_ROWS}, and there are 1 to {MAX_CHILDREN} new ones at once."
        )
    numbers = {"tokens": torch.int64, "ancestors": torch.int32, "said": torch.int64, "offered": torch.int64}
    for name, tensor in tree._asdict().items():
        shape = (rows, CANDIDATES) if name in ("offers", "chances", "offered") else (rows,)
        check_tensor("grow", f"the tree's {name}", tensor, shape, numbers.get(name, torch.float32), device)
    check_tensor("grow", "threshold", threshold, (1,), torch.float32, device)
    if hint is not None:
        check_tensor("grow", "the hint's tokens", hint.tokens, (hint.tokens.numel(),), torch.int64, device)
        check_tensor("grow", "matched", hint.matched, (1,), torch.int64, device)
        check_tensor("grow", "sure", hint.sure, (1,), torch.float32, device)
        if hint.tokens.numel() < rows - 1:
            raise ValueError(
                f"grow: the hint has {hint.tokens.numel()} tokens; a tree of {rows} rows needs {rows - 1}."
            )
    for name, flag, length in (("active", active, 1), ("flags", flags, count), ("following", following, 1)):
        if flag is not None:
            check_tensor("grow", name, flag, (length,), torch.int32, device)


def check_walk(
    draft: Tensor,
    target: Tensor,
    ancestors: Tensor,
    stop_tokens: Tensor,
    length: int | Tensor,
    limit: int | Tensor,
    confidence: Tensor | None,
    out: Walk | None,
) -> None:
    """Raise where the arguments of ``walk`` do not fit each other."""
    device, rows = draft.device, draft.numel() + 1
    tokens = {"draft": (draft, rows - 1), "target": (target, rows), "stop_tokens": (stop_tokens, stop_tokens.numel())}
    results = (
        {} if out is None else {"decision": (out.decision, 3), "path": (out.path, rows), "tokens": (out.tokens, rows)}
    )
    for name, (tensor, size) in (tokens | results).items():
        check_tensor("walk", name, tensor, (size,), torch.int64, device)
    check_ancestors("walk", ancestors, rows, device)
    check_count("walk", "length", length, device)
    check_count("walk", "limit", limit, device)
    if not isinstance(length, Tensor) and not isinstance(limit, Tensor) and limit < length:
        raise ValueError(f"walk: limit is {limit}; it must not be below the length, {length}.")
    if confidence is not None:
        check_tensor("walk", "confidence", confidence, (rows,), torch.float32, device)


def check_straighten(path: Tensor, position: int | Tensor, store: Tensor) -> None:
    """Raise where the arguments of ``straighten`` do not fit each other."""
    check_tensor("straighten", "path", path, (path.numel(),), torch.int64, store.device)
    check_count("straighten", "position", position, store.device)
    if store.ndim != 3 or (store.stride(2) != 1 and store.shape[2] > 1) or len(path) > MAX_ROWS:
        raise ValueError(
            f"straighten: the path is [{len(path)}], the store {list(store.shape)} with strides {store.stride()}; they "
            f"must be a path of at most {MAX_ROWS} rows and [B, T, K], the last stride 1."
        )
    if not isinstance(position, Tensor) and position + len(path) > store.shape[1]:
        raise ValueError(
            f"straighten: position {position} with {len(path)} rows is outside of the {store.shape[1]} of the store."
        )


def check_look_up(
    text: Tensor,
    length: int | Tensor,
    most: int,
    least: int,
    flags: Tensor | None,
    arrivals: Tensor | None,
    out: Match | None,
) -> None:
    """Raise where the arguments of ``look_up`` do not fit each other."""
    device = text.device
    check_tensor("look_up", "text", text, (max(1, text.numel()),), torch.int64, device)
    check_count("look_up", "length", length, device)
    if not isinstance(length, Tensor) and not 1 <= length <= len(text):
        raise ValueError(f"look_up: length is {length}; it must be from 1 to the text's room, {len(text)}.")
    for name, value, low in (("most", most, 0), ("least", least, 1)):
        if not is_whole(value) or not low <= value < MAX_ROWS:
            raise ValueError(f"look_up: {name} is {value!r}; it must be a whole number from {low} to {MAX_ROWS - 1}.")
    if flags is not None and flags.numel() <= most:
        raise ValueError(f"look_up: flags is {list(flags.shape)}; {most} drafts have [{most + 1}] of them or more.")
    numbers = {"flags": (flags, torch.int32), "arrivals": (arrivals, torch.int64)}
    for name, (tensor, dtype) in numbers.items():
        if tensor is not None:
            check_tensor("look_up", name, tensor, (2 if name == "arrivals" else tensor.numel(),), dtype, device)
    if out is not None:
        check_tensor("look_up", "tokens", out.tokens, (most,), torch.int64, device)
        check_tensor("look_up", "matched", out.matched, (1,), torch.int64, device)


def check_weigh(
    matched: Tensor,
    thresholds: Tensor,
    length: int | Tensor,
    limit: int | Tensor,
    experience: Experience,
    flags: Tensor | None,
    out: Weighed | None,
) -> None:
    """Raise where the arguments of ``weigh`` do not fit each other."""
    device, most, kinds = matched.device, thresholds.numel(), experience.kinds.numel()
    check_tensor("weigh", "matched", matched, (1,), torch.int64, device)
    check_tensor("weigh", "thresholds", thresholds, (most,), torch.float32, device)
    check_count("weigh", "length", length, device)
    check_count("weigh", "limit", limit, device)
    for name, tensor in experience._asdict().items():
        size = {"beside": 1, "latest": 3}.get(name, kinds)
        dtype = torch.int64 if name in ("kinds", "latest") else torch.float64
        check_tensor("weigh", name, tensor, (size,), dtype, device)
    if most >= MAX_ROWS or kinds > MAX_ROWS:
        raise ValueError(
            f"weigh takes fewer than {MAX_ROWS} drafts and at most {MAX_ROWS} kinds, got {most} and {kinds}."
        )
    if flags is not None:
        check_tensor("weigh", "flags", flags, (max(1, flags.numel()),), torch.int32, device)
    if out is not None:
        check_tensor("weigh", "made", out.made, (most,), torch.int32, device)
        check_tensor("weigh", "sure", out.sure, (most,), torch.float32, device)


def check_commit_counts(
    decision: Tensor,
    target: Tensor,
    text: Tensor,
    length: Tensor,
    limit: Tensor,
    positions: Tensor,
    flags: Tensor,
    record: Tensor,
) -> None:
    """Raise where the integer tensors of ``commit`` do not fit each other."""
    device, rows = target.device, max(1, target.numel())
    numbers = {
        "target": (target, rows),
        "decision": (decision, 3),
        "text": (text, text.numel()),
        "length": (length, 1),
        "limit": (limit, 1),
        "positions": (positions, positions.numel()),
        "record": (record, RECORD_HEAD + rows),
    }
    for name, (tensor, size) in numbers.items():
        check_tensor("commit", name, tensor, (size,), torch.int64, device)
    check_tensor("commit", "flags", flags, (rows,), torch.int32, device)


def check_commit_states(target: Tensor, exit_hidden: Tensor, embedding: Tensor, newest: Tensor) -> None:
    """Raise where the hidden states that ``commit`` copies do not fit each other, or the rows of ``target``."""
    rows, hidden = max(1, target.numel()), exit_hidden.shape[-1:]
    states = {
        "exit_hidden": (exit_hidden, (rows + 1, *hidden)),
        "embedding": (embedding, (*embedding.shape[:1], *hidden)),
        "newest": (newest, (1, *hidden)),
    }
    for name, (tensor, shape) in states.items():
        check_tensor("commit", name, tensor, shape, exit_hidden.dtype, target.device)
