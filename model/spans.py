"""Names for profilers: the stages of a decode as ranges, which cost nothing while no profiler looks."""

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A range of that name for ``torch.profiler``, and for NVTX under ``torch.autograd.profiler.emit_nvtx``."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else NOTHING
