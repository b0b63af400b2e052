"""CUDA's current device on a machine without a GPU: what is selected, by which thread, and until when."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class Current(threading.local):
    """The current GPU of each thread."""

    index = 0


@contextmanager
def pretended_gpus(monkeypatch: pytest.MonkeyPatch, current: int = 0, count: int = 2) -> Iterator[Current]:
    """PyTorch sees ``count`` GPUs, of which this thread's current one is ``current``; nothing can be launched."""
    state = Current()
    state.index = current

    @contextmanager
    def select(device: torch.device | int) -> Iterator[None]:
        before, state.index = state.index, device.index if isinstance(device, torch.device) else device
        try:
            yield
        finally:
            state.index = before

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "current_device", lambda: state.index)
        patch.setattr(torch.cuda, "device", select)
        patch.setattr(torch.cuda, "device_of", lambda tensor: select(tensor.device))
        yield state
