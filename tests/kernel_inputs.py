"""Inputs that a kernel can get wrong: framed in NaN, strided, at odd offsets, at the edge of the memory there is."""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS, Top1

KERNEL_DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""Triton's interpreter does not multiply bfloat16 rightly, so that one waits for a GPU."""

HALF_DTYPES = [torch.float16, torch.bfloat16]


def slack(dtype: torch.dtype) -> float:
    """Roundings beyond PyTorch's own error: float32 sums are taken in another order, halves are rounded twice."""
    return 8 if dtype == torch.float32 else 2


def drawer(seed: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """``draw(*shape, scale=1.0)``: normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(device)

    return draw


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


# ---- frames: who reads past an edge gets NaN, who writes past it is seen


class Framed(NamedTuple):
    """A matrix in the middle of a buffer of NaN."""

    inner: Tensor
    buffer: Tensor

    def frame_is_untouched(self) -> bool:
        """Whether the buffer holds its NaN, bit for bit, wherever the matrix is not."""
        around = self.buffer.clone()
        around.as_strided(self.inner.shape, self.inner.stride(), self.inner.storage_offset()).fill_(float("nan"))
        return same_bits(around, torch.full_like(around, float("nan")))


def framed(values: Tensor, above: int = 1, below: int = 2, left: int = 5, right: int = 3) -> Framed:
    """A copy of ``values`` ``[R, C]`` with so many rows and columns around it."""
    (rows, columns), nan = values.shape, float("nan")
    buffer = values.new_full((above + rows + below, left + columns + right), nan)
    inner = buffer[above : above + rows, left : left + columns]
    inner.copy_(values)
    return Framed(inner, buffer)


def poisoned(rows: int, columns: int, like: Tensor) -> Framed:
    """An output to be written: NaN inside of the frame, too, and room for the rows that a tile has beyond M."""
    return framed(like.new_full((rows, columns), float("nan")), below=MAX_ROWS)


def poisoned_top1(rows: int, device: torch.device) -> Top1:
    """Memory for a head's results that holds none."""
    return Top1(torch.full((rows,), -7, device=device), torch.full((rows,), float("nan"), device=device))


def same_top1(one: Top1, other: Top1) -> bool:
    """Equal to the last bit, NaN included."""
    return all(map(same_bits, one, other))


ROW_STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns of a wider buffer": lambda x: framed(x, left=0, right=7).inner,
    "columns of a much wider buffer": lambda x: framed(x, left=x.shape[1], right=2 * x.shape[1]).inner,
    "columns from an odd offset on": lambda x: framed(x, left=1, right=6).inner,
    "rows of a taller buffer": lambda x: framed(x, above=3, below=1, left=0, right=0).inner,
    "every other row": lambda x: framed(x.repeat_interleave(2, dim=0), left=0, right=0).inner[::2],
    "a transposed buffer": lambda x: framed(x.t(), left=2, right=1).inner.t(),
    "every other column": lambda x: framed(x.repeat_interleave(2, dim=1), left=16, right=16).inner[:, ::2],
}
"""The same rows, laid out otherwise."""


# ---- rows among other rows


def placements(row: Tensor, draw: Callable[..., Tensor], rows: Iterator[int]) -> Iterator[tuple[Tensor, int]]:
    """``row`` ``[1, K]`` at every place among so many ``rows``; its neighbours are random, and new every time."""
    for count in rows:
        for place in range(count):
            x = draw(count, row.shape[1])
            x[place] = row[0]
            yield x, place


# ---- the edge of the memory


def guarded(values: Tensor, at_end: bool) -> Tensor:
    """A copy of ``values`` after whose end, or before whose start, any access is a segmentation fault.

    A tensor that does not fill whole words of 16 bytes is at the end not aligned to them, as any row of a buffer is.
    """
    page, size = mmap.PAGESIZE, prod(values.shape) * values.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    for guard in (address, address + (pages + 1) * page):
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    return copy.view(values.shape).copy_(values)
