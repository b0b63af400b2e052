"""What a part of the report is told, and the file in which it leaves what it found."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from random_model import SMOKE
from triton import knobs
from triton.runtime import build as c_modules

from kangaroo_kernels.workloads import MODELS, ModelShape

ROOT = Path(__file__).resolve().parent.parent.parent
"""The repository."""


def one_line(error: BaseException) -> str:
    """An exception's kind and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def write_json(path: Path, values: object) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def log_compilations() -> None:
    """From here on this process adds to the file ``$COMPILED_LOG`` the name of every kernel that Triton compiles.

    So it does of every C module: under Triton 3.6 each signature of a kernel needs one, its launcher.
    """
    if "COMPILED_LOG" not in os.environ:
        return
    compile_c: Any = c_modules._build

    def add(name: str) -> None:
        with open(os.environ["COMPILED_LOG"], "a", encoding="utf-8") as log:
            log.write(name + "\n")

    def note(*, src: Any, cache_hit: bool, **event: Any) -> None:
        if not cache_hit:
            add(src.name)

    def build(name: str, *how: Any) -> Any:
        add(name)
        return compile_c(name, *how)

    knobs.compilation.listener, c_modules._build = note, build


@dataclass
class Job:
    """One part's work.

    Attributes:
        piece: the JSON file that it fills; written at every change, so that a part which is stopped leaves what it had.
        folder: where further files of the report go.
        seconds: that it may take.
        smoke: whether to run at tiny size on the CPU.
        brief: whether the first model alone is measured, at its shortest context.
        pair: folder of a trained pair, for the part that measures one.
        vllm: the Python of an environment that has vLLM, for the part that measures it.
        values: what it found.
    """

    piece: Path
    folder: Path
    seconds: float
    smoke: bool = False
    brief: bool = False
    pair: Path | None = None
    vllm: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds; below 0 when the time is over."""
        return self.deadline - time.monotonic()

    @property
    def device(self) -> torch.device:
        """Where to measure."""
        return torch.device("cpu") if self.smoke else torch.device("cuda", torch.cuda.current_device())

    @property
    def dtype(self) -> torch.dtype:
        """Of weights: Triton's interpreter gets bfloat16 products wrong."""
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def models(self) -> tuple[ModelShape, ...]:
        """Whose shapes to measure, the most telling first."""
        return (SMOKE,) if self.smoke else MODELS[: 1 if self.brief else None]

    def note(self, **values: Any) -> None:
        """Add to what was found."""
        self.values |= values
        write_json(self.piece, self.values)

    def cell(self, name: str, entry: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Add ``entry``, with what ``work`` found, to the list ``name``; or why it found nothing.

        Once the time is over nothing more is begun; the entry says so.
        """
        cells: list[dict[str, Any]] = self.values.setdefault(name, [])
        if self.left <= 0:
            cells.append(entry | {"skipped": "no time left"})
        else:
            self.note(doing=", ".join(str(value) for value in entry.values()))
            try:
                cells.append(entry | work())
            except Exception as error:  # out of memory, a compiler's refusal: the other cells go on
                cells.append(entry | {"error": one_line(error)})
        self.note()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give the memory of what was deleted back to the card."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
