"""Gives Triton's interpreter what a card's tensor cores have: a row of a product does not depend on the rows beside it.

NumPy hands a product to BLAS, which on some processors sums a row in another order where it lies elsewhere in the tile.
Here every row is a product of its own, in the same order wherever it lies, so tests can hold bits on a CPU, too.
"""

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def create_dot(builder: InterpreterBuilder, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
    """``a @ b + d`` in the dtype of ``d``."""
    product = np.matmul(a.data[..., :, None, :], b.data[..., None, :, :], dtype=d.data.dtype)[..., 0, :]
    return TensorHandle(product + d.data, d.dtype.scalar)


def install() -> None:
    """From now on, in this process."""
    InterpreterBuilder.create_dot = create_dot
