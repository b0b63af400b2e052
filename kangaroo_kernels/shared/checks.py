"""What a kernel's launcher and its reference refuse alike: numbers by value, tensors by their outside, never read."""

from collections.abc import Sequence

import torch
from torch import Tensor

SEEDS = 1 << 64
COUNTS = 1 << 63
"""Above every position and length: they are kept in 64 bits, one of them the sign."""

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def is_whole(value: object) -> bool:
    """Whether ``value`` counts something: an int, also NumPy's."""
    return hasattr(value, "__index__")


def check_one(op: str, name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a number in device memory is one element of ``dtype`` on ``device``."""
    if value.dtype != dtype or value.numel() != 1 or value.device != device:
        raise TypeError(
            f"{op}: {name} is {list(value.shape)} {value.dtype} on {value.device}; "
            f"it must be [1] {dtype} on {device}, or a number where the host knows it."
        )


def check_count(op: str, name: str, value: int | Tensor, device: torch.device) -> None:
    """Raise unless a position or length is a whole number from 0 on, or ``[1]`` int64 on ``device``."""
    if isinstance(value, Tensor):
        check_one(op, name, value, torch.int64, device)
    elif not is_whole(value) or not 0 <= value < COUNTS:
        raise ValueError(f"{op}: {name} is {value!r}; it must be a whole number from 0 to 2^63 - 1, or [1] int64.")


def check_sampling(
    op: str,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    seed: int | Tensor,
    device: torch.device,
) -> None:
    """Raise for numbers that no token can be drawn with.

    The temperature is kept as a float32; where it is infinite there, so would be the score of what lies beside the
    vocabulary.
    """
    if isinstance(temperature, Tensor):
        check_one(op, "temperature", temperature, torch.float32, device)
    elif not SMALLEST <= temperature <= LARGEST:
        raise ValueError(f"{op}: temperature is {temperature!r}; it must be above 0 and finite, as a float32.")
    if isinstance(top_k, Tensor):
        check_one(op, "top_k", top_k, torch.int64, device)
    elif top_k is not None and not (is_whole(top_k) and top_k >= 1):
        raise ValueError(f"{op}: top_k is {top_k!r}; it must be a whole number of at least 1, or None to keep all.")
    if isinstance(top_p, Tensor):
        check_one(op, "top_p", top_p, torch.float32, device)
    elif top_p is not None and not top_p > 0:
        raise ValueError(f"{op}: top_p is {top_p!r}; it must be above 0, or None to keep all.")
    if isinstance(seed, Tensor):
        check_one(op, "seed", seed, torch.int64, device)
    elif not is_whole(seed) or not 0 <= seed < SEEDS:
        raise ValueError(f"{op}: seed is {seed!r}; it must be a whole number from 0 to 2^64 - 1, or [1] int64.")


def check_tensor(
    op: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless ``tensor`` has this shape (at least a dimension), dtype and device, and contiguous rows."""
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    if not fits or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        stride = f", last stride {tensor.stride(-1)}" if tensor.ndim else ""
        raise ValueError(
            f"{op}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}{stride}; "
            f"it must be {list(shape)} {dtype} on {device}, last stride 1."
        )
