"""Stands in for an sm_90 GPU where there is none: kernels are compiled, loaded and launched, and none runs.

Launchers called on CPU or ``meta`` tensors take the launch configurations, options and specialisations of a GPU. With
``STANDIN=compute`` a launcher also calls its reference, so that whole decodes go on. As a pytest plugin it leads GPU
tests through their launches; run them with ``python -O`` and ``--assert=plain``, for nothing that they hold is true.
The kernels that were asked for are noted in the file ``$STANDIN_USED``.
"""

import os
from contextlib import nullcontext
from functools import wraps
from importlib import import_module
from pathlib import Path

import pytest
import torch
from compiled import CompileOnly
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kangaroo_kernels import launch_config
from kangaroo_kernels.draft_loop import kernel as draft_loop_kernel
from kangaroo_kernels.draft_loop import table
from kangaroo_kernels.shared import chain, launch

OPS = [
    "accept",
    "attention",
    "commit",
    "draft_loop",
    "gate_up",
    "linear_residual",
    "qkv_rope",
    "sample_head",
    "top1_head",
]
MODULES = [import_module(f"kangaroo_kernels.{op}") for op in OPS]
hits, compiled = [], []


def note(*, src, metadata_group, cache_hit, **event):
    """Triton tells of every kernel once a process."""
    (hits if cache_hit else compiled).append(src.name)
    with open(os.environ["STANDIN_USED"], "a", encoding="utf-8") as file:
        file.write(Path(next(iter(metadata_group.values()))).parent.name + "\n")


def everywhere(name, function):
    """Put ``function`` in the place of a shared one, in every module that has it by name."""
    for module in (*MODULES, draft_loop_kernel, table, chain, launch):
        if hasattr(module, name):
            setattr(module, name, function)


def on_meta(function):
    """As it decides for a device that is not a CPU."""
    return wraps(function)(lambda x, *more: function(x.new_empty(0, device="meta"), *more))


def computing(module, op):
    """The launcher, then the reference."""
    launch, reference = getattr(module, op), getattr(import_module(f"kangaroo_kernels.reference.{op}"), op)

    @wraps(launch)
    def both(*args, **kwargs):
        launch(*args, **kwargs)
        return reference(*args, **kwargs)

    setattr(module, op, both)


class Driver(CompileOnly):
    """Takes a binary that fits into an H100's shared memory, and any launch."""

    class utils:  # noqa: N801 (Triton's name)
        load_binary = staticmethod(lambda name, kernel, shared, device: (name, name, 0, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

    launcher_cls = staticmethod(lambda src, metadata: lambda *args: None)


class Graph:
    """What is captured has been launched by then; a replay does nothing."""

    def replay(self):
        pass


def install():
    run = JITFunction.run

    def prefetching(kernel, *args, **kwargs):
        """What ``draft_loop`` leaves out on a CPU."""
        more = {"PREFETCHED": draft_loop_kernel.PREFETCHED_STEPS} if kernel.fn.__name__ == "draft_loop_kernel" else {}
        return run(kernel, *args, **kwargs | more)

    knobs.compilation.listener, JITFunction.run = note, prefetching
    driver.set_active(Driver(90))
    launch_config.files_for = lambda device: ("sm_90.json",)
    everywhere("require_interpreter", lambda op, x: None)
    everywhere("chain", on_meta(chain.chain))
    everywhere("gpu_options", on_meta(table.gpu_options))
    cuda = torch.cuda
    cuda.CUDAGraph, cuda.graph = Graph, lambda *args, **kwargs: nullcontext()
    cuda.set_sync_debug_mode = cuda.synchronize = lambda *args: None
    cuda.mem_get_info = lambda *args: (0, 0)
    if os.environ.get("STANDIN") == "compute":
        for module, op in zip(MODULES, OPS, strict=True):
            computing(module, op)
        operations = import_module("kangaroo_kernels.model.backend")
        operations.load_operations = lambda kernels, device, dtype: operations._triton_operations()


install()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """No test waits for a GPU."""
    for item in items:
        item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]


def pytest_unconfigure():
    print(f"\nstandin: {len(compiled)} compiled, {len(hits)} found", flush=True)
