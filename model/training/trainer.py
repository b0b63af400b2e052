"""Train an adapter to guess what its target would write.

The target is frozen. A run shuffles its windows once and walks through them; every step draws a batch from the latest
ones, whose lessons are kept (``states.py``).
"""

import json
import math
import time
from typing import Any

import torch
from torch import Tensor

from ..drafters.vocabulary import write_draft_vocabulary
from ..errors import KangarooError
from ..load import resolve_device, resolve_dtype
from .adapter_module import TrainableAdapter, save_adapter
from .card import write_card
from .checkpoint import REPORT_FILE, STATE_FILE, stop_between_steps, write_atomically
from .draft_vocabulary import count_tokens, draft_tokens
from .losses import DraftLoss
from .optimizers import Optimizers, rise_and_fall
from .plan import Plan, read_plan
from .scores import decode_held_out, score_held_out
from .settings import ProgressReport, TrainingSettings
from .states import Lessons
from .teacher import Teacher, autocast

CHECKPOINT_SECONDS = 60.0
SCORING_SHARE = 0.15
"""Of the minutes, kept for scoring."""
CURVE_POINTS = 100


class AdapterTraining:
    """An adapter between two steps of its training.

    Attributes:
        step: how many steps were made.
        positions: on how many positions the adapter learned in them, each counted as often as it was used.
        elapsed: seconds that they took.
        losses: the loss of every step.
        drafted: the tokens that the adapter may draft, ascending; None means all.
    """

    def __init__(self, settings: TrainingSettings, teacher: Teacher, plan: Plan) -> None:
        self.settings, self.teacher, self.plan = settings, teacher, plan
        windows = plan.corpus.windows
        self.lessons = Lessons(teacher, windows, plan.cache)
        torch.manual_seed(settings.seed)
        self.adapter = TrainableAdapter(plan.config, settings.sequence_length).to(teacher.device)
        if plan.weights is not None:
            self.adapter.load_state_dict(plan.weights, strict=False)  # without an MLP's, it begins as nothing
        else:
            self.adapter.norm.load_state_dict(teacher.model.model.norm.state_dict())
        matrices = [parameter for parameter in self.adapter.parameters() if parameter.ndim == 2]
        self.optimizers = Optimizers(self.adapter, matrices, (settings.learning_rate, settings.learning_rate))
        counts = count_tokens(windows, len(teacher.head))
        self.loss = DraftLoss(teacher.head, counts, settings.vocabulary, settings.total_variation)
        self.drafted = None
        if settings.draft_vocabulary is not None:
            self.drafted = draft_tokens(counts, settings.draft_vocabulary, plan.target)
        self.step, self.positions, self.elapsed = 0, 0, 0.0
        self.losses: list[float] = []
        self._unread: list[Tensor] = []
        if plan.saved is not None:
            self.adapter.load_state_dict(plan.saved["adapter"])
            self.optimizers.load_state_dict(plan.saved["optimizers"])
            self.step, self.positions, self.elapsed, self.losses = (
                plan.saved[name] for name in ("step", "positions", "elapsed", "losses")
            )

    def drawn(self, generator: torch.Generator) -> list[int]:
        """The windows of the next step: any of the latest that were reached, of which there are more at every step."""
        settings, count = self.settings, len(self.plan.corpus.windows)
        newest = settings.batch_size + self.step * settings.batch_size // settings.reuse
        oldest = max(0, newest - self.lessons.capacity)
        return (torch.randint(oldest, newest, (settings.batch_size,), generator=generator) % count).tolist()

    def update(self, share: float) -> None:
        """Make one step, after ``share`` of the run has passed. On a GPU nothing waits for it."""
        generator = torch.Generator().manual_seed(self.settings.seed + 7919 * (self.step + 1))
        batch = self.lessons.batch(self.drawn(generator))
        with autocast(self.teacher.device):
            guesses = self.adapter(batch.exit_hidden.float()).flatten(0, 1)[batch.places]
        loss, gradient = self.loss.backward(guesses, batch.final, batch.log_total, generator)
        guesses.backward(gradient)
        self.optimizers.step(rise_and_fall(share))
        self._unread.append(loss)
        self.positions += len(batch.places)
        self.step += 1

    def latest_loss(self) -> float:
        """The loss of the last step; it waits for a GPU.

        Raises:
            KangarooError: it is no number any more.
        """
        if self._unread:
            self.losses += torch.stack(self._unread).tolist()
            self._unread.clear()
            if not math.isfinite(self.losses[-1]):
                raise KangarooError(f"the loss is {self.losses[-1]} at step {self.step}; take a lower learning_rate.")
        return self.losses[-1]

    def checkpoint(self) -> None:
        """Keep what a stopped run needs to go on."""
        self.latest_loss()
        state = {
            "fingerprint": self.settings.fingerprint(),
            "corpus": self.plan.fingerprint,
            "adapter": self.adapter.state_dict(),
            "optimizers": self.optimizers.state_dict(),
        } | {name: getattr(self, name) for name in ("step", "positions", "elapsed", "losses")}
        write_atomically(self.settings.out / STATE_FILE, state)


def run_steps(training: AdapterTraining, progress: ProgressReport, deadline: float) -> None:
    """Make steps until they or the time are over, and keep the state; one step is always made.

    Raises:
        KeyboardInterrupt: Ctrl-C came, and the state was kept.
    """
    last, first = training.settings.last_step, training.step
    began = saved_at = told_at = time.perf_counter()
    before, seconds = training.elapsed, max(deadline - began, 1e-3)
    loss = math.nan
    with stop_between_steps() as stopped:
        while True:
            now = time.perf_counter()
            training.elapsed = before + now - began
            share = max(training.step / last, training.elapsed / (before + seconds))
            if training.step > first or first >= last:
                if first == training.step or math.isnan(loss) or now - told_at > 1:
                    told_at, loss = now, training.latest_loss()
                progress("training", int(1000 * min(share, 1)), 1000, f"step {training.step}, loss {loss:.3f}")
                if share >= 1:
                    break
                if now - saved_at > CHECKPOINT_SECONDS or stopped.is_set():
                    saved_at = now
                    training.checkpoint()
                if stopped.is_set():
                    raise KeyboardInterrupt(f"{training.settings.out} keeps the run after step {training.step}")
            training.update(share)
    training.checkpoint()


def train_adapter(
    settings: TrainingSettings, progress: ProgressReport = lambda *_: None, deadline: float = math.inf
) -> dict[str, Any]:
    """Train an adapter and write it to ``settings.out``, with a report and a model card.

    Args:
        settings: every setting.
        progress: is told after every step.
        deadline: when all ends at the latest, as ``time.perf_counter`` counts; one step is always made. The learning
            rate falls towards the limit that comes first.

    Returns:
        The report, which is also the folder's ``training.json``: settings, steps, the loss over time, and the scores on
        held-out data (``scores.py``).

    Raises:
        KangarooError: before any work, for settings, files or folders that cannot be used.
        KeyboardInterrupt: Ctrl-C came; the same settings go on from the step that was reached.
    """
    began = time.perf_counter()
    deadline = min(deadline, math.inf if settings.minutes is None else began + settings.minutes * 60)
    device = resolve_device(settings.device)
    plan = read_plan(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    if plan.cache is not None:
        progress("states", 0, 1, f"{plan.cache_bytes / 1e9:.2g} GB in {plan.cache}")
    dtype = resolve_dtype(None, device, plan.target.config.dtype)
    teacher = Teacher(plan.target.path, device, dtype, settings.exit_layer)
    training = AdapterTraining(settings, teacher, plan)
    reserve = SCORING_SHARE * (deadline - began) if math.isfinite(deadline) else 0.0
    run_steps(training, progress, deadline - reserve)
    save_adapter(settings.out, plan.values, training.adapter, plan.target.config.dtype)
    if training.drafted is not None:
        write_draft_vocabulary(settings.out, training.drafted)
    report = {
        "settings": settings.summary(),
        "steps": training.step,
        "positions": training.positions,
        "training_seconds": round(training.elapsed, 1),
        "parameters": sum(parameter.numel() for parameter in training.adapter.parameters()),
        "curve": curve(training.losses),
    }
    drafted = None if training.drafted is None else training.drafted.to(device)
    held_out = plan.corpus.held_out
    report |= score_held_out(teacher, training.adapter, held_out, progress, deadline - reserve / 2, drafted)
    del teacher, training  # the runtime loads the target anew
    report |= decode_held_out(plan, settings, progress, deadline)
    write_card(settings, report)
    (settings.out / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
    return report


def curve(losses: list[float]) -> list[dict[str, float]]:
    """The mean loss of up to a hundred stretches of equal length, each by its last step."""
    stride = -(-len(losses) // CURVE_POINTS)
    parts = [losses[start : start + stride] for start in range(0, len(losses), stride)]
    ends = [min((index + 1) * stride, len(losses)) for index in range(len(parts))]
    return [{"step": end, "loss": round(sum(part) / len(part), 4)} for end, part in zip(ends, parts, strict=True)]
