"""Kangaroo decoding on hand-written kernels: lossless self-speculative decoding for Llama models.

The kernels' references live here and import torch alone; the runtime is ``kangaroo_kernels.model``. The public names
below are fetched on first use, so that importing the operations stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Kangaroo": "kangaroo_kernels.model.kangaroo",
    "Generation": "kangaroo_kernels.model.kangaroo",
    "Progress": "kangaroo_kernels.model.kangaroo",
    "DecodeStats": "kangaroo_kernels.model.loop.decode",
    "KangarooError": "kangaroo_kernels.model.errors",
}

__all__ = ["DecodeStats", "Generation", "Kangaroo", "KangarooError", "Progress", "__version__"]

if TYPE_CHECKING:
    from kangaroo_kernels.model.errors import KangarooError
    from kangaroo_kernels.model.kangaroo import Generation, Kangaroo, Progress
    from kangaroo_kernels.model.loop.decode import DecodeStats


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
