"""What the device tells the host, after the fact: copies of a tensor in pinned memory, and how long work took.

Both are read in the order in which they were launched.
"""

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor


class Mailbox:
    """A ring of copies of ``source``, ``[N]``. Posting never waits; reading waits for its own copy alone.

    Args:
        source: on the device; its value at the time of posting, in the order of the current stream, is what is read.
        slots: the most copies that may be unread.
    """

    def __init__(self, source: Tensor, slots: int) -> None:
        self.source, self.on_gpu = source, source.device.type == "cuda"
        rows = torch.empty((slots, *source.shape), dtype=source.dtype, pin_memory=self.on_gpu)
        self._free = deque(rows.unbind())
        self._posted: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._posted)

    def post(self) -> None:
        """Copy ``source`` as the work that was launched so far will leave it."""
        slot = self._free.popleft()
        slot.copy_(self.source, non_blocking=True)
        event = None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
        self._posted.append((slot, event))

    def read(self) -> list[Any]:
        """The oldest unread copy."""
        slot, event = self._posted.popleft()
        if event is not None:
            event.synchronize()
        values: list[Any] = slot.tolist()
        self._free.append(slot)
        return values


class Stopwatch:
    """Times pieces of work, each begun when the one before has ended; starting and stopping never wait.

    Args:
        device: where the work runs. A GPU's own time is taken, so what the host does meanwhile does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: deque[Any] = deque()

    def mark(self) -> None:
        """A piece begins or ends here, in the order of the current stream."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> float:
        """Seconds that the oldest unread piece took, which has ended."""
        began, ended = self._marks.popleft(), self._marks.popleft()
        if not self._on_gpu:
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3
