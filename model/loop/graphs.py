"""Run a piece of device work again and again: captured in a CUDA graph on a GPU, called directly on a CPU.

It knows nothing of models. Work is a callable that launches on the current stream and reads and writes memory which
stays where it is: the runner's own buffers, or tensors that it was told to rely on. A key stands for everything that
capture bakes in: the shapes, and which kernels are launched.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Kept = TypeVar("Kept")

MOST_GRAPHS = 32
"""The most graphs that are kept at a time; the one that has not run for longest goes first."""


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep garbage collection off: a graph or a tensor that it frees during a capture would break the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphRunner:
    """Runs work by key: the first time as it is, the second time captured, from then on as one graph launch.

    The first run compiles kernels and makes what libraries make once, neither of which a capture allows. It is a run
    like any other, so work may change what it reads.

    Args:
        device: where all the work runs.
        capture: False runs everything as it is; on a CPU there is nothing to capture.

    Attributes:
        captured_bytes: bytes that captures took on the device for intermediate results; all graphs share them.
    """

    def __init__(self, device: torch.device, capture: bool = True) -> None:
        self.device = device
        self.captures = capture and device.type == "cuda"
        self._buffers: dict[str, Tensor] = {}
        self._relied_on: dict[str, tuple[tuple[object, ...], ...]] = {}
        self._forget()

    def _forget(self) -> None:
        self._ran: set[Hashable] = set()
        self._kept: dict[str, Any] = {}
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self._pool: Any = None  # a handle, whose type is PyTorch's own
        self._stream: torch.cuda.Stream | None = None
        self.captured_bytes = 0

    @property
    def graphs(self) -> int:
        """How many graphs are kept."""
        return len(self._graphs)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers.values())

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The static buffer of that name, zeros when new; another shape or dtype replaces it and drops all graphs."""
        known = self._buffers.get(name)
        if known is not None and known.shape == shape and known.dtype == dtype:
            return known
        if known is not None:
            self.clear()
        self._buffers[name] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._buffers[name]

    def rely_on(self, name: str, *tensors: Tensor) -> None:
        """Name memory that work reads and others own; where any has moved or changed shape, every graph is dropped."""
        memory = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors)
        if self._relied_on.get(name, memory) != memory:
            self.clear()
        self._relied_on[name] = memory

    def keep(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What ``make`` returned when that name was first asked for; it is dropped together with the graphs."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: Kept = self._kept[name]
        return kept

    def clear(self) -> None:
        """Drop every graph, its memory and what was kept for it; buffers stay."""
        self._wait()
        self._forget()

    def _wait(self) -> None:
        """Wait for the device: a graph that runs must not be dropped."""
        if self._graphs:
            torch.cuda.synchronize(self.device)

    def run(self, key: Hashable, work: Callable[[], None]) -> bool:
        """Do ``work``, which must be the same for the same ``key``; the host does not wait for it.

        Returns:
            Whether this run took no longer than later ones of its key: nothing was compiled for it or captured.
        """
        known = key in self._ran
        if not (known and self.captures):
            work()
            self._ran.add(key)  # once its kernels are compiled, which a capture must not do
            return known
        captured = key in self._graphs
        if not captured:
            if len(self._graphs) == MOST_GRAPHS:
                self._wait()
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(work)
        self._graphs.move_to_end(key)
        self._graphs[key].replay()
        return captured

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._pool is None:  # the stream goes with it; PyTorch's own is on the GPU that captured first
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        graph = torch.cuda.CUDAGraph()
        how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with no_garbage_collection(), torch.cuda.graph(graph, **how):
            before = torch.cuda.memory_reserved(self.device)
            work()
            self.captured_bytes += torch.cuda.memory_reserved(self.device) - before
        return graph
