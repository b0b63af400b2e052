"""Read what matters to bandwidth out of a disassembled kernel, as ``cuobjdump -sass -res-usage`` prints it."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
"""An address, perhaps a predicate, an operation and its operands."""

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
"""Bytes a thread loads, by the operation's suffix; 4 without one."""

BULK = ("UTMALDG", "UBLKCP")
"""Copies by the tensor memory accelerator; they have no width a thread."""

LOADS = ("LDG", "LDGSTS", *BULK)
TENSOR_CORES = ("HGMMA", "HMMA")


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


class Pipeline(NamedTuple):
    """The innermost loop that loads the most from global memory.

    Attributes:
        copies: asynchronous copies to shared memory (``LDGSTS``, PTX's ``cp.async``) an iteration, by width in bytes.
        bulk_copies: those by the tensor memory accelerator an iteration.
        loads: widths of the loads into registers an iteration: each is waited for, nothing hides it.
        depth: iterations whose copies are under way while the loop waits for the oldest; 0 without copies.
    """

    copies: dict[int, int]
    bulk_copies: int
    loads: dict[int, int]
    depth: float

    @property
    def copied_bytes(self) -> int:
        """Bytes that a thread copies an iteration, the accelerator's aside."""
        return sum(width * count for width, count in self.copies.items())


class MachineCode(NamedTuple):
    """What a kernel's binary holds.

    Attributes:
        registers: a thread.
        stack_bytes: of a thread's stack frame.
        static_shared: bytes; on sm_90 they include the kilobyte that the system takes.
        spill_stores: stores to local memory.
        spill_loads: loads from it.
        copy_widths: of the asynchronous copies anywhere in the kernel.
        load_widths: of the loads into registers anywhere in the kernel.
        bulk_copies: by the tensor memory accelerator, anywhere.
        tensor_cores: the instruction that drives them, or None.
        pipeline: of the loop that streams; None if no loop loads.
        pipelines: of every innermost loop that copies asynchronously, in the order of addresses.
        operations: of all instructions, in the order of addresses.
    """

    registers: int
    stack_bytes: int
    static_shared: int
    spill_stores: int
    spill_loads: int
    copy_widths: tuple[int, ...]
    load_widths: tuple[int, ...]
    bulk_copies: int
    tensor_cores: str | None
    pipeline: Pipeline | None
    pipelines: tuple[Pipeline, ...]
    operations: tuple[str, ...]


def read_instructions(listing: str) -> list[Instruction]:
    """Every instruction of a listing, in the order of addresses."""
    return [
        Instruction(int(address, 16), operation, operands.strip())
        for address, operation, operands in INSTRUCTION.findall(listing)
    ]


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The instructions from the target of every backward branch to the branch."""
    for branch in code:
        if branch.base == "BRA" and (target := re.search(r"\b0x([0-9a-f]+)\b", branch.operands)):
            start = int(target.group(1), 16)
            if start < branch.address:  # a branch to itself only fills the end of a kernel
                yield [instruction for instruction in code if start <= instruction.address <= branch.address]


def count_widths(code: Iterable[Instruction], base: str) -> dict[int, int]:
    """How many ``base`` instructions there are of each width."""
    counts: dict[int, int] = {}
    for instruction in code:
        if instruction.base == base:
            counts[instruction.width] = counts.get(instruction.width, 0) + 1
    return counts


def loads_of(code: Iterable[Instruction]) -> int:
    """Bytes that a thread loads from global memory, an accelerator's copy counted as more than any."""
    return sum(1 << 20 if each.base in BULK else each.width for each in code if each.base in LOADS)


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops that load and hold no other loading loop."""
    loading = [loop for loop in loops(code) if loads_of(loop)]
    bounds = [(loop[0].address, loop[-1].address) for loop in loading]
    return [
        loop
        for loop, (start, end) in zip(loading, bounds, strict=True)
        if not any(start <= first and last <= end and last - first < end - start for first, last in bounds)
    ]


def pipeline_of(loop: list[Instruction]) -> Pipeline:
    """How a loop loads.

    Copies are committed in groups (``LDGDEPBAR``), and ``DEPBAR.LE SB0, n`` waits until n groups are left under way:
    before the wait there was one more.
    """
    groups = sum(each.base == "LDGDEPBAR" for each in loop)
    left = [
        int(each.operands.rpartition(",")[2], 16)
        for each in loop
        if each.base == "DEPBAR" and each.operands.startswith("SB0")
    ]
    depth = (min(left) + groups) / groups if groups and left else 0.0
    return Pipeline(
        copies=count_widths(loop, "LDGSTS"),
        bulk_copies=sum(each.base in BULK for each in loop),
        loads=count_widths(loop, "LDG"),
        depth=depth,
    )


def read_machine_code(listing: str) -> MachineCode:
    """Read the listing of one kernel.

    Raises:
        ValueError: a listing without a kernel's resources or without instructions.
    """
    resources, code = RESOURCES.findall(listing), read_instructions(listing)
    if len(resources) != 1 or not code:
        raise ValueError(
            f"the listing holds {len(resources)} kernels and {len(code)} instructions; give it one kernel's."
        )
    registers, stack, shared = map(int, resources[0])
    innermost = innermost_loops(code)
    streaming = max(innermost, key=loads_of, default=None)
    bases = {instruction.base for instruction in code}
    return MachineCode(
        registers=registers,
        stack_bytes=stack,
        static_shared=shared,
        spill_stores=sum(each.base == "STL" for each in code),
        spill_loads=sum(each.base == "LDL" for each in code),
        copy_widths=tuple(sorted(count_widths(code, "LDGSTS"))),
        load_widths=tuple(sorted(count_widths(code, "LDG"))),
        bulk_copies=sum(each.base in BULK for each in code),
        tensor_cores=next((name for name in TENSOR_CORES if name in bases), None),
        pipeline=None if streaming is None else pipeline_of(streaming),
        pipelines=tuple(pipeline_of(loop) for loop in innermost if count_widths(loop, "LDGSTS")),
        operations=tuple(each.operation for each in code),
    )
