"""Compile for a GPU that is not here: within ``compile_for``, launchers on ``meta`` tensors compile and run nothing.

They see the arguments, specialisations, options and launch configurations of that GPU, so Triton keeps their kernels
under the keys that it will look for there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kangaroo_kernels.launch_config import LaunchConfig, architecture_file, configured_by, pick

WARP_SIZE = 32


class CompileOnly:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, WARP_SIZE)

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self.target

    def get_current_device(self) -> str:
        """The key of Triton's caches; no GPU has it."""
        return f"compile only: {self.target}"

    def get_current_stream(self, device: object) -> int:
        """None is needed."""
        return 0


@contextmanager
def compile_for(architecture: int, files: tuple[str, ...] = ()) -> Iterator[None]:
    """Within it, launches on ``meta`` tensors are compiled for ``architecture``, 90 for sm_90.

    ``files`` are launch configurations that come before the architecture's own. Triton's driver, its ``JITFunction``
    and the configurations are as before afterwards.
    """
    run, active = JITFunction.run, driver._active  # driver.active would look for a GPU
    files = (*files, architecture_file(architecture))

    def compile_it(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    def shipped(op: str, n: int, k: int, dtype: torch.dtype) -> LaunchConfig:
        return pick(files, op, n, k, str(dtype).removeprefix("torch."))

    JITFunction.run = compile_it
    driver.set_active(CompileOnly(architecture))
    try:
        with configured_by(shipped):
            yield
    finally:
        JITFunction.run = run
        driver._active = active
