"""Print the machine code of every launch of some steps, as hashes: a script for the tree of any commit.

``compare_binaries.py`` gives it to ``python -c`` in this tree and in another commit's, with the arguments of
``compile_all`` as JSON. So it takes nothing but names that both have: steps, launchers, what reads machine code.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from compiled import CompiledLaunch, compile_only
from sass import read_machine_code
from steps import META, STEPS
from triton import knobs

from kangaroo_kernels.workloads import MODELS, Settings

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/.*$|^\s*/\* 0x[0-9a-f]{16} \*/\s*$", re.MULTILINE)
"""Lines of a listing that hold an instruction or the second half of its encoding; no name of a kernel or file."""

ARITHMETIC = re.compile(r"([FDH](ADD|MUL|FMA|MNMX|SET|SETP|CHK|SEL)|HFMA2|HMMA|HGMMA|MUFU|F2F|F2FP|I2F|F2I|SHFL)\b")
"""Operations on floating-point numbers, and the shuffles that fold a sum across threads."""

Code = dict[str, Any]


def digest(lines: list[str]) -> str:
    """A short name for a text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def code_of(cubin: bytes) -> Code:
    """The hashes of all instructions and of the arithmetic among them, the registers of a thread, its spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = read_machine_code(listing)
    return {
        "instructions": digest([line.strip() for line in INSTRUCTION.findall(listing)]),
        "arithmetic": digest([each for each in code.operations if ARITHMETIC.match(each)]),
        "registers": code.registers,
        "spills": code.spill_stores + code.spill_loads,
        "shared": code.static_shared,
        "stack": code.stack_bytes,
    }


def compile_all(steps: list[str], models: list[str], dtype: str, rows: int, length: int, architecture: int) -> Any:
    """``{case: the different binaries that it launches}`` for an architecture."""
    found: dict[str, list[Code]] = {}

    def note(case: str, launch: CompiledLaunch) -> None:
        code = code_of(launch.cubin) | {"dynamic_shared": launch.dynamic_shared, "warps": launch.num_warps}
        if code not in found.setdefault(case, []):
            found[case].append(code)

    with compile_only(architecture) as launches:
        for shape in MODELS:
            for step in STEPS:
                if shape.name not in models or step.name not in steps:
                    continue
                settings = Settings(1 if step.drafting else rows, step.length or length, getattr(torch, dtype), META)
                for each in step.calls(shape, settings):
                    before = len(launches)
                    getattr(import_module(f"kangaroo_kernels.{each.op}"), each.op)(*each.args, **each.kwargs)
                    for launch in launches[before:]:
                        what = f"{each.op} {each.role}".strip()
                        note(f"{shape.name}, sm_{architecture}, {dtype}, {step.name}: {what}, {launch.kernel}", launch)
    return found


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    every: dict[str, list[Code]] = {}
    for architecture in wanted.pop("architectures"):
        every |= compile_all(**wanted, architecture=architecture)
    print(json.dumps(every))
