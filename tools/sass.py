"""Read what matters to bandwidth out of a disassembled kernel, as ``cuobjdump -sass -res-usage`` prints it."""

import re
from collections import Counter
from typing import NamedTuple

RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
"""An address, perhaps a predicate, an operation and its operands."""

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
"""Bytes a thread loads, by the operation's suffix; 4 without one."""

PRODUCTS = "HGMMA", "HMMA"
"""Of the tensor cores."""

COPY, LOAD = "LDGSTS", "LDG"
"""From global memory to shared memory asynchronously (PTX's ``cp.async``), and to a register."""


class Instruction(NamedTuple):
    """One instruction; ``operation`` with all its suffixes."""

    address: int
    operation: str
    operands: str

    @property
    def base(self) -> str:
        """The operation without its suffixes."""
        return self.operation.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a thread loads."""
        return next((WIDTHS[suffix] for suffix in self.operation.split(".")[1:] if suffix in WIDTHS), 4)


class Loop(NamedTuple):
    """How an innermost loop loads from global memory.

    Attributes:
        copies: asynchronous copies to shared memory an iteration, by width in bytes.
        loads: loads into registers an iteration, by width: each is waited for, nothing hides it.
        depth: iterations whose copies are under way while the loop waits for the oldest; 0 without copies.
        instructions: of an iteration.
        chain: the most products of the tensor cores in an iteration that add to one register, each to the result of the
            one before.
    """

    copies: Counter[int]
    loads: Counter[int]
    depth: float
    instructions: int
    chain: int


class MachineCode(NamedTuple):
    """What a kernel's binary holds.

    Attributes:
        registers: a thread.
        stack_bytes: of a thread's stack frame.
        static_shared: bytes; on sm_90 they include the kilobyte that the system takes.
        spills: stores to local memory and loads from it.
        tensor_cores: the instruction that drives them, or None.
        loops: the innermost ones that copy asynchronously, in the order of addresses; where none does, the one that
            loads most.
        operations: of all instructions, in the order of addresses.
    """

    registers: int
    stack_bytes: int
    static_shared: int
    spills: int
    tensor_cores: str | None
    loops: tuple[Loop, ...]
    operations: tuple[str, ...]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions of each loop that loads and holds no other loading loop.

    A loop goes from the target of a backward branch to the branch.
    """
    loading = []
    for branch in code:
        if branch.base == "BRA" and (target := re.search(r"\b0x([0-9a-f]+)\b", branch.operands)):
            loop = [each for each in code if int(target[1], 16) <= each.address <= branch.address]
            if any(each.base in (COPY, LOAD) for each in loop):
                loading.append(loop)
    return [loop for loop in loading if not any({*other} < {*loop} for other in loading)]


def read_loop(loop: list[Instruction]) -> Loop:
    """How a loop loads.

    Copies are committed in groups (``LDGDEPBAR``), and ``DEPBAR.LE SB0, n`` waits until n groups are left under way:
    before the wait there was one more.
    """
    groups = sum(each.base == "LDGDEPBAR" for each in loop)
    waits = [each.operands for each in loop if each.base == "DEPBAR" and each.operands.startswith("SB0")]
    left = [int(each.rpartition(",")[2], 16) for each in waits]
    depth = (min(left) + groups) / groups if groups and left else 0.0
    copies, loads = (Counter(each.width for each in loop if each.base == base) for base in (COPY, LOAD))
    sums = Counter(each.operands.partition(",")[0] for each in loop if each.base in PRODUCTS)
    return Loop(copies, loads, depth, len(loop), max(sums.values(), default=0))


def read_machine_code(listing: str) -> MachineCode:
    """Read the listing of one kernel.

    Raises:
        ValueError: a listing without a kernel's resources or without instructions.
    """
    resources, found = RESOURCES.findall(listing), INSTRUCTION.findall(listing)
    if len(resources) != 1 or not found:
        raise ValueError(f"{len(resources)} kernels and {len(found)} instructions are listed; give it one kernel's.")
    code = [Instruction(int(address, 16), operation, operands.strip()) for address, operation, operands in found]
    registers, stack, shared = map(int, resources[0])
    loops = [read_loop(loop) for loop in innermost_loops(code)]
    most = sorted(loops, key=lambda each: sum(width * count for width, count in each.loads.items()))[-1:]
    bases = Counter(each.base for each in code)
    return MachineCode(
        registers=registers,
        stack_bytes=stack,
        static_shared=shared,
        spills=bases["STL"] + bases["LDL"],
        tensor_cores=next((name for name in PRODUCTS if name in bases), None),
        loops=tuple([each for each in loops if each.copies] or most),
        operations=tuple(each.operation for each in code),
    )
