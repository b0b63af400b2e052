"""Train an adapter: soft cross-entropy against the target's own distribution (arXiv 2404.18911, section 3.1).

The target is frozen. With ``self_generated`` half of the windows are the target's own continuations of the text, made
alternately greedily and by sampling: what the drafter will meet when decoding.
"""

import json
import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..load import resolve_device, resolve_dtype
from .adapter_module import TrainableAdapter, save_adapter
from .checkpoint import STATE_FILE, drop_state, write_atomically
from .data import random_windows
from .optimizers import Optimizers, rise_and_fall
from .plan import Plan, read_plan
from .settings import ProgressReport, TrainingSettings
from .teacher import Lessons, Teacher, generate_windows

CHECKPOINT_SECONDS = 60.0
HELD_OUT_WINDOWS = 64
GENERATING_SHARE = 0.35
"""The largest share of the time until a deadline that the target may write for before the steps begin."""


class AdapterTraining:
    """An adapter between two steps of its training.

    Attributes:
        pool: windows that the target wrote, ``[N, T]``, or None.
        step: how many steps were made.
        elapsed: seconds that they took.
        curve: the mean loss of every stretch between two checkpoints.
    """

    def __init__(self, settings: TrainingSettings, teacher: Teacher, plan: Plan, pool: Tensor | None) -> None:
        self.settings, self.teacher, self.tokens, self.pool = settings, teacher, plan.tokens, pool
        torch.manual_seed(settings.seed)
        self.adapter = TrainableAdapter(plan.config, settings.sequence_length).to(teacher.device)
        self.adapter.norm.load_state_dict(teacher.model.model.norm.state_dict())
        matrices = [parameter for parameter in self.adapter.parameters() if parameter.ndim == 2]
        self.optimizers = Optimizers(self.adapter, matrices, (settings.learning_rate, settings.learning_rate))
        self.lessons = Lessons(64 * settings.batch_size)
        self.losses: list[float] = []
        self.step, self.elapsed = 0, 0.0
        self.curve: list[dict[str, float]] = []
        if plan.saved is not None:
            self.adapter.load_state_dict(plan.saved["adapter"])
            self.optimizers.load_state_dict(plan.saved["optimizers"])
            self.step, self.elapsed, self.curve = (plan.saved[name] for name in ("step", "elapsed", "curve"))

    def update(self, share: float) -> float:
        """Make one step, after ``share`` of the run has passed; return its loss."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed + 7919 * (self.step + 1))
        fresh = max(1, settings.batch_size // settings.reuse)
        own = 0 if self.pool is None else (fresh + self.step % 2) // 2
        batch = random_windows(self.tokens, fresh - own, settings.sequence_length, generator)
        if self.pool is not None:
            batch = torch.cat((batch, self.pool[torch.randint(len(self.pool), (own,), generator=generator)]))
        with _autocast(self.teacher.device):
            exit_hidden, logits = self.lessons.draw(*self.teacher(batch), settings.batch_size, generator)
            guesses = F.linear(self.adapter(exit_hidden), self.teacher.head)
        loss = F.cross_entropy(guesses.float().flatten(0, 1), logits.softmax(-1).flatten(0, 1))
        loss.backward()
        self.optimizers.step(rise_and_fall(share))
        self.losses.append(loss.item())
        self.step += 1
        return self.losses[-1]

    def checkpoint(self) -> None:
        """Add a point to the curve and keep what a stopped run needs to go on."""
        self.curve.append({"step": self.step, "loss": round(sum(self.losses) / len(self.losses), 4)})
        self.losses.clear()
        state = {
            "fingerprint": self.settings.fingerprint(),
            "adapter": self.adapter.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "curve": self.curve,
        }
        write_atomically(self.settings.out / STATE_FILE, state)


def run_steps(training: AdapterTraining, progress: ProgressReport, deadline: float) -> None:
    """Make steps until they or the time are over; one step is always made."""
    settings = training.settings
    began = time.perf_counter() - training.elapsed
    saved_at = time.perf_counter()
    steps = settings.steps if settings.minutes is None else math.inf
    seconds = min(math.inf if settings.minutes is None else settings.minutes * 60, max(deadline - began, 1e-3))
    while True:
        share = max(training.step / steps, (time.perf_counter() - began) / seconds)
        if share >= 1 and training.step:
            return
        loss = training.update(share)
        note = f"step {training.step}, loss {loss:.3f}"
        if math.isfinite(steps):
            progress("training", training.step, settings.steps, note)
        else:
            progress("training", int(min(time.perf_counter() - began, seconds)), math.ceil(seconds), note)
        if time.perf_counter() - saved_at > CHECKPOINT_SECONDS:
            saved_at = time.perf_counter()
            training.elapsed = saved_at - began
            training.checkpoint()


def agreement(teacher: Teacher, adapter: TrainableAdapter, windows: Tensor, batch_size: int) -> float:
    """The share of positions where drafter and target rank the same token first."""
    same = 0
    with torch.no_grad(), _autocast(teacher.device):
        for batch in windows.split(batch_size):
            exit_hidden, logits = teacher(batch)
            guesses = F.linear(adapter(exit_hidden), teacher.head)
            same += int((guesses.argmax(-1) == logits.argmax(-1)).sum())
    return same / windows.numel()


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def train_adapter(
    settings: TrainingSettings, progress: ProgressReport = lambda *_: None, deadline: float = math.inf
) -> dict[str, Any]:
    """Train an adapter and write it to ``settings.out``.

    Args:
        settings: every setting.
        progress: is told after every step.
        deadline: when the steps end at the latest, as ``time.perf_counter`` counts, loading and writing text before
            them included; one step is always made. The learning rate falls towards the limit that comes first.

    Returns:
        A report: settings, steps, tokens seen, the loss over time, and the top-1 agreement on held-out text.

    Raises:
        KangarooError: before any work, for settings, files or folders that cannot be used.
    """
    device, length = resolve_device(settings.device), settings.sequence_length
    plan = read_plan(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(plan.folder, settings.exit_layer, device, resolve_dtype(None, device, plan.target.dtype))
    valid = {"text": random_windows(plan.held_out, HELD_OUT_WINDOWS, length, torch.Generator().manual_seed(1))}
    pool: Tensor | None = None
    if settings.self_generated:
        now = time.perf_counter()
        pool = generate_windows(teacher, plan.tokens, settings, progress, now + GENERATING_SHARE * (deadline - now))
        torch.manual_seed(settings.seed)
        valid["self_generated"] = teacher.continue_text(valid["text"][:, : length // 4], length, sample=False)
    training = AdapterTraining(settings, teacher, plan, pool)
    run_steps(training, progress, deadline)
    report = {
        "settings": settings.summary(),
        "steps": training.step,
        "tokens": training.step * settings.batch_size * length,
        "parameters": sum(parameter.numel() for parameter in training.adapter.parameters()),
        "curve": training.curve,
    }
    for name, windows in valid.items():
        report[f"top1_agreement_{name}"] = agreement(teacher, training.adapter, windows, settings.batch_size)
    save_adapter(settings.out, plan.values, training.adapter, plan.target.dtype)
    (settings.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    drop_state(settings.out)
    return report
