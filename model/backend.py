"""Which implementation of the operations a decode runs on: the Triton kernels or their references."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_ROWS, Match, Ranked, Top1, Walk, Weighed
from kangaroo_kernels.operation import OPERATIONS
from kangaroo_kernels.packed_weight import Layout
from kangaroo_kernels.reference.top1_head import lm_head

from .errors import KangarooError

KERNELS = ("triton", "reference")


@dataclass(frozen=True)
class Backend:
    """The operations of a decode step and what a decode must know of them; their references document the rest.

    Attributes:
        name: one of ``KERNELS``.
        resident: whether the decode loop lives on the device; else the host leads it.
        max_rows: the most tokens in flight that the operations take; None means any number.
        layout: of the weights that these operations read; None where any will do.
    """

    name: str
    resident: bool
    max_rows: int | None
    layout: Layout | None
    qkv_rope: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    linear_residual: Callable[..., Tensor]
    gate_up: Callable[..., Tensor]
    top1_head: Callable[..., Top1]
    sample_head: Callable[..., Top1]
    look_up: Callable[..., Match]
    weigh: Callable[..., Weighed]
    accept: Callable[..., Tensor]
    rank: Callable[..., Ranked]
    grow: Callable[..., None]
    walk: Callable[..., Walk]
    straighten: Callable[..., None]
    commit: Callable[..., None]
    draft_loop: Callable[..., Top1]
    lm_head: Callable[..., Tensor]
    prepare_draft_loop: Callable[..., Any]

    def for_rows(self, rows: int) -> "Backend":
        """These operations, or the references (cuBLAS, SDPA) for a prefill of more rows than the kernels take."""
        return self if self.max_rows is None or rows <= self.max_rows else REFERENCES


REFERENCES = Backend(
    name="reference",
    resident=False,
    max_rows=None,
    layout=None,
    **{name: operation.reference for name, operation in OPERATIONS.items()},
    lm_head=lm_head,
    prepare_draft_loop=lambda model, most: None,  # the reference needs nothing prepared
)


def load_backend(kernels: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend asked for; None means the kernels on a GPU and the references on a CPU.

    Raises:
        KangarooError: an unknown name, no Triton, or a CPU where Triton was not told to interpret.
    """
    if kernels is None:
        kernels = "triton" if device.type == "cuda" else "reference"
    if kernels not in KERNELS:
        raise KangarooError(f"kernels {kernels!r} are unknown; use one of {', '.join(KERNELS)}.")
    if kernels == "reference":
        return REFERENCES
    try:
        from triton import knobs
    except ImportError as error:
        raise KangarooError("Triton is not installed here; install triton, or use kernels='reference'.") from error
    if device.type == "cpu" and not knobs.runtime.interpret:
        raise KangarooError(
            "on a CPU the Triton kernels run in Triton's interpreter: set TRITON_INTERPRET=1 in the environment before "
            "Python starts, or use kernels='reference'."
        )
    if device.type == "cpu" and dtype == torch.bfloat16:
        raise KangarooError("Triton's interpreter gets bfloat16 products wrong; use dtype float32 or float16 with it.")
    return triton_backend()


def triton_backend() -> Backend:
    """The kernels, wherever they are to run."""
    from kangaroo_kernels.draft_loop import prepare_draft_loop
    from kangaroo_kernels.sample_head import lm_head as kernel_lm_head

    return Backend(
        name="triton",
        resident=True,
        max_rows=MAX_ROWS,
        layout=Layout.ROWS,
        **{name: operation.launcher for name, operation in OPERATIONS.items()},
        lm_head=kernel_lm_head,
        prepare_draft_loop=prepare_draft_loop,
    )
