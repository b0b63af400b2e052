"""Kernels whose place in Triton's cache does not depend on what was launched before them.

Triton's key of a function holds the constants of the functions that it calls, but only of those whose own keys were
asked for earlier. So the key of one and the same kernel would depend on the order of the first launches, and kernels
compiled ahead would not be found.
"""

from types import ModuleType
from typing import Any, TypeVar

from triton.runtime.jit import JITCallable

Kernel = TypeVar("Kernel")


def stable_key(kernel: Kernel) -> Kernel:
    """Ask for the keys of all functions that ``kernel`` calls, the innermost first, and for its own last.

    It goes above ``triton.jit`` and returns what it is given. The constants that a kernel uses must be defined before
    it. In Triton's interpreter there are no keys, and nothing happens.
    """
    _ask(kernel, set())
    return kernel


def _ask(function: Any, asked: set[int]) -> None:
    if not isinstance(function, JITCallable) or id(function) in asked:
        return
    asked.add(id(function))
    names, scope = function.fn.__code__.co_names, function.fn.__globals__
    used = [scope.get(name) for name in names]
    used += [getattr(module, name, None) for module in used if isinstance(module, ModuleType) for name in names]
    for each in used:
        _ask(each, asked)
    _ = function.cache_key
