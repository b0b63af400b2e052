"""How good an adapter is on held-out data: by agreement, by the acceptance length that follows, and by decoding."""

import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drafters.protocol import PAPER_DRAFT_CONFIDENCE_THRESHOLD, PAPER_NUM_SPECULATIVE_TOKENS
from ..kangaroo import Kangaroo
from ..results import DecodeStats
from .adapter_module import TrainableAdapter
from .data import Window
from .losses import in_chunks
from .plan import Plan
from .settings import ProgressReport, TrainingSettings
from .teacher import Teacher, autocast

DECODED = 8
"""Held-out prompts that are continued, at most."""
NEW_TOKENS = 64


class Judged(NamedTuple):
    """A drafter's choices in a window, by position: whether they are the target's, and their probabilities."""

    agrees: list[bool]
    confidences: list[float]


def expected_acceptance_length(windows: list[list[Judged]], most: int = PAPER_NUM_SPECULATIVE_TOKENS) -> float:
    """The mean acceptance length of greedy decoding that writes these windows, at the paper's draft settings.

    Args:
        windows: the choices as the first draft of a step, as the second, and so on; later drafts are as the last.
        most: drafts a step.

    A step drafts until the first unsure draft, which still counts, and keeps the drafts up to the first wrong one.
    """
    steps = tokens = 0
    for passes in windows:
        at, length = 0, len(passes[0].agrees)
        while at < length:
            taken = 0
            while taken < most and at + taken < length:
                judged = passes[min(taken, len(passes) - 1)]
                if not judged.agrees[at + taken]:
                    break
                taken += 1
                if judged.confidences[at + taken - 1] < PAPER_DRAFT_CONFIDENCE_THRESHOLD:
                    break
            steps, tokens, at = steps + 1, tokens + taken + 1, at + taken + 1
    return tokens / steps if steps else 0.0


class Judge:
    """Judges an adapter on windows, at the positions that the target would write.

    Args:
        teacher: the target.
        adapter: reads that one of a lesson's exit layers which stands at ``exit_place``.
        tokens: those that it may draft; None means all.
    """

    def __init__(self, teacher: Teacher, adapter: TrainableAdapter, exit_place: int, tokens: Tensor | None) -> None:
        self.teacher, self.adapter, self.exit_place = teacher, adapter, exit_place
        self.tokens = None if tokens is None else tokens.to(teacher.device)

    @torch.no_grad()
    def judge(self, window: Window, drafts: int) -> list[Judged]:
        """The choices as the first draft of a step, as the second, and so on."""
        teacher = self.teacher
        (lesson,) = teacher.lessons([window.tokens])
        exit_hidden, final = lesson.exit_hidden[None, :, self.exit_place].float(), lesson.final[None].float()
        embedded = teacher.embed(window.tokens)[None].float() if self.adapter.parts.draft_block else None
        with autocast(teacher.device):
            passes = self.adapter(exit_hidden, final, drafts, embedded)
        places = window.learned.nonzero()[:, 0].to(teacher.device)
        guesses, normed = [each[0, places].float() for each in passes], teacher.normed(lesson.final[places]).float()
        return self._choices(guesses, normed)

    def _choices(self, passes: list[Tensor], normed: Tensor) -> list[Judged]:
        """Whether each pass's guesses and the target rank the same token first, and the drafter's confidences.

        The inputs of both heads: ``[P, hidden]`` each, or ``[P, r]`` for a drafter with a head of rank r. All is
        float32: bf16's logits are equal so often that a share of the agreement would be chance.
        """
        head, own_head = self.teacher.head.float(), self.adapter.own_head
        drafting = head if own_head is None else own_head
        own = drafting if self.tokens is None else drafting[self.tokens]
        wanted = torch.cat([F.linear(normed[part], head).argmax(-1) for part in in_chunks(normed)])
        judged = []
        for guesses in passes:
            agrees, confidences = list[bool](), list[float]()
            for part in in_chunks(guesses):
                probability, choice = F.linear(guesses[part], own).softmax(-1).max(-1)
                choice = choice if self.tokens is None else self.tokens[choice]
                agrees += (choice == wanted[part]).tolist()
                confidences += self.adapter.confidences(guesses[part], probability).tolist()
            judged.append(Judged(agrees, confidences))
        return judged


def score(
    judge: Judge, held_out: list[Window], learned: list[Window], progress: ProgressReport, deadline: float
) -> dict[str, float]:
    """Agreement on held-out windows and on some that were learned, and the expected acceptance length of the former.

    After the deadline no more windows are looked at; one of each always is.
    """
    parts, most = judge.adapter.parts, PAPER_NUM_SPECULATIVE_TOKENS
    if parts.draft_block:
        most = min(most, parts.draft_block)
    drafts = most if parts.deep_state_size or parts.draft_block else 1
    judged: dict[bool, list[list[Judged]]] = {True: [], False: []}
    total = len(held_out) + len(learned)
    for known, windows in ((False, held_out), (True, learned)):
        for window in windows:
            judged[known].append(judge.judge(window, 1 if known else drafts))
            progress("scoring", sum(map(len, judged.values())), total, "")
            if time.perf_counter() > deadline:
                break
    return {
        "agreement": _agreement(judged[False]),
        "agreement_on_learned_windows": _agreement(judged[True]),
        "expected_acceptance_length": round(expected_acceptance_length(judged[False], most), 3),
    }


def _agreement(windows: list[list[Judged]]) -> float:
    """The share of first drafts that are right."""
    right, count = (sum(of(passes[0].agrees) for passes in windows) for of in (sum, len))
    return round(right / count, 4)


def decode_held_out(
    plan: Plan, settings: TrainingSettings, progress: ProgressReport, deadline: float
) -> dict[str, float]:
    """What greedy decoding measures on held-out prompts, by the runtime with the adapter that was just written.

    A prompt is what stands before a window's first answer, or a text's first quarter. The deadline ends decoding within
    a step, and where it leaves no time to begin, there are no figures.
    """
    if time.perf_counter() > deadline:
        return {}
    kangaroo = Kangaroo.from_pretrained(plan.target.path, settings.out, device=settings.device)
    windows = plan.corpus.held_out[:DECODED]
    plain, drafted = list[DecodeStats](), list[DecodeStats]()
    for done, window in enumerate(windows, 1):
        first = int(window.learned.float().argmax())  # the position before the first written token
        prompt = window.tokens[: first + 1 if first else max(1, len(window.tokens) // 4)].tolist()
        if done == 1:
            kangaroo.generate(prompt, max_new_tokens=4)  # what a first text needs is not its speed
        half = (time.perf_counter() + deadline) / 2
        plain.append(_decode(kangaroo, prompt, half, plain=True))
        drafted.append(_decode(kangaroo, prompt, deadline, plain=False))
        progress("decoding", done, len(windows), "")
        if time.perf_counter() > deadline:
            break
    steps, tokens = (sum(getattr(stats, name) for stats in drafted) for name in ("verification_steps", "new_tokens"))
    if not steps:  # every prompt fills the context
        return {}
    speeds = [
        sum(stats.new_tokens for stats in texts) / max(sum(stats.decode_seconds for stats in texts), 1e-9)
        for texts in (plain, drafted)
    ]
    return {
        "mean_acceptance_length": round(tokens / steps, 3),
        "plain_tokens_per_second": round(speeds[0], 1),
        "kangaroo_tokens_per_second": round(speeds[1], 1),
        "speedup": round(speeds[1] / speeds[0], 3),
    }


def _decode(kangaroo: Kangaroo, prompt: list[int], deadline: float, plain: bool) -> DecodeStats:
    """The counts and times of a greedy text, which the deadline may cut short; one step is always made."""
    stats = DecodeStats()
    for step in kangaroo.progress(prompt, max_new_tokens=NEW_TOKENS, plain=plain):
        stats = step.generation.stats
        if time.perf_counter() > deadline:
            break
    return stats
