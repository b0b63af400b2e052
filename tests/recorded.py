"""A kernel that is not launched but written down: what was launched, and how many binaries Triton would compile."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Recorded:
    """Stands for a kernel and keeps how it was launched."""

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self.launches: list[tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **settings: Any) -> None:
            self.launches.append((grid, dict(zip(self.jitted.arg_names, args, strict=False)), settings))

        return launch

    def binaries(self) -> set[object]:
        """What Triton would tell apart: constants, kinds and dtypes, alignment, and numbers that are 1 or 16 n."""
        declared = getattr(self.jitted, "kwargs", vars(self.jitted))  # the interpreter's, or the compiler's
        numbers = set(declared.get("do_not_specialize") or ())
        pointers = set(declared.get("do_not_specialize_on_alignment") or ())
        return {
            (*((name, kind(args[name], name in numbers | pointers)) for name in args), *settings.items())
            for _, args, settings in self.launches
        }


def kind(value: object, alike: bool) -> object:
    """What of an argument makes a binary; ``alike`` where its alignment or value does not."""
    if isinstance(value, Tensor):
        return value.dtype, alike or value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return abs(value) < 2**31, alike or (value == 1, value % 16 == 0)
    return type(value)
