"""Compile what launchers launch, for a GPU that is not here.

``compile_only`` records what ``compile_for`` compiles: launchers called on ``meta`` tensors compile their kernels with
the very arguments, specialisation and launch configuration that a GPU would see, and nothing runs.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sass import MachineCode, read_machine_code
from triton import knobs
from triton.runtime.jit import JITFunction

from kangaroo_kernels.shared.absent_gpu import WARP_SIZE, compile_for


class CompiledLaunch(NamedTuple):
    """A kernel as a launcher would have launched it.

    Attributes:
        kernel: its name.
        architecture: 80 for sm_80.
        grid: programs, in three dimensions.
        num_warps: of a program.
        num_stages: that the pipeliner was given.
        constants: the kernel's compile-time arguments.
        dynamic_shared: bytes.
        binary: the key under which Triton keeps it: whatever the compiler was given.
        ttgir: what the compiler made of it last before machine code: every tile with its layout.
        cubin: the machine code.
    """

    kernel: str
    architecture: int
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    dynamic_shared: int
    binary: str
    ttgir: str
    cubin: bytes

    @property
    def threads(self) -> int:
        """Of a program."""
        return self.num_warps * WARP_SIZE

    @property
    def programs(self) -> int:
        """In the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def code(self) -> MachineCode:
        """Its machine code, read."""
        return disassemble(self.cubin)


def listing_of(cubin: bytes) -> str:
    """What the ``cuobjdump`` that Triton brings prints of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@lru_cache(maxsize=1024)
def disassemble(cubin: bytes) -> MachineCode:
    """Read machine code."""
    return read_machine_code(listing_of(cubin))


ARITHMETIC = re.compile(
    r'^\s*(?:%\S+ = )?"?(arith\.\w+f|arith\.[us]itofp|arith\.fpto[us]i|math\.\w+|tt\.dot|tt\.extern_elementwise'
    r"|tt\.fp_to_fp|tt\.precise_\w+|ttng\.warp_group_dot)\b(.*) loc\((.*)\)$",
    re.MULTILINE,
)
"""An operation on floating-point numbers, what it is about, and its location."""


def aliases(ttgir: str) -> dict[str, str]:
    """The layouts and locations that stand at the end of a listing."""
    return dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))


def lines_of(location: str, alias: dict[str, str]) -> Iterator[str]:
    """``file:line`` from the innermost outwards, of a line, an alias, one with a name in front, or a call."""
    for file, line, other in re.findall(r'"[^"]*?([^"/]+)":(\d+):|(#loc\d*)', location):
        yield from lines_of(alias[other], alias) if other else (f"{file}:{line}",)


def arithmetic_of(ttgir: str) -> dict[str, list[str]]:
    """Which floating-point operations come of each source line, with the dtypes of their operands and results."""
    alias, found = aliases(ttgir), dict[str, set[str]]()
    for location in set(re.findall(r"^ +\S.* loc\((.*)\)$", ttgir, re.MULTILINE)):
        for line in itertools.islice(lines_of(location, alias), 1):  # a line may have operations, but none of these
            found.setdefault(line, set())
    for operation, rest, location in ARITHMETIC.findall(ttgir):
        dtypes = dict.fromkeys(re.findall(r"(?:\b|x)(b?f(?:16|32|64))\b", rest))
        found[next(lines_of(location, alias))].add(" ".join((operation, *dtypes)))
    return {place: sorted(operations) for place, operations in found.items()}


def layouts_of_sums(ttgir: str) -> dict[str, list[str]]:
    """How the tiles of products and sums lie across the threads, which is what the order of the addends follows from.

    Returns:
        For each place, from the line of the sum outwards to the kernel's (``"tiles.py:104 gate_up.py:42 .."``), its
        tiles' types in the compiler's words, shape and layout. Tiles in shared memory have no part in the order.
    """
    alias = aliases(ttgir)
    product = r"(?:tt\.dot|ttng\.warp_group_dot) .*? : (.*) loc\((.*)\)$"
    total = r'"tt\.reduce".*\n.*\n.*arith\.addf.*\n.*\n *\}\) : (.*) loc\((.*)\)$'
    found: dict[str, set[str]] = {}
    for types, location in re.findall(product, ttgir, re.MULTILINE) + re.findall(total, ttgir, re.MULTILINE):
        tiles = re.findall(r"(?<!\w)tensor<(?:[^<>]|<[^<>]*>)*>", types)
        words = [re.sub(r"#\w+\b(?!\.)", lambda name: alias.get(name[0], name[0]), tile) for tile in tiles]
        found.setdefault(" ".join(lines_of(location, alias)), set()).add(", ".join(words))
    return {place: sorted(layouts) for place, layouts in found.items()}


@contextmanager
def compile_only(architecture: int) -> Iterator[list[CompiledLaunch]]:
    """Within it, launches on ``meta`` tensors are compiled for ``architecture`` and appended to the list it yields.

    Triton's driver, its ``JITFunction`` and the launch configurations are as before afterwards.
    """
    launches: list[CompiledLaunch] = []
    with compile_for(architecture):
        run = JITFunction.run

        def compile_and_record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            compiled = run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
            bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            launches.append(
                CompiledLaunch(
                    kernel=kernel.fn.__name__,
                    architecture=architecture,
                    grid=(*grid, 1, 1)[:3],
                    num_warps=compiled.metadata.num_warps,
                    num_stages=compiled.metadata.num_stages,
                    constants={param.name: bound[param.name] for param in kernel.params if param.is_constexpr},
                    dynamic_shared=compiled.metadata.shared,
                    binary=compiled.hash,
                    ttgir=compiled.asm["ttgir"],
                    cubin=compiled.asm["cubin"],
                )
            )
            return compiled

        JITFunction.run = compile_and_record  # compile_for puts the original back
        yield launches
