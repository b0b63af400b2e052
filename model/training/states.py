"""The target's lessons for the windows of a run: made when a step first asks for one, then kept for the next steps."""

import ctypes
import mmap
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..files import write_whole
from .data import Window
from .teacher import Lesson, Teacher, bytes_per_token

ROOM = {"cpu": 1_500_000_000, "cuda": 8_000_000_000}
"""Bytes of lessons that stay in memory; SmolLM2-135M's take 2.3 kB a token."""
AT_ONCE = 16
"""Windows in a pass of the target. They are always the same ones, so a lesson made again has the same bits."""


class Batch(NamedTuple):
    """Some windows' lessons side by side.

    Attributes:
        tokens: ``[B, T]`` int64, shorter windows padded at their end.
        exit_hidden: ``[B, T, E, hidden]`` bf16, likewise.
        final: ``[B, T, hidden]`` bf16, the last layer's output, likewise.
        places: ``[P]`` int64, the learned positions among the ``B * T``.
        normed: ``[P, hidden]`` bf16, what the target's head reads at them.
        log_total: ``[P]`` float32, as in ``Lesson``.
        halves: which of the P are every window's first, third, ... one, and which are the others.
    """

    tokens: Tensor
    exit_hidden: Tensor
    final: Tensor
    places: Tensor
    normed: Tensor
    log_total: Tensor
    halves: tuple[Tensor, Tensor]


def in_pages_of_its_own(tensor: Tensor) -> Tensor:
    """A copy that is not on the C library's heap.

    Steps and passes take temporaries of many megabytes. Between them, lessons that stay would pin one hole of the heap
    after the other: SmolLM2's process grew by 57 MB a pass, to 15 GB, where its lessons took 1 GB.
    """
    pages = mmap.mmap(-1, max(tensor.nbytes, 1))
    return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)


FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""How many kernels two caches may hold on a CPU: oneDNN's own, and the one that PyTorch has in front of it."""


def keep_few_kernels() -> None:
    """Bound both caches, unless the caller has; it must be said before the first product.

    They keep a kernel with its memory for every shape of a product, the last 1,024 each, and nearly every step has
    shapes of its own (https://github.com/pytorch/pytorch/issues/27971). With windows of up to 512 tokens SmolLM2's
    process had 5.6 GB after 420 steps.
    """
    for name, capacity in FEW_KERNELS.items():
        os.environ.setdefault(name, capacity)


def give_back_free_memory() -> None:
    """Let the C library give the free pages of its heap back to the system, where it can.

    Passes over windows of ever other lengths leave holes that fit no later temporary.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reached(step: int, size: int, reuse: int) -> int:
    """How many windows were reached when a step draws ``size`` of them, where each is to be drawn ``reuse`` times."""
    return size + step * size // reuse


class Lessons:
    """The lessons of some windows.

    Args:
        teacher: makes them.
        windows: theirs.
        folder: keeps all of them on disk; None keeps the latest ones in memory.

    Attributes:
        capacity: how many of the windows may stay.
    """

    def __init__(self, teacher: Teacher, windows: list[Window], folder: Path | None = None) -> None:
        self.teacher, self.windows, self.folder = teacher, windows, folder
        self.kept: dict[int, Lesson] = {}
        longest = max(len(window.tokens) for window in windows)
        size = longest * bytes_per_token(teacher.head.shape[1], len(teacher.exit_layers))
        room = ROOM[teacher.device.type] // size - AT_ONCE
        self.capacity = len(windows) if folder else min(len(windows), max(room, AT_ONCE))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, index: int) -> Lesson:
        if self.folder and (file := self._file(index)).exists():
            return Lesson(*(part.to(self.teacher.device) for part in torch.load(file, weights_only=True)))
        if index not in self.kept:
            self._make(index // AT_ONCE * AT_ONCE)
        return self.kept[index]

    def _make(self, first: int) -> None:
        """Lessons for the windows from ``first`` on; in memory the oldest go."""
        tokens = [window.tokens for window in self.windows[first : first + AT_ONCE]]
        made = dict(enumerate(self.teacher.lessons(tokens), first))
        if self.folder:
            for index, lesson in made.items():
                write_whole(self._file(index), partial(torch.save, tuple(part.cpu() for part in lesson)))
            self.kept = made
            return
        for index in [*self.kept][: max(0, len(self.kept) - self.capacity)]:
            del self.kept[index]
        if self.teacher.device.type == "cpu":
            made = {index: Lesson(*map(in_pages_of_its_own, lesson)) for index, lesson in made.items()}
            give_back_free_memory()
        self.kept |= made

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:07d}.pt"

    def draw(self, step: int, size: int, reuse: int, generator: torch.Generator, processes: int = 1) -> list[int]:
        """The windows of a step: any of the latest that were reached, of which there are more at every step.

        ``size`` windows are drawn, and each is to be drawn ``reuse`` times; ``processes`` share the lessons.
        """
        newest = reached(step, size, reuse)
        oldest = max(0, newest - self.capacity * processes)
        return (torch.randint(oldest, newest, (size,), generator=generator) % len(self.windows)).tolist()

    def batch(self, indices: list[int]) -> Batch:
        """The lessons of some windows; nothing here waits for a GPU."""
        lessons = [self[index] for index in indices]
        exit_hidden = pad_sequence([lesson.exit_hidden for lesson in lessons], batch_first=True)
        final = pad_sequence([lesson.final for lesson in lessons], batch_first=True)
        width, device = exit_hidden.shape[1], exit_hidden.device
        tokens = pad_sequence([self.windows[index].tokens for index in indices], batch_first=True)
        tokens = tokens.to(device, non_blocking=True)
        learned = [self.windows[index].learned.nonzero()[:, 0] for index in indices]
        odd = torch.cat([torch.arange(len(at)) % 2 for at in learned])
        halves = [(odd == rest).nonzero()[:, 0].to(device, non_blocking=True) for rest in (0, 1)]
        flat = torch.cat([row * width + at for row, at in enumerate(learned)]).to(device, non_blocking=True)
        log_total = pad_sequence([lesson.log_total for lesson in lessons], batch_first=True).flatten()[flat]
        normed = self.teacher.normed(final.flatten(0, 1)[flat])
        return Batch(tokens, exit_hidden, final, flat, normed, log_total, (halves[0], halves[1]))
