"""What counts as a number in a setting or a file: Python's and NumPy's do, True and False do not."""

from numbers import Real
from typing import Any, TypeGuard

from kangaroo_kernels.shared.checks import is_whole

__all__ = ["is_number", "is_whole", "plain_number"]


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number, Python's or NumPy's; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain_number(value: Any) -> Any:
    """The same as Python's own ``int`` or ``float``; anything else, None for instance, as it is."""
    return int(value) if is_whole(value) else float(value) if is_number(value) else value
