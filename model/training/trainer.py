"""Train an adapter to guess what its target would write.

The target is frozen. A run shuffles its windows once and walks through them; every step draws a batch from the latest
ones, whose lessons are kept (``states.py``).
"""

import json
import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..drafters.vocabulary import write_draft_vocabulary
from ..errors import KangarooError
from ..evaluation.deadline import deadline_of
from ..files import write_text, write_whole
from ..load import resolve_device, resolve_dtype
from .adapter_module import TrainableAdapter, save_adapter
from .card import write_card
from .checkpoint import REPORT_FILE, STATE_FILE, stop_between_steps
from .data import Window
from .draft_vocabulary import count_tokens, draft_tokens
from .losses import DraftLoss
from .optimizers import Optimizers, rise_and_fall
from .plan import Plan, find_cache, read_plan
from .processes import Processes, join_processes
from .scores import Judge, decode_held_out, score
from .settings import ProgressReport, TrainingSettings
from .states import AT_ONCE, Batch, Lessons, keep_few_kernels, reached
from .teacher import Teacher, autocast

CHECKPOINT_SECONDS = 60.0
SCORING_SHARE = 0.15
"""Of the minutes, kept for scoring."""
CURVE_POINTS = 100
LEARNED_WINDOWS = 16
"""The most windows of the run's own that are measured on, to tell what the adapter knows from what it foresees."""
LATER_WEIGHT = 0.8
"""What the second draft of a step counts in the loss, and the square of it the third: they are made less often."""


class AdapterTraining:
    """An adapter between two steps of its training.

    Attributes:
        exit: where its exit layer's states stand among those of a lesson.
        step: how many steps were made.
        positions: on how many positions the adapter learned in them, each counted as often as it was used.
        elapsed: seconds that they took.
        losses: the loss of every step.
        drafted: the tokens that the adapter may draft, ascending; None means all.
    """

    def __init__(self, settings: TrainingSettings, lessons: Lessons, plan: Plan, processes: Processes) -> None:
        self.settings, self.lessons, self.plan, self.processes = settings, lessons, plan, processes
        self.teacher = teacher = lessons.teacher
        self.exit = teacher.exit_layers.index(settings.exit_layer)
        windows = plan.corpus.windows
        torch.manual_seed(settings.seed)
        parts = settings.parts
        self.adapter = TrainableAdapter(plan.config, settings.sequence_length, parts).to(teacher.device)
        self.passes = parts.draft_block or (settings.unrolled_drafts if parts.deep_state_size else 1)
        weights = {"norm.weight": teacher.model.model.norm.weight} | (plan.weights or {})
        if parts.draft_head_rank and "draft_head.up.weight" not in weights:
            self.adapter.factorize(teacher.head, weights.pop("norm.weight"))
        self.adapter.load_state_dict(weights, strict=False)  # without an MLP's, it begins as nothing
        processes.share(self.adapter)
        rates, doubt = (settings.learning_rate, settings.learning_rate), self.adapter.confidence
        apart = [] if doubt is None else doubt.parameters()
        self.optimizers = Optimizers(self.adapter, self.adapter.matrices, rates, apart=apart)
        counts = count_tokens(windows, len(teacher.head))
        self.drafted = None
        if settings.draft_vocabulary is not None:
            self.drafted = draft_tokens(counts, settings.draft_vocabulary, plan.target)
        self.loss = DraftLoss(
            teacher.head,
            counts,
            settings.vocabulary,
            settings.total_variation,
            self.adapter.own_head,
            doubt,
            self.drafted,
        )
        self.step, self.positions, self.elapsed = 0, 0, 0.0
        self.losses: list[float] = []
        self._unread: list[Tensor] = []
        self._board: Any = None
        if plan.saved is not None:
            self.adapter.load_state_dict(plan.saved["adapter"])
            self.optimizers.load_state_dict(plan.saved["optimizers"])
            self.step, self.positions, self.elapsed, self.losses = (
                plan.saved[name] for name in ("step", "positions", "elapsed", "losses")
            )

    def learned(self) -> list[Window]:
        """Some of the windows that were reached, spread evenly."""
        windows = self.plan.corpus.windows
        count = min(reached(self.step, self.settings.batch_size, self.settings.reuse), len(windows))
        return windows[: count : -(-count // LEARNED_WINDOWS)]

    def micro_batches(self, windows: list[int]) -> list[list[int]]:
        """Those of a step's windows that are this process's own, as many at once as the settings say.

        A window has the same owner in every step, which alone asks the target for its lesson.
        """
        rank, count = self.processes.rank, self.processes.count
        own = [window for window in windows if window // AT_ONCE % count == rank]
        size = self.settings.micro_batch_size or len(windows)
        return [own[start : start + size] for start in range(0, len(own), size)]

    def update(self, share: float) -> None:
        """Make one step, after ``share`` of the run has passed. On a GPU nothing waits for it."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed + 7919 * (self.step + 1))
        drawn = self.lessons.draw(
            self.step, settings.batch_size, settings.reuse, generator, processes=self.processes.count
        )
        positions = sum(int(self.plan.corpus.windows[window].learned.sum()) for window in drawn)
        total, sampling = torch.zeros((), device=self.teacher.device), generator.get_state()
        for part in self.micro_batches(drawn):
            batch = self.lessons.batch(part)
            generator.set_state(sampling)  # all parts see one sample of the joined class
            total += self.learn(batch, positions, generator)
        self._unread.append(self.processes.add_up(self.adapter, total))
        self.optimizers.step(rise_and_fall(share))
        self.positions += positions
        self.step += 1

    def learn(self, batch: Batch, positions: int, generator: torch.Generator) -> Tensor:
        """Add the gradient of some of a step's windows, which has so many positions in all; return their share of loss.

        The first draft of a step learns on all positions, each later one on half of them, since all cost the same.
        """
        shown = batch.exit_hidden[:, :, self.exit].float(), batch.final.float(), self.passes
        embedded = self.teacher.embed(batch.tokens).float() if self.settings.draft_block else None
        with autocast(self.teacher.device):
            passes = self.adapter(*shown, embedded)
        falling = [LATER_WEIGHT**later for later in range(self.passes)]
        weights = [weight / sum(falling) for weight in falling]
        total, rows, gradients = torch.zeros((), device=self.teacher.device), list[Tensor](), list[Tensor]()
        for later, (guesses, weight) in enumerate(zip(passes, weights, strict=True)):
            chosen, share = (batch.halves[later % 2], 0.5) if later else (slice(None), 1.0)
            rows.append(guesses.flatten(0, 1)[batch.places[chosen]])
            told = batch.normed[chosen], batch.log_total[chosen]
            part = weight * len(rows[-1]) / (share * positions)
            loss, gradient = self.loss.backward(rows[-1], *told, generator, part)
            gradients.append(gradient)
            total += loss
        torch.autograd.backward(rows, gradients)
        return total

    def latest_loss(self) -> float:
        """The loss of the last step; it waits for a GPU.

        Raises:
            KangarooError: it is no number any more.
        """
        if self._unread:
            latest = torch.stack(self._unread).tolist()
            self.losses += latest
            self._unread.clear()
            self.show(latest)
            if not math.isfinite(self.losses[-1]):
                raise KangarooError(f"the loss is {self.losses[-1]} at step {self.step}; take a lower learning_rate.")
        return self.losses[-1]

    def show(self, latest: list[float]) -> None:
        """Write the losses of the last steps for TensorBoard, where it was asked for; the first process does."""
        if self.processes.rank or not self.settings.tensorboard:
            return
        first = self.step - len(latest) + 1
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            # what a killed run wrote behind its last state is made again
            self._board = SummaryWriter(self.settings.out, purge_step=first)
        for step, loss in enumerate(latest, first):
            self._board.add_scalar("loss", loss, step)
        self._board.flush()

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
        write_whole(self.settings.out / STATE_FILE, partial(torch.save, state))

    def finish(self) -> dict[str, Any]:
        """Write the adapter; return what its report says of the training."""
        save_adapter(self.settings.out, self.plan.values, self.adapter, self.plan.target.config.dtype)
        if self.drafted is not None:
            write_draft_vocabulary(self.settings.out, self.drafted)
        return {
            "settings": self.settings.summary(),
            "steps": self.step,
            "positions": self.positions,
            "training_seconds": round(self.elapsed, 1),
            "parameters": sum(parameter.numel() for parameter in self.adapter.parameters()),
            "curve": curve(self.losses),
        }


def run_steps(trainings: list[AdapterTraining], progress: ProgressReport, deadline: float) -> None:
    """Make steps until they or the time are over, and keep the state; one step is always made.

    Where several adapters learn side by side, those that are behind the others catch up first.

    Raises:
        KeyboardInterrupt: Ctrl-C came, and the state was kept.
    """
    leader = trainings[0]
    last, first = leader.settings.last_step, min(training.step for training in trainings)
    began = saved_at = told_at = time.perf_counter()
    before, seconds = [training.elapsed for training in trainings], max(deadline - began, 1e-3)
    note, step = "", first
    with stop_between_steps() as stopped:
        while True:
            now = time.perf_counter()
            for training, earlier in zip(trainings, before, strict=True):
                training.elapsed = earlier + now - began
            share, going = max(step / last, leader.elapsed / (before[0] + seconds)), step > first or first >= last
            if going:
                if first == step or not note or now - told_at > 1:
                    told_at, note = now, " and ".join(f"{training.latest_loss():.3f}" for training in trainings)
                progress("training", int(1000 * min(share, 1)), 1000, f"step {step}, loss {note}")
            share, stopping = leader.processes.agree(share, stopped.is_set())
            if going:
                if share >= 1:
                    break
                if now - saved_at > CHECKPOINT_SECONDS or stopping:
                    saved_at = now
                    for training in trainings:
                        training.checkpoint()
                if stopping:
                    folders = " and ".join(str(training.settings.out) for training in trainings)
                    keep = "keeps" if len(trainings) == 1 else "keep"
                    raise KeyboardInterrupt(f"{folders} {keep} the run after step {step}")
            for training in trainings:
                if training.step == step:
                    training.update(share)
            step = min(training.step for training in trainings)
    for training in trainings:
        training.checkpoint()


def train_adapter(
    settings: TrainingSettings, progress: ProgressReport = lambda *_: None, deadline: float = math.inf
) -> dict[str, Any]:
    """``train_adapters`` for one adapter."""
    return train_adapters([settings], progress, deadline)[0]


def train_adapters(
    runs: list[TrainingSettings], progress: ProgressReport = lambda *_: None, deadline: float = math.inf
) -> list[dict[str, Any]]:
    """Train adapters side by side on the same passes of the target; write each with a report and a model card.

    Under ``torchrun`` every process calls this, and all share the work.

    Args:
        runs: every setting of each, alike but for the exit layer and the folder.
        progress: is told after every step.
        deadline: when all ends at the latest, as ``time.perf_counter`` counts; one step is always made. The learning
            rate falls towards the limit that comes first.

    Returns:
        Their reports, which are also the folders' ``training.json``: settings, steps, the loss over time, and the
        scores on held-out data (``scores.py``). They are empty in all processes but the first, which writes and scores.

    Raises:
        KangarooError: before any work, for settings, files or folders that cannot be used.
        KeyboardInterrupt: Ctrl-C came; the same settings go on from the step that was reached.
    """
    began, leader = time.perf_counter(), runs[0]
    deadline = min(deadline, deadline_of(leader.minutes, began))
    device = resolve_device(leader.device)
    keep_few_kernels()
    plans = [read_plan(leader)]
    plans += [read_plan(settings, plans[0].corpus) for settings in runs[1:]]
    target, cache = plans[0].target, find_cache(runs, plans)
    reserve = SCORING_SHARE * (deadline - began) if math.isfinite(deadline) else 0.0
    with join_processes(device) as processes:
        device = resolve_device(leader.device)  # each process has a current GPU of its own now
        if processes.rank:
            progress = lambda *_: None  # noqa: E731
        for settings in runs:
            settings.out.mkdir(parents=True, exist_ok=True)
        if cache is not None:
            progress("states", 0, 1, f"{cache.size / 1e9:.2g} GB in {cache.folder}")
        dtype = resolve_dtype(None, device, target.config.dtype)
        teacher = Teacher(target.path, device, dtype, [settings.exit_layer for settings in runs])
        lessons = Lessons(teacher, plans[0].corpus.windows, cache.folder if cache else None)
        trainings = [
            AdapterTraining(settings, lessons, plan, processes) for settings, plan in zip(runs, plans, strict=True)
        ]
        run_steps(trainings, progress, deadline - reserve)
    if processes.rank:
        return [{} for _ in runs]
    reports = []
    for place, training in enumerate(trainings, 1):
        reports.append(training.finish())
        by = deadline - reserve * (1 - place / len(runs) / 2)
        judge = Judge(teacher, training.adapter, training.exit, training.drafted)
        reports[-1] |= score(judge, plans[0].corpus.held_out, training.learned(), progress, by)
    del teacher, lessons, trainings, training  # the runtime loads the target anew
    for place, (settings, plan, report) in enumerate(zip(runs, plans, reports, strict=True), 1):
        by = deadline - reserve * (1 - place / len(runs)) / 2
        report.update(decode_held_out(plan, settings, progress, by))
        write_card(settings, report)
        write_text(settings.out / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    return reports


def curve(losses: list[float]) -> list[dict[str, float]]:
    """The mean loss of up to a hundred stretches of equal length, each by its last step."""
    stride = -(-len(losses) // CURVE_POINTS)
    parts = [losses[start : start + stride] for start in range(0, len(losses), stride)]
    ends = [min((index + 1) * stride, len(losses)) for index in range(len(parts))]
    return [{"step": end, "loss": round(sum(part) / len(part), 4)} for end, part in zip(ends, parts, strict=True)]
