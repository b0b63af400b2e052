"""Stands in for an sm_90 GPU where there is none: kernels are compiled, loaded and launched, and none runs.

Launchers called on CPU or ``meta`` tensors take the launch configurations, options and specialisations of a GPU. With
``STANDIN=compute`` a launcher also calls its reference, so that whole decodes go on. As a pytest plugin it leads GPU
tests through their launches; run them with ``python -O`` and ``--assert=plain``, for nothing that they hold is true.
The kernels that were asked for are noted in the file ``$STANDIN_USED``. So are their launchers, which Triton 3.6
compiles in C: the sources are kept beside the kernels, for ``launchers.py``.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from kangaroo_kernels import launch_config, sample_head
from kangaroo_kernels.draft_loop.table import architecture_of, gpu_options
from kangaroo_kernels.model import backend
from kangaroo_kernels.operation import OPERATIONS
from kangaroo_kernels.reference import top1_head
from kangaroo_kernels.shared.absent_gpu import CompileOnly
from kangaroo_kernels.shared.chain import chain
from kangaroo_kernels.shared.launch import require_interpreter

COMPUTING = os.environ.get("STANDIN") == "compute"
SHARED_BYTES = 232448
"""Of an H100's program."""

found, compiled, broken = list[str](), list[str](), list[str]()


def use(kept: str) -> None:
    """Note the folder of a file in Triton's cache."""
    with open(os.environ["STANDIN_USED"], "a", encoding="utf-8") as file:
        file.write(Path(kept).parent.name + "\n")


def note(*, src: Any, metadata_group: dict[str, str], cache_hit: bool, **event: Any) -> None:
    """Triton tells of every kernel once a process."""
    (found if cache_hit else compiled).append(src.name)
    use(next(iter(metadata_group.values())))


def keep_source(src: str, name: str, **how: Any) -> Any:
    """In the place of Triton's compiling a launcher's C."""
    use(get_cache_manager(hashlib.sha256(src.encode()).hexdigest()).put(src, f"{name}.c", binary=False))
    return SimpleNamespace(launch=None)


def launcher_of(src: Any, metadata: Any) -> Callable[..., None]:
    """Launches nothing; Triton 3.6 also says what it would have compiled for it."""
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(src, metadata)
    return lambda *args: None


def replace(function: Callable[..., Any], other: Callable[..., Any]) -> None:
    """Put ``other`` in the place of a function, in every module of the package that has it."""
    modules = [module for name, module in sys.modules.items() if name.startswith("kangaroo_kernels")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is function:
                setattr(module, name, other)


def on_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    """As it decides for a device that is not a CPU."""
    return wraps(function)(lambda x, *more: function(x.new_empty(0, device="meta"), *more))


def computing(launch: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher, then the reference."""

    @wraps(launch)
    def both(*args: Any, **kwargs: Any) -> Any:
        launch(*args, **kwargs)
        return compute(*args, **kwargs)

    return both


class Driver(CompileOnly):
    """Takes a binary that fits into an H100's shared memory, and any launch."""

    class utils:  # noqa: N801 (Triton's name)
        """What Triton asks of a card."""

        load_binary = staticmethod(lambda name, kernel, shared, device: (name, name, 0, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": SHARED_BYTES})

    launcher_cls = staticmethod(launcher_of)


class Graph:
    """What is captured has been launched by then; a replay does nothing."""

    def replay(self) -> None:
        """Nothing is left to do."""


def install() -> None:
    """Put it all into place."""
    run: Any = JITFunction.run
    steps_ahead = launch_config.pick(("sm_90.json",), "draft_loop", 0, 0, "bfloat16").steps_ahead

    def prefetching(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        """What ``draft_loop`` leaves out on a CPU."""
        more = {"PREFETCHED": steps_ahead} if kernel.fn.__name__ == "draft_loop_kernel" else {}
        return run(kernel, *args, **kwargs | more)

    knobs.compilation.listener, JITFunction.run = note, prefetching
    vars(nvidia).update(compile_module_from_src=keep_source, library_dirs=list)
    driver.set_active(Driver(90))
    replace(launch_config.files_for, lambda device: ("sm_90.json",))
    replace(require_interpreter, lambda op, x: None)
    replace(chain, on_meta(chain))
    for decision in (gpu_options, architecture_of):
        replace(decision, on_meta(decision))
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = Graph, lambda *args, **kwargs: nullcontext()
    cuda.set_sync_debug_mode = cuda.synchronize = cuda.empty_cache = lambda *args: None
    cuda.mem_get_info = lambda *args: (0, 0)
    if COMPUTING:
        for operation in OPERATIONS.values():
            both = computing(operation.launcher, operation.reference)
            replace(operation.launcher, both)
            vars(operation)["launcher"] = both
        replace(sample_head.lm_head, computing(sample_head.lm_head, top1_head.lm_head))
        replace(backend.load_backend, lambda kernels, device, dtype: backend.triton_backend())


install()


def pytest_collectreport(report: Any) -> None:
    """Tests that cannot be imported leave their kernels out."""
    if report.failed:
        broken.append(report.nodeid)
