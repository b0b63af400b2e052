"""What only a card could break: how the compiled kernels order memory, add, and read shared memory.

Every kernel is compiled for both architectures at the shapes of real models; no GPU is needed. It happens in a process
of its own, for here Triton interprets.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from compiling import ROOT, printed_by

COMPILE = """
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from compiled import compile_only
from kernel_calls import META, STEPS
from triton import knobs

from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.workloads import MODELS, Settings

PLACE = re.compile(r'//## File "([^"]*)", line (\\d+)')
INSTRUCTION = re.compile(r"^\\s+/\\*[0-9a-f]{4,}\\*/\\s+(?:@!?\\w+\\s+)?([A-Z][\\w.]*)")
TREES = {"tree", "tree, its rows", "tree, its rows, short text"}
STEPS_LEFT_OUT = {"draft loop, 4 layers", "accept", "commit"} | TREES

def instructions(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [Path(knobs.nvidia.cuobjdump.path).with_name("nvdisasm"), "-g", "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    place, found = "", []
    for line in listing.splitlines():
        if at := PLACE.search(line):
            place = at[1].rpartition("/kangaroo_kernels/")[2] + ":" + at[2]
        elif operation := INSTRUCTION.match(line):
            found.append((operation[1], place))
    return found

found = {}
for architecture in (80, 90):
    for on in (False, True)[: 1 + (architecture == 90)]:
        with compile_only(architecture) as launches, chained(on):
            for shape in MODELS:
                for step in STEPS:
                    if step.name in STEPS_LEFT_OUT or (on and shape is not MODELS[0]):
                        continue
                    settings = Settings(1 if step.drafting else 8, step.length or 4096, torch.bfloat16, META)
                    before = len(launches)
                    for each in step.calls(shape, settings):
                        each.launch()
                    for launch in launches[before:]:
                        if launch.binary in found:
                            continue
                        name = f"{launch.kernel}, {shape.name}, sm_{architecture}, {step.name}" + on * ", chained"
                        shared = re.findall(r"async_copy_global_to_local .* -> <([^,]*), (#\\w+),", launch.ttgir)
                        layouts = dict(re.findall(r"^(#shared\\w*) = (.*)$", launch.ttgir, re.MULTILINE))
                        tiles = [(tile, layouts[layout]) for tile, layout in shared]
                        found[launch.binary] = name, instructions(launch.cubin), tiles
print(json.dumps(list(found.values())))
"""

ARRIVAL, POLL, LOST = re.compile(r"REDG?\.E\.ADD\.STRONG\.GPU"), "LDG.E.STRONG.GPU", "ATOMG.E.MAX.S32.STRONG.GPU"
MEMORY = ("LDG.", "LDGSTS", "STG", "ATOM", "RED.", "REDG.")
SAMPLES = "scores += gumbels", "logits / temperature + noise"
"""The sums of a score and its noise, where they stand in the source."""

WEIGHED = "stood = stood *", "tried = tried *", "nearer = beside +", "standing = "
"""Sums of products in ``weigh``."""

MERGED = "top", "weight", "sums"
"""What the merge of attention reads of each split."""

READ_ONLY = ("norm_ptr", "phase_ptrs", "bias_ptr", "row_ptr + word", "flags_ptr)", "positions_ptr", "threshold_ptr")
READ_ONLY += ("seed_ptr", "temperature_ptr", "source + offs", "norm.ptr", "tokens_ptr")
"""What no program of ``draft_loop`` writes, in the words of the lines that read it through the L1."""


class Kernel(NamedTuple):
    """A binary: its name, ``(operation, place)`` of each instruction, ``(tile, layout)`` in shared memory.

    A place is ``file:line``, the file as it is called inside the package: Triton's cache may hold a binary that was
    compiled from the same file in another folder.
    """

    name: str
    code: list[tuple[str, str]]
    tiles: list[tuple[str, str]]

    @property
    def operations(self) -> list[str]:
        return [operation for operation, _ in self.code]

    def count(self, operation: str, place: str) -> int:
        return sum(name.startswith(operation) and at == place for name, at in self.code)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return [Kernel(name, [*map(tuple, code)], [*map(tuple, tiles)]) for name, code, tiles in printed_by("-c", COMPILE)]


@pytest.fixture(scope="module")
def loops(kernels: list[Kernel]) -> list[Kernel]:
    """The persistent kernels."""
    found = [kernel for kernel in kernels if kernel.name.startswith("draft_loop")]
    assert len(found) == 30  # five kinds of three models on two architectures
    return found


def source_of(place: str) -> str:
    """A line of the source."""
    path, _, line = place.rpartition(":")
    return (ROOT / "kangaroo_kernels" / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def between(kernel: Kernel) -> Iterator[str]:
    """The operations from a program's arrival at the barrier to where it takes another one for lost."""
    operations = kernel.operations
    (arrival,) = (place for place, name in enumerate(operations) if ARRIVAL.fullmatch(name))
    yield from operations[arrival + 1 : operations.index(LOST)]


# ---- the barrier


def test_a_poll_makes_the_programs_threads_read_anew(loops):
    """An invalidation of the L1 follows at once, and a barrier in the program before any thread reads anything."""
    for kernel in loops:
        waiting = [*between(kernel)]
        polls = [place for place, name in enumerate(waiting) if name == POLL]
        assert len(polls) == 2, kernel.name  # the first look, and those of the loop
        for place in polls:
            assert waiting[place + 1] == "CCTL.IVALL", kernel.name
            after = next(name for name in waiting[place + 1 :] if name.startswith((*MEMORY, "BAR.SYNC")))
            assert after.startswith("BAR.SYNC"), kernel.name


def test_nothing_is_copied_while_a_program_waits(loops):
    """An asynchronous copy that began before the barrier could bring what was there before the others wrote."""
    for kernel in loops:
        assert not [name for name in between(kernel) if name.startswith(("LDGSTS", "STG"))], kernel.name


def test_all_threads_have_written_before_their_program_arrives(loops):
    """A barrier in the program, then a fence, then the arrival, and no store between them."""
    for kernel in loops:
        operations = kernel.operations
        (arrival,) = (place for place, name in enumerate(operations) if ARRIVAL.fullmatch(name))
        before = [name for name in operations[:arrival] if name.startswith(("BAR.SYNC", "MEMBAR", "STG", "LDGSTS"))]
        assert before[-1].startswith("MEMBAR"), kernel.name
        assert before[-2].startswith("BAR.SYNC"), kernel.name


# ---- the counter of attention


def place_of(words: str, file: str = "shared/grid.py") -> str:
    """Where a line with these words stands."""
    lines = (ROOT / "kangaroo_kernels" / file).read_text(encoding="utf-8").splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if words in text)
    return f"{file}:{line}"


def test_the_last_program_sees_what_the_others_left(kernels):
    """All threads have written, a fence, the count; then the L1 is invalidated, and the threads go on together.

    What the merge reads comes behind that, from the L2.
    """
    count, parts = (
        place_of("last = tl.atomic_add"),
        {place_of(f"{each} = tl.load(", "shared/merge_splits.py") for each in MERGED},
    )
    best, winner = place_of("tl.atomic_max(arrivals_ptr", "look_up.py"), place_of("best = tl.atomic_xchg", "look_up.py")
    merging = [kernel for kernel in kernels if any(place == count for _, place in kernel.code)]
    names = {kernel.name.partition(",")[0] for kernel in merging}
    assert names == {"attention_kernel", "draft_loop_kernel", "look_up_kernel"}
    for kernel in merging:
        operations, looks_up = kernel.operations, kernel.name.startswith("look_up_kernel")
        (arrival,) = (at for at, each in enumerate(kernel.code) if each[1] == count and each[0].startswith("ATOMG"))
        assert operations[arrival] == f"ATOMG.E.ADD.{'64.' * looks_up}STRONG.GPU", kernel.name
        before = [name for name in operations[:arrival] if name.startswith(("BAR.SYNC", "MEMBAR", "STG", "LDGSTS"))]
        assert before[-1].startswith("MEMBAR"), kernel.name
        assert before[-2].startswith("BAR.SYNC"), kernel.name
        behind = [name for name in operations[arrival + 1 :] if name.startswith(("CCTL", "BAR.SYNC", *MEMORY))]
        assert behind[:2] == ["CCTL.IVALL", "BAR.SYNC.DEFER_BLOCKING"], kernel.name
        if looks_up:  # the best match so far is one number, which atomics alone touch
            told = [at for at, (name, place) in enumerate(kernel.code) if place == best and ".MAX.S64." in name]
            asked = [at for at, (name, place) in enumerate(kernel.code) if place == winner and ".EXCH.64." in name]
            assert [len(told), len(asked)] == [1, 1]
            assert told[0] < arrival < asked[0], kernel.name
            continue
        reads = [(at, name) for at, (name, place) in enumerate(kernel.code) if place in parts and "LDG" in name]
        assert len(reads) >= 3 * 8, kernel.name
        assert all(at > arrival and "STRONG.GPU" in name for at, name in reads), kernel.name


# ---- caches that are not coherent


def test_no_load_takes_memory_for_constant(kernels):
    """``ld.global.nc`` may return what lay there before another program wrote."""
    assert [kernel.name for kernel in kernels if any("CONSTANT" in name for name in kernel.operations)] == []


def test_copies_bypass_the_l1(kernels):
    """All but the norm's weight, whose pieces are too small, and a paged cache's table; no kernel writes these.

    Nor does anybody write a split's two numbers while a launch of its own merges them.
    """
    for kernel in kernels:
        constant = "norm_ptr", "table_ptr", *["stats_ptr"] * kernel.name.startswith("attention_merge_kernel")
        for operation, place in kernel.code:
            if operation.startswith("LDGSTS") and "BYPASS" not in operation:
                assert any(name in source_of(place) for name in constant), (kernel.name, place)


def test_the_drafting_loop_reads_through_the_l1_what_nobody_writes(loops):
    for kernel in loops:
        for operation, place in kernel.code:
            if operation.startswith("LDG.") and "STRONG" not in operation:
                assert any(words in source_of(place) for words in READ_ONLY), (kernel.name, operation, place)


# ---- products and sums


def test_products_read_swizzled_tiles(kernels):
    """Rows of x, weights, keys and values: eight rows at a time, from different banks."""
    for kernel in kernels:
        for tile, layout in kernel.tiles:
            if re.fullmatch(r"\d+x\d+xbf16", tile):
                assert "maxPhase = 8" in layout or "nvmma_shared" in layout, (kernel.name, tile, layout)


def test_no_product_and_sum_are_one(kernels):
    """The logarithm's own series is written with fused steps, which noise and a trained confidence need, and a division
    in float64 is made of them; nothing else has any."""
    for kernel in kernels:
        noisy, divides = "sampling" in kernel.name or kernel.name.startswith("filtered"), "weigh" in kernel.name
        noisy |= kernel.name.startswith("merge_tiles") and "trained confidence" in kernel.name
        assert noisy or divides or not any(name.startswith("FFMA") for name in kernel.operations), kernel.name
        for words in WEIGHED if divides else ():
            place = place_of(words, "weigh.py")
            assert kernel.count("DFMA", place) == 0 < kernel.count("DADD", place), words


@pytest.mark.parametrize("words", SAMPLES)
def test_a_score_is_a_sum_of_its_own_in_every_variant(kernels, words):
    """Drafts and their verification compare scores to the last bit."""
    lines = (ROOT / "kangaroo_kernels/sample_head.py").read_text(encoding="utf-8").splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if words in text)
    sums = {kernel.name: kernel.count("FADD", f"sample_head.py:{line}") for kernel in kernels}
    sums = {name: count for name, count in sums.items() if count}
    unfiltered = words == SAMPLES[0]
    assert len(sums) >= (12 if unfiltered else 6)
    if unfiltered:
        assert {name.partition(",")[0] for name in sums} == {"sample_head_kernel", "draft_loop_kernel"}
    assert len(set(sums.values())) == 1, sums
