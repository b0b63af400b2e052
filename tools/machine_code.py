"""Print the machine code of every launch of some steps: a script for the tree of any commit.

``compare_binaries.py`` gives it to ``python -c`` in this tree and in another commit's, with the names of what to
compile as JSON. So it takes nothing but names that both have: steps and launchers.
"""

import json
import sys
from importlib import import_module
from itertools import product

import torch
from compiled import compile_only
from kernel_calls import META, STEPS

from kangaroo_kernels.workloads import MODELS, Settings

ROWS, LENGTH = 8, 4096
"""Tokens in flight, of which no binary depends on the number, and of the text."""


def compile_all(
    architectures: list[int], steps: list[str], models: list[str], dtypes: list[str]
) -> dict[str, list[tuple[str, int, int]]]:
    """Each case's different binaries: machine code in hexadecimal digits, bytes of dynamic shared memory, warps."""
    found: dict[str, set[tuple[str, int, int]]] = {}
    shapes = [shape for shape in MODELS if shape.name in models]
    chosen = [step for step in STEPS if step.name in steps]
    for architecture in architectures:
        with compile_only(architecture) as launches:
            for dtype, shape, step in product(dtypes, shapes, chosen):
                settings = Settings(1 if step.drafting else ROWS, step.length or LENGTH, getattr(torch, dtype), META)
                for each in step.calls(shape, settings):
                    launches.clear()
                    getattr(import_module(f"kangaroo_kernels.{each.op}"), each.op)(*each.args, **each.kwargs)
                    what = f"{shape.name}, sm_{architecture}, {dtype}, {step.name}: {each.op} {each.role}".strip()
                    for launch in launches:
                        binary = (launch.cubin.hex(), launch.dynamic_shared, launch.num_warps)
                        found.setdefault(f"{what}, {launch.kernel}", set()).add(binary)
    return {case: list(binaries) for case, binaries in found.items()}


if __name__ == "__main__":
    print(json.dumps(compile_all(**json.loads(sys.argv[1]))))
