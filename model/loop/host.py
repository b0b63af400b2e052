"""The decode loop led by the host: draft, verify, accept, commit (arXiv 2404.18911, algorithm 1), and plain decoding.

The host reads every draft. On a CPU this is faster, since every step that is left out saves time. A text whose tokens
are picked from whole rows of logits needs it (``Request.led_by_host``). ``device.py`` has the loop on the device.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..drafters.protocol import Draft, Drafter
from ..errors import KangarooError
from ..request import Request
from ..results import Commit
from ..sampling import Choice, Chooser
from ..spans import span
from ..target.cache import Branches, Place
from ..target.llama import Llama
from .pace import Done, Fixed, Limits, Pace
from .state import TextState, not_finite


def reach_of(length: int) -> int:
    """Positions that a text of ``length`` tokens may write: drafts beyond the limit still write their rows."""
    return length + MAX_SPECULATIVE_TOKENS + 1


def prefill(target: Llama, drafter: Drafter | None, text: TextState, length: int, kept: int = 0) -> None:
    """Fill all caches for every token but the last, and make room for a text of ``length`` tokens.

    The first ``kept`` tokens, at most all but two, are in the caches from the text before.
    """
    reach = reach_of(length)  # the same for any number of drafts, so that they all find the same memory
    text.cache.reserve(reach, length, kept)
    hidden = target.embed(text.tokens[kept:-1]) if len(text.tokens) > 1 else None
    first = 0 if drafter is None else drafter.first_layer
    if hidden is not None:
        hidden = target.run(hidden, text.cache, kept, 0, first)
        final = target.run(hidden, text.cache, kept, first, target.config.num_hidden_layers)
    if drafter is not None:
        text.final = None if hidden is None else final
        drafter.prefill(text, hidden, reach, length)


def chooser_of(target: Llama, text: TextState, request: Request) -> Chooser:
    """What picks the tokens of a text as its request wants them."""
    return Chooser(
        request.sampling,
        target.backend,
        shaping=request.shaping,
        text=text.tokens,
        logprobs=request.logprobs,
    )


def kangaroo_steps(
    target: Llama, drafter: Drafter, text: TextState, request: Request, pace: Pace | None = None
) -> Iterator[Commit]:
    """Steps of Kangaroo decoding until the text has ``request.length`` tokens or a stop token.

    ``pace`` says how long drafts may be; None takes the request's own limits.

    Raises:
        KangarooError: the target's logits are not finite.
    """
    chooser, accept = chooser_of(target, text, request), target.backend.accept
    stops = torch.tensor(sorted(request.stop_tokens), dtype=torch.int64, device=target.device)
    most, threshold = request.max_drafts, request.threshold
    pace = pace or Fixed(Limits(most, threshold))
    while (remaining := request.length - len(text.tokens)) > 0:
        room = remaining - 1
        at_hand = drafter.at_hand(text, min(most, room), threshold)
        limits = pace.limits(room, at_hand)
        draft = drafter.propose(text, chooser, *limits)
        check_draft(drafter, text, draft, limits.most)
        with span("kangaroo/verify"):
            wanted = verify(target, drafter.first_layer, text, chooser, draft)
        with span("kangaroo/accept"):
            before = len(text.tokens)
            drafts = draft.tokens[: len(wanted.token) - 1]
            if draft.parents is None or not len(drafts):
                decision = accept(drafts, wanted.token, stops, before, request.length, confidence=wanted.confidence)
            else:
                decision, wanted = walk(target, drafter, text, draft, wanted, (stops, before, request.length))
            agreed, reached, stopped = decision.tolist()
        if reached == before:
            raise not_finite(text, target.dtype)
        with span("kangaroo/commit"):
            committed = wanted.token[: reached - before].tolist()
            text.tokens += committed  # what lies beyond in the caches is overwritten before it is read
            drafter.commit(text, len(committed))
        pace.record(Done(len(draft.tokens), agreed, draft.confidences, at_hand=at_hand))
        yield Commit(
            committed,
            min(agreed, len(committed)),
            len(drafts),
            agreed,
            bool(stopped),
            chooser.logprobs(wanted, committed),
        )
        if stopped:
            return


def walk(
    target: Llama,
    drafter: Drafter,
    text: TextState,
    draft: Draft,
    wanted: Choice,
    bounds: tuple[Tensor, int, int],
) -> tuple[Tensor, Choice]:
    """The target's way through a tree, as if its rows had been a chain: the decision, and the target's tokens.

    ``bounds`` are the stop tokens, the length of the text and the most that it may have.
    """
    ancestors = torch.tensor(draft.masks, dtype=torch.int32, device=target.device)
    found = target.backend.walk(draft.tokens, wanted.token, ancestors, *bounds, confidence=wanted.confidence)
    target.backend.straighten(found.path, text.newest, text.cache.rows)
    drafter.straighten(text, found.path, text.newest)
    logits = None if wanted.logits is None else wanted.logits[found.path]
    return found.decision, Choice(found.tokens, wanted.confidence[found.path], logits)


def check_draft(drafter: Drafter, text: TextState, draft: Draft, most: int) -> None:
    """Raise unless a draft has the form that verification goes on from."""
    count, rows = len(draft.tokens), len(draft.hidden)
    if draft.parents is not None:
        parents, name = draft.parents, type(drafter).__name__
        fits = len(parents) == count == rows - 1 <= MAX_SPECULATIVE_TOKENS
        if not fits or not all(0 <= parent <= row for row, parent in enumerate(parents)):
            raise KangarooError(
                f"{name}.propose gave {count} tokens, {rows} rows and the parents {parents}; it may give up to "
                f"{MAX_SPECULATIVE_TOKENS} tokens, a row for the newest token and for each of them, and for each an "
                "earlier row that it follows."
            )
        longest = max(mask.bit_count() for mask in draft.masks) - 1
        if longest > most:
            raise KangarooError(f"{name}.propose gave a branch of {longest} tokens; it may give up to {most}.")
        if text.cache.dtype != draft.hidden.dtype:
            raise KangarooError(f"{name}.propose gave a tree; with kv_dtype='float16' it may give chains alone.")
    elif count > most or rows != count + 1:
        raise KangarooError(
            f"{type(drafter).__name__}.propose gave {count} tokens and {rows} rows; it may give up to {most} tokens, "
            "and must give a row for the newest token and for each of them."
        )


def verify(target: Llama, first_layer: int, text: TextState, chooser: Chooser, draft: Draft) -> Choice:
    """The target's tokens after the newest token and after every draft, k + 1 of them.

    Where a draft's values overflow the dtype, the rows beside it may not be finite either. The newest token then goes
    through alone, as in plain decoding, and there is one token.

    The layers below ``first_layer`` are not run again; the others and the LM head run over all positions at once.
    """
    config, ancestors = target.config, None
    where: Place = text.newest
    if draft.parents:
        ancestors = torch.tensor(draft.masks, dtype=torch.int32, device=target.device)
        where = Branches(text.newest, ancestors)
    text.final = target.run(draft.hidden, text.cache, where, first_layer, config.num_hidden_layers)
    head = text.final, target.head, text.newest + 1
    if chooser.sampling.rejects and ancestors is None:
        certain = one_hot(draft.tokens, config.vocab_size).float()
        distributions = certain if draft.distributions is None else draft.distributions
        choice = chooser.target_or_draft(*head, draft.tokens, distributions)
    else:
        choice = chooser.target(*head, drafted=draft.tokens.tolist(), ancestors=ancestors)
    if len(draft.tokens) and math.isnan(choice.confidence[0].item()):
        return verify(target, first_layer, text, chooser, Draft(draft.tokens[:0], draft.hidden[:1]))
    return choice


def plain_steps(target: Llama, text: TextState, request: Request) -> Iterator[Commit]:
    """Autoregressive decoding on the same operations, one token a step; raises as ``kangaroo_steps`` does."""
    layers, chooser = target.config.num_hidden_layers, chooser_of(target, text, request)
    for _ in range(request.length - len(text.tokens)):
        with span("kangaroo/verify"):
            newest = text.newest
            hidden = target.run(target.embed(text.tokens[-1:]), text.cache, newest, 0, layers)
            wanted = chooser.target(hidden, target.head, newest + 1)
            token = int(wanted.token)
        if math.isnan(wanted.confidence.item()):
            raise not_finite(text, target.dtype)
        text.tokens.append(token)
        stopped = token in request.stop_tokens
        logprobs = chooser.logprobs(wanted, [token])
        yield Commit([token], accepted=0, drafted=0, agreed=0, stopped=stopped, logprobs=logprobs)
        if stopped:
            return
