"""Every setting of an adapter's training, checked once."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..drafters.parts import LEAST_BLOCK, Parts
from ..errors import KangarooError
from ..evaluation.deadline import deadline_of

ProgressReport = Callable[[str, int, int, str], None]
"""How training tells what it is doing: ``(stage, done, total, note)``, after every step."""

STEPS = 2000
"""The length of a run where neither steps nor minutes say another."""


@dataclass(frozen=True)
class TrainingSettings:
    """Every setting of an adapter's training.

    Attributes:
        model: the target, as for ``Kangaroo.from_pretrained``.
        data: text files, and ``.json`` and ``.jsonl`` files of conversations or texts (``records.py``).
        exit_layer: how many of the target's layers run before the adapter.
        out: the adapter's folder. A run that lies in it, stopped or finished, goes on to the new limits.
        held_out: files to measure on; without them, the last 3 % of the data.
        minutes: within which the command ends, loading and scoring included; None sets no limit.
        steps: the last step, counted from the run's beginning; None sets no limit where there are ``minutes``, and
            otherwise means 2,000.
        batch_size: windows per step, of all processes together.
        micro_batch_size: windows worked on at once; the gradients of a batch's parts add up. None takes all at once.
        reuse: how many steps use a window on average before it makes room for others. The target's pass costs more
            than the adapter's step, so a slow machine learns faster from 4 to 8.
        sequence_length: the most tokens per window.
        num_attention_heads: of the adapter (as many key-value heads); None takes the target's numbers.
        intermediate_size: of a SwiGLU behind the adapter's attention; None leaves it away, as in the paper.
        deep_state_size: the inner size of a SwiGLU over the target's last layer's output at the position before; None
            leaves it away, as in the paper.
        draft_head_rank: the rank of a head of two factors that is trained with the adapter; None takes the target's
            head, as in the paper.
        draft_block: how many drafts the adapter makes in one pass; None makes them one by one, as in the paper.
        trained_confidence: whether to train what is held against the threshold; False takes the softmax's probability,
            as in the paper.
        unrolled_drafts: how many drafts in a row an adapter with a deep state learns for.
        learning_rate: of Muon (matrices) and AdamW (norms) at its height; it warms up over 2 % of the run and falls to
            zero in a straight line.
        total_variation: the share of the total variation distance in the loss; the rest is cross-entropy.
        vocabulary: how many tokens, the data's most frequent ones, the loss tells apart; all others are one class.
        draft_vocabulary: how many tokens, the special ones and the data's most frequent ones, the adapter may draft,
            with a head of so many rows; None means all.
        start_from: an adapter's folder, whose weights a new run begins with.
        cache: keep the target's states of all data on disk, in ``out``, instead of a part of them in memory.
        tensorboard: write the losses for TensorBoard, too, into ``out``.
        seed: of the windows' order and of what is drawn.
        device: ``cpu`` or ``cuda``; None takes a GPU where there is one.

    Raises:
        KangarooError: a value that cannot be used.
    """

    model: str
    data: tuple[Path, ...]
    exit_layer: int
    out: Path
    held_out: tuple[Path, ...] = ()
    minutes: float | None = None
    steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    reuse: int = 4
    sequence_length: int = 256
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    deep_state_size: int | None = None
    draft_head_rank: int | None = None
    draft_block: int | None = None
    trained_confidence: bool = False
    unrolled_drafts: int = 2
    learning_rate: float = 2e-2
    total_variation: float = 0.0
    vocabulary: int = 8192
    draft_vocabulary: int | None = None
    start_from: str | None = None
    cache: bool = False
    tensorboard: bool = False
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1),
            ("batch_size", 1),
            ("micro_batch_size", 1),
            ("reuse", 1),
            ("sequence_length", 8),
            ("num_attention_heads", 1),
            ("intermediate_size", 1),
            ("deep_state_size", 1),
            ("draft_head_rank", 1),
            ("draft_block", LEAST_BLOCK),
            ("unrolled_drafts", 1),
            ("vocabulary", 1),
            ("draft_vocabulary", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            optional = name in (
                "steps",
                "micro_batch_size",
                "num_attention_heads",
                "intermediate_size",
                "deep_state_size",
                "draft_head_rank",
                "draft_block",
                "draft_vocabulary",
            )
            if not (optional and value is None) and (not isinstance(value, int) or value < low):
                raise KangarooError(f"{name} is {value!r}; it must be a whole number of at least {low}.")
        if not 0 < self.learning_rate < 1:
            raise KangarooError(f"learning_rate is {self.learning_rate!r}; it must be above 0 and below 1.")
        if not 0 <= self.total_variation <= 1:
            raise KangarooError(f"total_variation is {self.total_variation!r}; it must be a number from 0 to 1.")
        _ = deadline_of(self.minutes, began=0.0)
        if self.tensorboard and find_spec("tensorboard") is None:
            raise KangarooError("tensorboard is not installed; pip install tensorboard, or leave --tensorboard out.")
        if not self.data:
            raise KangarooError("no data files were given; give at least one.")

    @property
    def parts(self) -> Parts:
        """What the adapter has besides its layer."""
        sizes = self.deep_state_size or 0, self.draft_head_rank or 0, self.draft_block or 0
        return Parts(*sizes, self.trained_confidence)

    @property
    def last_step(self) -> float:
        """Where the run ends, if no time ends it before; infinite where only time does."""
        return self.steps or (STEPS if self.minutes is None else math.inf)

    def with_exits(self, exit_layers: Sequence[int]) -> "list[TrainingSettings]":
        """The same run for each of some exit layers; if they are several, in folders ``exit-3`` and so on in ``out``.

        Raises:
            KangarooError: an exit layer stands there twice.
        """
        if len(exit_layers) == 1:
            return [replace(self, exit_layer=exit_layers[0])]
        if len({*exit_layers}) < len(exit_layers):
            raise KangarooError(f"the exit layers are {list(exit_layers)}; give each of them once.")
        return [replace(self, exit_layer=layer, out=self.out / f"exit-{layer}") for layer in exit_layers]

    def summary(self) -> dict[str, Any]:
        """The settings as they go into a record, without the paths of this machine."""
        paths = {"model": Path(self.model).name, "data": len(self.data), "held_out": len(self.held_out)}
        if self.start_from is not None:
            paths["start_from"] = Path(self.start_from).name
        return {name: value for name, value in asdict(self).items() if name not in ("out", "device")} | paths

    def fingerprint(self) -> str:
        """What must be the same for a run to go on: all that changes a step's lesson, and no limit.

        Defaults are left out, so that a new setting with one does not part a run from its state. So are the names of
        the data's files; their windows have a number of their own.
        """
        free = {
            "out",
            "data",
            "device",
            "held_out",
            "minutes",
            "steps",
            "cache",
            "micro_batch_size",
            "draft_vocabulary",
            "tensorboard",
        }
        defaults = {field.name: field.default for field in fields(self)}
        named = {name: value for name, value in asdict(self).items() if name not in free and value != defaults[name]}
        return json.dumps(named, default=str, sort_keys=True)
