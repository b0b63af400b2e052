"""Print the machine code of every launch of some steps: a script for the tree of any commit.

``compare_binaries.py`` gives it to ``python -c`` in this tree and in another commit's, with the names of what to
compile as JSON. So it takes nothing but names that both have: steps and launchers.
"""

import json
import sys
from collections.abc import Iterator
from importlib import import_module

import torch
from compiled import CompiledLaunch, compile_only
from steps import META, STEPS

from kangaroo_kernels.workloads import MODELS, Settings

ROWS, LENGTH = 8, 4096
"""Tokens in flight, of which no binary depends on the number, and of the text."""

Binary = tuple[str, int, int]
"""The machine code in hexadecimal digits, the dynamic shared memory in bytes, the warps."""


def launches_of(
    architecture: int, steps: list[str], models: list[str], dtypes: list[str]
) -> Iterator[tuple[str, CompiledLaunch]]:
    """Every launch for an architecture with the case that it belongs to."""
    chosen = [(shape, step) for shape in MODELS for step in STEPS if shape.name in models and step.name in steps]
    with compile_only(architecture) as launches:
        for dtype in dtypes:
            for shape, step in chosen:
                settings = Settings(1 if step.drafting else ROWS, step.length or LENGTH, getattr(torch, dtype), META)
                for each in step.calls(shape, settings):
                    before = len(launches)
                    getattr(import_module(f"kangaroo_kernels.{each.op}"), each.op)(*each.args, **each.kwargs)
                    what = f"{shape.name}, sm_{architecture}, {dtype}, {step.name}: {each.op} {each.role}".strip()
                    yield from ((f"{what}, {launch.kernel}", launch) for launch in launches[before:])


def compile_all(architectures: list[int], **chosen: list[str]) -> dict[str, list[Binary]]:
    """``{case: the different binaries that it launches}``."""
    found: dict[str, list[Binary]] = {}
    for architecture in architectures:
        for case, launch in launches_of(architecture, **chosen):
            binary = (launch.cubin.hex(), launch.dynamic_shared, launch.num_warps)
            if binary not in found.setdefault(case, []):
                found[case].append(binary)
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(**json.loads(sys.argv[1]))))
