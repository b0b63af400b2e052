"""The operations as ``torch.ops.kangaroo.*``, for ``torch.compile``: importing this module registers them.

This is a thin layer over the plain functions, which do not use it. It takes tensors and numbers and returns new tensors
(``qkv_rope`` also writes its caches). Positions and seeds are tensors on the device, and so is the RoPE table, in real
numbers. CUDA tensors go to the Triton kernels, on whichever GPU they lie, CPU tensors to the references. Each operation
has a fake kernel, which gives only shapes and dtypes, so ``torch.compile(fullgraph=True)`` takes it. ``operation.py``
has the schemas.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels.operation import OPERATIONS, Operation
from kangaroo_kernels.packed_weight import Layout, PackedWeight

NAMESPACE = "kangaroo"
_library = torch.library.Library(NAMESPACE, "DEF")


def _call(names: Sequence[str], function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call ``function`` with a schema's arguments, which have the same names; a ``bias`` joins its weight."""
    given = dict(zip(names, args, strict=False)) | kwargs
    bias = given.pop("bias", None)
    if bias is not None:
        given["weight"] = PackedWeight(given["weight"], bias, Layout.ROWS)
    result = function(**given)
    return result.contiguous() if isinstance(result, Tensor) else tuple(result)  # a reference may return a view


def _launch(names: Sequence[str], operation: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call the kernel on the GPU of its first argument; Triton alone would launch on the current one."""
    with torch.cuda.device_of(args[0]):
        return _call(names, operation.launcher, args, kwargs)


def _register(operation: Operation, schema: str, fake: Callable[..., Any]) -> None:
    """Define an operation; its kernel is imported when it is first called."""
    name = operation.name
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    names = [argument.name for argument in getattr(torch.ops.kangaroo, name).default._schema.arguments]
    _library.impl(name, lambda *args, **kwargs: _launch(names, operation, args, kwargs), "CUDA")
    _library.impl(name, lambda *args, **kwargs: _call(names, operation.reference, args, kwargs), "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


for _row in OPERATIONS.values():
    if _row.schema is not None and _row.fake is not None:
        _register(_row, _row.schema, _row.fake)
