"""What the device tells the host, after the fact: copies of a tensor in pinned memory, read in the order of posting."""

from collections import deque

import torch
from torch import Tensor


class Mailbox:
    """A ring of copies of ``source``, ``[N]`` int64. Posting never waits; reading waits for its own copy alone.

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

    def read(self) -> list[int]:
        """The oldest unread copy."""
        slot, event = self._posted.popleft()
        if event is not None:
            event.synchronize()
        values: list[int] = slot.tolist()
        self._free.append(slot)
        return values
