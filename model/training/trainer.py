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

from ..errors import KangarooError
from ..load import resolve_device, resolve_dtype
from .adapter_module import TrainableAdapter, save_adapter
from .card import write_card
from .checkpoint import REPORT_FILE, STATE_FILE, stop_between_steps, write_atomically
from .losses import DraftLoss
from .optimizers import Optimizers, rise_and_fall
from .plan import Plan, read_plan
from .processes import Processes, join_processes
from .scores import decode_held_out, score_held_out
from .settings import ProgressReport, TrainingSettings
from .states import AT_ONCE, Lessons
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
    """

    def __init__(self, settings: TrainingSettings, teacher: Teacher, plan: Plan, processes: Processes) -> None:
        self.settings, self.teacher, self.plan, self.processes = settings, teacher, plan, processes
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
        counts = torch.bincount(torch.cat([window.tokens for window in windows]), minlength=len(teacher.head))
        self.loss = DraftLoss(teacher.head, counts, settings.vocabulary, settings.total_variation)
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
        oldest = max(0, newest - self.lessons.capacity * self.processes.count)
        return (torch.randint(oldest, newest, (settings.batch_size,), generator=generator) % count).tolist()

    def parts(self, windows: list[int]) -> list[list[int]]:
        """Those of a step's windows that are this process's own, as many at once as the settings say.

        A window has the same owner in every step, which alone asks the target for its lesson.
        """
        rank, count = self.processes.rank, self.processes.count
        own = [window for window in windows if window // AT_ONCE % count == rank]
        size = self.settings.micro_batch_size or len(windows)
        return [own[start : start + size] for start in range(0, len(own), size)]

    def update(self, share: float) -> None:
        """Make one step, after ``share`` of the run has passed. On a GPU nothing waits for it."""
        generator = torch.Generator().manual_seed(self.settings.seed + 7919 * (self.step + 1))
        drawn = self.drawn(generator)
        positions = sum(int(self.plan.corpus.windows[window].learned.sum()) for window in drawn)
        total, sampling = torch.zeros((), device=self.teacher.device), generator.get_state()
        for part in self.parts(drawn):
            batch = self.lessons.batch(part)
            with autocast(self.teacher.device):
                guesses = self.adapter(batch.exit_hidden.float()).flatten(0, 1)[batch.places]
            generator.set_state(sampling)  # all parts see one sample of the joined class
            loss, gradient = self.loss.backward(guesses, batch.final, batch.log_total, generator)
            weight = len(batch.places) / positions
            guesses.backward(gradient * weight)
            total += loss * weight
        self._unread.append(self.processes.add_up(self.adapter, total))
        self.optimizers.step(rise_and_fall(share))
        self.positions += positions
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
        """Keep what a stopped run needs to go on; the first process does."""
        self.latest_loss()
        if self.processes.rank:
            return
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
            share, stopping = training.processes.agree(share, stopped.is_set())
            if training.step > first or first >= last:
                if first == training.step or math.isnan(loss) or now - told_at > 1:
                    told_at, loss = now, training.latest_loss()
                progress("training", int(1000 * min(share, 1)), 1000, f"step {training.step}, loss {loss:.3f}")
                if share >= 1:
                    break
                if now - saved_at > CHECKPOINT_SECONDS or stopping:
                    saved_at = now
                    training.checkpoint()
                if stopping:
                    raise KeyboardInterrupt(f"{training.settings.out} keeps the run after step {training.step}")
            training.update(share)
    training.checkpoint()


def train_adapter(
    settings: TrainingSettings, progress: ProgressReport = lambda *_: None, deadline: float = math.inf
) -> dict[str, Any]:
    """Train an adapter and write it to ``settings.out``, with a report and a model card.

    Under ``torchrun`` every process calls this, and all share the work.

    Args:
        settings: every setting.
        progress: is told after every step.
        deadline: when all ends at the latest, as ``time.perf_counter`` counts; one step is always made. The learning
            rate falls towards the limit that comes first.

    Returns:
        The report, which is also the folder's ``training.json``: settings, steps, the loss over time, and the scores on
        held-out data (``scores.py``). It is empty in all processes but the first, which writes and scores.

    Raises:
        KangarooError: before any work, for settings, files or folders that cannot be used.
        KeyboardInterrupt: Ctrl-C came; the same settings go on from the step that was reached.
    """
    began = time.perf_counter()
    deadline = min(deadline, math.inf if settings.minutes is None else began + settings.minutes * 60)
    device = resolve_device(settings.device)
    plan = read_plan(settings)
    reserve = SCORING_SHARE * (deadline - began) if math.isfinite(deadline) else 0.0
    with join_processes(device) as processes:
        if processes.rank:
            progress = lambda *_: None  # noqa: E731
        settings.out.mkdir(parents=True, exist_ok=True)
        if plan.cache is not None:
            progress("states", 0, 1, f"{plan.cache_bytes / 1e9:.2g} GB in {plan.cache}")
        dtype = resolve_dtype(None, device, plan.target.config.dtype)
        teacher = Teacher(plan.target.path, device, dtype, settings.exit_layer)
        training = AdapterTraining(settings, teacher, plan, processes)
        run_steps(training, progress, deadline - reserve)
    if processes.rank:
        return {}
    save_adapter(settings.out, plan.values, training.adapter, plan.target.config.dtype)
    report = {
        "settings": settings.summary(),
        "steps": training.step,
        "positions": training.positions,
        "training_seconds": round(training.elapsed, 1),
        "parameters": sum(parameter.numel() for parameter in training.adapter.parameters()),
        "curve": curve(training.losses),
    }
    report |= score_held_out(teacher, training.adapter, plan.corpus.held_out, progress, deadline - reserve / 2)
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
