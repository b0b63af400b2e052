"""Triton's key of a kernel is the same whatever was imported and launched before it, so what was compiled is found."""

import pytest
from compiling import ROOT, printed_by

COLLECT = """
import json
import random
import sys

import triton.language as tl
from triton.runtime.jit import JITFunction

from kangaroo_kernels.operation import OPERATIONS

order, operations = int(sys.argv[1]), [*OPERATIONS.values()]
if order:
    random.Random(order).shuffle(operations)
    tl.philox.cache_key  # another library's kernel may use it
keys, constants = {}, []
for operation in operations:
    operation.launcher
    modules = [module for name, module in sys.modules.items() if name.startswith("kangaroo_kernels")]
    for name, function in [item for module in modules for item in vars(module).items()]:
        if name.endswith("_kernel") and isinstance(function, JITFunction):
            keys.setdefault(name, function.cache_key)  # as if it were launched now
            constants += [[name, repr(value)] for (name, _), (value, _) in function.used_global_vals.items()]
print(json.dumps([keys, constants]))
"""
OLDER_TRITON = ROOT / ".venv" / "triton-3.6"
KERNELS = 19


def collected(order: int, older: bool) -> tuple[dict[str, str], list[tuple[str, str]]]:
    if older and not OLDER_TRITON.is_dir():
        pytest.skip("Triton 3.6 is not there; `make .venv/triton-3.6` fetches it")
    keys, constants = printed_by("-c", COLLECT, str(order), triton=OLDER_TRITON if older else None)
    return keys, constants


@pytest.mark.parametrize("older", [False, True], ids=["this Triton", "Triton 3.6"])
def test_keys_do_not_depend_on_the_order(older):
    wanted, _ = collected(0, older)
    assert len(wanted) == len(set(wanted.values())) == KERNELS
    for order in (1, 2, 3):
        assert collected(order, older)[0] == wanted


def test_a_constant_has_one_value():
    """Triton sorts the constants of a kernel by name; two of one name would change places from process to process."""
    values: dict[str, set[str]] = {}
    for name, value in collected(0, False)[1]:
        values.setdefault(name, set()).add(value)
    assert {"BLOCK_M", "K_STEP_BYTES", "FILTERED"} <= set(values)
    assert {name: each for name, each in values.items() if len(each) > 1} == {}
