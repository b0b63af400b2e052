"""A mode in which nothing goes from a tensor to the host, or from there to a tensor: as in a captured graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from kangaroo_kernels.model.loop.iteration import Iteration
from kangaroo_kernels.shared import launch as launch_module

ASKS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__bool__,
    Tensor.__index__,
    Tensor.__array__,
    Tensor.__contains__,
    torch.equal,
    torch.allclose,
}
"""Calls that answer with something on the host."""

TELLS = {torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor}
"""Calls that copy from the host's memory."""

ATEN = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::_unique2",
}
"""The same from below, whoever calls."""


class HostReadError(AssertionError):
    """Something asked."""


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Within it, asking the device raises ``HostReadError``. Triton's interpreter may: it stands for the device.

    So does a plain number that is kept on the device for a while only: a graph would go on reading it.
    """
    depth = 0
    launch = GridExecutor.__call__

    def on_the_device(executor: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            return launch(executor, *args, **kwargs)
        finally:
            depth -= 1

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not depth and func in ASKS | TELLS:
                raise HostReadError(f"{getattr(func, '__name__', func)} was called")
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name().partition(".")[0]
            by_mask = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
            if not depth and (name in ATEN or by_mask):
                raise HostReadError(f"{func} was dispatched")
            return func(*args, **(kwargs or {}))

    def for_a_while(value: float, device: torch.device) -> Tensor:
        raise HostReadError(f"the number {value} was given")

    with pytest.MonkeyPatch.context() as patch, Functions(), Operators():
        patch.setattr(GridExecutor, "__call__", on_the_device)
        patch.setattr(launch_module, "_kept_count", for_a_while)
        patch.setattr(launch_module, "_kept_number", for_a_while)
        yield


def iterations_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every iteration run within ``no_host_reads``; on a GPU a captured graph refuses by itself."""
    if torch.cuda.is_available():
        return
    run = Iteration.run

    def forbidding(iteration: Iteration, reach: int) -> None:
        with no_host_reads():
            run(iteration, reach)

    monkeypatch.setattr(Iteration, "run", forbidding)
