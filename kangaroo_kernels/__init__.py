"""Kangaroo decoding on hand-written kernels: lossless self-speculative decoding for Llama models.

The kernels and their PyTorch references live here; the runtime is ``kangaroo_kernels.model``. The public names below
are imported on first use, so that importing the operations stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Commit": "kangaroo_kernels.model.results",
    "DecodeStats": "kangaroo_kernels.model.results",
    "Draft": "kangaroo_kernels.model.drafters.protocol",
    "Drafter": "kangaroo_kernels.model.drafters.protocol",
    "Generation": "kangaroo_kernels.model.results",
    "Kangaroo": "kangaroo_kernels.model.kangaroo",
    "KangarooError": "kangaroo_kernels.model.errors",
    "Progress": "kangaroo_kernels.model.results",
    "Session": "kangaroo_kernels.model.session",
    "Settings": "kangaroo_kernels.model.request",
    "Stage": "kangaroo_kernels.model.drafters.protocol",
    "TokenLogprobs": "kangaroo_kernels.model.results",
    "TooLongError": "kangaroo_kernels.model.errors",
    "assistant": "kangaroo_kernels.model.integrations.assistant",
}

__all__ = [
    "Commit",
    "DecodeStats",
    "Draft",
    "Drafter",
    "Generation",
    "Kangaroo",
    "KangarooError",
    "Progress",
    "Session",
    "Settings",
    "Stage",
    "TokenLogprobs",
    "TooLongError",
    "__version__",
    "assistant",
]

if TYPE_CHECKING:
    from kangaroo_kernels.model.drafters.protocol import Draft, Drafter, Stage
    from kangaroo_kernels.model.errors import KangarooError, TooLongError
    from kangaroo_kernels.model.integrations.assistant import assistant
    from kangaroo_kernels.model.kangaroo import Kangaroo
    from kangaroo_kernels.model.request import Settings
    from kangaroo_kernels.model.results import Commit, DecodeStats, Generation, Progress, TokenLogprobs
    from kangaroo_kernels.model.session import Session


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
