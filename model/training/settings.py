"""Every setting of an adapter's training, checked once."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import KangarooError

ProgressReport = Callable[[str, int, int, str], None]
"""How training tells what it is doing: ``(stage, done, total, note)``, after every step."""


@dataclass(frozen=True)
class TrainingSettings:
    """Every setting of an adapter's training.

    Attributes:
        model: the target's folder or hub name (not a GGUF file), or ``demo``: the bundled pair's.
        data: text files.
        exit_layer: how many of the target's layers run before the adapter.
        out: the adapter's folder; a run that was stopped goes on from the state in it.
        self_generated: half of every batch is the target's own continuations of the text.
        held_out: text files to measure on; without them, the last 3 % of the data.
        minutes: time for the steps; None runs exactly ``steps`` of them.
        steps: the number of steps where ``minutes`` is None.
        batch_size: windows per step.
        reuse: how many steps use a window on average. The target's pass costs more than the adapter's, so a slow
            machine learns faster from 4 to 8; the latest ``64 * batch_size`` windows then stay in memory.
        sequence_length: tokens per window.
        generated_windows: how many windows the target writes.
        generated_at_once: how many of them side by side; a GPU writes a thousand as fast as one.
        num_attention_heads: of the adapter (as many key-value heads); None takes the target's numbers.
        learning_rate: of Muon (matrices) and AdamW (norms) at its height; it warms up over 2 % of the run and falls to
            zero in a straight line.
        seed: of the windows and the sampling.
        device: ``cpu`` or ``cuda``; None takes a GPU where there is one.

    Raises:
        KangarooError: a value that cannot be used.
    """

    model: str
    data: tuple[Path, ...]
    exit_layer: int
    out: Path
    self_generated: bool = False
    held_out: tuple[Path, ...] = ()
    minutes: float | None = None
    steps: int = 1000
    batch_size: int = 16
    reuse: int = 1
    sequence_length: int = 256
    generated_windows: int = 2048
    generated_at_once: int = 64
    num_attention_heads: int | None = None
    learning_rate: float = 3e-3
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1),
            ("batch_size", 1),
            ("reuse", 1),
            ("sequence_length", 8),
            ("generated_windows", 1),
            ("generated_at_once", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise KangarooError(f"{name} is {value!r}; it must be a whole number of at least {low}.")
        heads = self.num_attention_heads
        if heads is not None and (not isinstance(heads, int) or heads < 1):
            raise KangarooError(f"num_attention_heads is {heads!r}; it must be a whole number of at least 1.")
        if not 0 < self.learning_rate < 1:
            raise KangarooError(f"learning_rate is {self.learning_rate!r}; it must be above 0 and below 1.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise KangarooError(f"minutes is {self.minutes!r}; it must be a finite number above 0.")
        if not self.data:
            raise KangarooError("no data files were given; give at least one text file.")

    def summary(self) -> dict[str, Any]:
        """The settings as they go into a record, with the number of files in place of their paths."""
        paths = {"model": Path(self.model).name, "data": len(self.data), "held_out": len(self.held_out)}
        return {name: value for name, value in asdict(self).items() if name not in ("out", "device")} | paths

    def fingerprint(self) -> str:
        """What must be the same for a stopped run to go on."""
        return json.dumps({**asdict(self), "out": "", "device": ""}, default=str, sort_keys=True)
