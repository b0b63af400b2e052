"""The decode loop led by the host: draft, verify, accept, commit (arXiv 2404.18911, algorithm 1), and plain decoding.

The host reads every draft. On a CPU this is faster, since every step that is left out saves time. A text whose tokens
are picked from whole rows of logits needs it (``Request.led_by_host``). ``device.py`` has the loop on the device.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..drafters.protocol import Draft, Drafter, check_draft
from ..request import Request
from ..results import Commit
from ..sampling import Choice, Chooser
from ..spans import span
from ..target.cache import Branches, Place
from ..target.llama import Llama
from .pace import Done, Pace
from .state import TextState, not_finite


def chooser_of(target: Llama, text: TextState, request: Request) -> Chooser:
    """What picks the tokens of a text as its request wants them."""
    return Chooser(
        request.sampling,
        target.backend,
        shaping=request.shaping,
        text=text.tokens,
        logprobs=request.logprobs,
    )


def kangaroo_steps(target: Llama, drafter: Drafter, text: TextState, request: Request, pace: Pace) -> Iterator[Commit]:
    """Steps of Kangaroo decoding until the text has ``request.length`` tokens or a stop token.

    ``pace`` says how long drafts may be.

    Raises:
        KangarooError: the target's logits are not finite.
    """
    chooser = chooser_of(target, text, request)
    stops = torch.tensor(sorted(request.stop_tokens), dtype=torch.int64, device=target.device)
    most, threshold = request.max_drafts, request.threshold
    while (room := request.length - len(text.tokens) - 1) >= 0:
        at_hand = drafter.at_hand(text, min(most, room), threshold)
        limits = pace.limits(room, at_hand)
        proposed = drafter.propose(text, chooser, *limits)
        check_draft(drafter, text, proposed, limits.most)
        with span("kangaroo/verify"):
            draft, wanted = verify(target, drafter.first_layer, text, chooser, proposed)
        with span("kangaroo/accept"):
            decision, wanted = judge(target, drafter, text, draft, wanted, stops, request.length)
            agreed, reached, stopped = decision.tolist()
        if reached == len(text.tokens):
            raise not_finite(text, target.dtype)
        with span("kangaroo/commit"):
            committed = wanted.token[: reached - len(text.tokens)].tolist()
            text.tokens += committed  # what lies beyond in the caches is overwritten before it is read
            drafter.commit(text, len(committed))
        pace.record(Done(len(proposed.tokens), agreed, proposed.confidences, at_hand=at_hand))
        yield Commit(
            committed,
            accepted=min(agreed, len(committed)),
            drafted=len(draft.tokens),
            draft_steps=0 if at_hand else proposed.draft_steps,
            agreed=agreed,
            stopped=bool(stopped),
            logprobs=chooser.logprobs(wanted, committed),
        )
        if stopped:
            return


def verify(target: Llama, first_layer: int, text: TextState, chooser: Chooser, draft: Draft) -> tuple[Draft, Choice]:
    """The draft, and the target's tokens after the newest token and after each of the draft's k: k + 1 of them.

    Where a draft's values overflow the dtype, the rows beside it may not be finite either. The newest token then goes
    through alone, as in plain decoding, and the draft that comes back is empty.

    The layers below ``first_layer`` are not run again, unless a draft's values may have spoiled what they gave for the
    newest token; the others and the LM head run over all positions at once.
    """
    config = target.config
    ancestors = draft.ancestors if draft.is_tree else None
    where: Place = text.newest if ancestors is None else Branches(text.newest, ancestors)
    text.final = target.run(draft.hidden, text.cache, where, first_layer, config.num_hidden_layers)
    head = text.final, target.head, text.newest + 1
    if chooser.sampling.rejects and not draft.is_tree:
        certain = one_hot(draft.tokens, config.vocab_size).float()
        distributions = certain if draft.distributions is None else draft.distributions
        choice = chooser.target_or_draft(*head, draft.tokens, distributions)
    else:
        choice = chooser.target(*head, drafted=draft.tokens.tolist(), ancestors=ancestors)
    if len(draft.tokens) and math.isnan(choice.confidence[0].item()):
        alone = draft.hidden[:1]
        if first_layer:  # looked-up tokens run beside it; the drafter's own buffer gets it as well
            alone.copy_(target.run(target.embed(text.tokens[-1:]), text.cache, text.newest, 0, first_layer))
        return verify(target, first_layer, text, chooser, Draft(draft.tokens[:0], alone))
    return draft, choice


def judge(
    target: Llama, drafter: Drafter, text: TextState, draft: Draft, wanted: Choice, stops: Tensor, limit: int
) -> tuple[Tensor, Choice]:
    """What stands of a draft: the decision of ``accept``, and the target's tokens, which are ``wanted`` for a chain.

    Through a tree the target walks its own way. The tokens are those along it, and what was kept of its rows moves to
    where a chain of them would have left it.
    """
    backend, bounds = target.backend, (stops, len(text.tokens), limit)
    if not draft.is_tree:
        return backend.accept(draft.tokens, wanted.token, *bounds, confidence=wanted.confidence), wanted
    found = backend.walk(draft.tokens, wanted.token, draft.ancestors, *bounds, confidence=wanted.confidence)
    backend.straighten(found.path, text.newest, text.cache.rows)
    drafter.straighten(text, found.path, text.newest)
    logits = None if wanted.logits is None else wanted.logits[found.path]
    return found.decision, Choice(found.tokens, wanted.confidence[found.path], logits)


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
        yield Commit([token], accepted=0, drafted=0, draft_steps=0, agreed=0, stopped=stopped, logprobs=logprobs)
        if stopped:
            return
