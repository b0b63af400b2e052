"""Programmatic dependent launch, sm_90 and later: a kernel begins while the one before still runs, and waits inside.

This hides the launch and the first loads of the weight, which no earlier kernel writes: they are on their way to the L2
while the kernel before drains. Everything else comes after ``follow``, even the read of a drafting step's flag: if a
program left without waiting, a kernel could end before the one that it follows, and the next one could start too early.

It is off unless a GPU's launch configurations say otherwise (``launch_config.is_chained``).
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kangaroo_kernels.launch_config import is_chained
from kangaroo_kernels.shared.grid import prefetch
from kangaroo_kernels.shared.tiles import elements

OLDEST = (9, 0)
"""The lowest compute capability that has programmatic dependent launch."""

LINE_BYTES = tl.constexpr(128)
LINES = tl.constexpr(8)
"""Cache lines of each weight row that are fetched ahead: two steps along K."""


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait until the kernel before is done and its writes are visible; then the next one may begin, and waits, too."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_ahead(w_ptr, w_row_stride, N, K, active_ptr, BLOCK_N: tl.constexpr, CHAINED: tl.constexpr):
    """Prefetch the beginnings of this program's weight rows into the L2, unless a flag may skip the step."""
    if CHAINED and active_ptr is None:
        rows = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
        offs = tl.arange(0, LINES) * elements(LINE_BYTES, w_ptr)
        w_row_ptrs = w_ptr + rows.to(tl.int64) * w_row_stride
        prefetch(w_row_ptrs[:, None] + tl.minimum(offs, K - 1)[None, :])


@lru_cache(maxsize=8)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def chain(x: Tensor) -> dict[str, Any]:
    """The options of a launch on the device of ``x`` that say whether it is chained."""
    device = x.device
    able = device.type != "cpu" and (device.type != "cuda" or _capability(device) >= OLDEST)
    return {"CHAINED": True, "launch_pdl": True} if able and is_chained(device) else {"CHAINED": False}
