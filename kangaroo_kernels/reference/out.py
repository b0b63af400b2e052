"""How every reference treats ``active`` and ``out``, as the kernels do."""

import torch
from torch import Tensor


def is_down(active: Tensor | None) -> bool:
    """Whether a drafting step's flag, ``[1]`` int32, says that there is nothing to do."""
    return active is not None and int(active) == 0


def unwritten(out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The result of an operation that did nothing: ``out`` as it was, or memory with whatever is in it."""
    return torch.empty(shape, dtype=like.dtype, device=like.device) if out is None else out


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    """``result``, in ``out`` if there is one."""
    return result if out is None else out.copy_(result)
