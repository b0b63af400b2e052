"""A source line becomes the same floating-point operations in every kernel that has it.

Stage kernels, their variants (with a flag, paged, over a short text, chained) and the drafting loop share functions,
and their results must have the same bits. Compared is what the compiler made of each line before machine code, at the
shapes of real models, for both architectures. Behind that, ``test_machine_code.py`` holds that no product and sum
become one, and ``test_kernel_report.py`` in which order sums are added.
"""

import pytest
from compiling import printed_by

COMPILE = """
import json

import torch
from compiled import arithmetic_of, compile_only
from kernel_calls import META, STEPS

from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.workloads import MODELS, Settings

found = {}
for architecture, on in ((80, False), (90, False), (90, True)):
    with compile_only(architecture) as launches, chained(on):
        for shape in MODELS:
            for step in STEPS:
                settings = Settings(1 if step.drafting else 8, step.length or 4096, torch.bfloat16, META)
                before = len(launches)
                for each in step.calls(shape, settings):
                    each.launch()
                for launch in launches[before:]:
                    name = launch.kernel, shape.name, f"sm_{architecture}", step.name + on * ", chained"
                    found[launch.binary] = name, arithmetic_of(launch.ttgir)
print(json.dumps(list(found.values())))
"""
Kernels = list[tuple[tuple[str, ...], dict[str, list[str]]]]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """``(kernel, model, architecture, step)`` and the operations of each source line."""
    return [(tuple(name), lines) for name, lines in printed_by("-c", COMPILE)]


def differences(kernels: Kernels) -> dict[tuple[str, str, str], dict[str, list[str]]]:
    """By model, architecture and line: each set of operations, none included, where there are several; who has it."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for (kernel, model, architecture, step), lines in kernels:
        for line, operations in lines.items():
            if line.startswith("standard.py:") and all("f64" in each for each in operations):
                continue  # Triton's own functions take integers, too, and those of ``weigh`` float64
            who = found.setdefault((model, architecture, line), {})
            who.setdefault(", ".join(operations), []).append(f"{kernel} of {step}")
    return {place: who for place, who in found.items() if len(who) > 1}


def test_a_line_is_the_same_arithmetic_everywhere(kernels):
    assert differences(kernels) == {}


def test_the_comparison_is_about_something(kernels):
    """Every kernel of floating-point numbers, each variant, and the lines that stages and loop share."""
    names = {name for name, _ in kernels}
    assert len({(model, architecture) for _, model, architecture, _ in names}) == 6
    assert {kernel for kernel, *_ in names} >= {
        *(f"{op}_kernel" for op in ("qkv_rope", "attention", "linear_residual", "gate_up", "top1_head", "sample_head")),
        *("merge_tiles_kernel", "group_kernel", "filtered_sample_kernel", "draft_loop_kernel"),
    }
    for words in ("paged", "short text", "draft step", "chained"):
        assert any(words in step for *_, step in names), words
    shared = dict[str, set[bool]]()
    for (kernel, *_), lines in kernels:
        for line in (line for line, operations in lines.items() if operations):
            shared.setdefault(line, set()).add(kernel == "draft_loop_kernel")
    assert sum(len(each) == 2 for each in shared.values()) >= 40
    operations = {words.split()[0] for _, lines in kernels for each in lines.values() for words in each}
    assert operations >= {"arith.addf", "arith.mulf", "arith.divf", "arith.truncf", "math.exp2", "tt.dot"}


def test_another_operation_is_found(kernels):
    name, lines = next(each for each in kernels if each[0][0] == "draft_loop_kernel")
    line = next(line for line, operations in lines.items() if "arith.addf f32" in operations and "standard" not in line)
    for other in (["math.fma f32"], []):
        assert [*differences([*kernels, (name, {**lines, line: other})])] == [(*name[1:3], line)]
