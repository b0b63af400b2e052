"""Programmatic dependent launch: who asks for it, and that a chained kernel waits before it touches anything."""

import json
from typing import Any

import pytest
import torch
from compiling import ROOT, printed_by

from kangaroo_kernels import launch_config
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.shared import chain as chain_module
from kangaroo_kernels.shared.chain import chain

META, CPU = torch.zeros(1, device="meta"), torch.zeros(1)
ON, OFF = {"CHAINED": True, "launch_pdl": True}, {"CHAINED": False}


def test_it_is_off_unless_asked_for():
    assert chain(META) == OFF
    with chained():
        assert chain(META) == ON
        with chained(False):
            assert chain(META) == OFF
        with pytest.raises(ZeroDivisionError), chained(False):
            _ = 1 / 0
        assert chain(META) == ON
    assert chain(META) == OFF


def test_a_cpu_has_no_such_launches():
    with chained():
        assert chain(CPU) == OFF


class Gpu:
    """What ``chain`` looks at of a tensor on a GPU."""

    device = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """``card(capability, settings of the GPU's file)``."""

    def put(capability: tuple[int, int], settings: dict[str, Any]) -> None:
        files = {"gpu.json": settings, "sm_90.json": {"launches": [{"chained": False}]}}
        monkeypatch.setattr(chain_module, "_capability", lambda device: capability)
        monkeypatch.setattr(launch_config, "files_for", lambda device: tuple(files))
        monkeypatch.setattr(launch_config, "rules", files.__getitem__)
        launch_config._chained_on.cache_clear()

    yield put
    launch_config._chained_on.cache_clear()


@pytest.mark.parametrize(
    ("capability", "settings", "wanted"),
    [
        ((9, 0), {"launches": [{"chained": True}]}, ON),
        ((10, 0), {"launches": [{"chained": True}]}, ON),
        ((8, 0), {"launches": [{"chained": True}]}, OFF),
        ((9, 0), {"launches": [{"chained": False}]}, OFF),
        ((9, 0), {"gate_up": [{"num_warps": 4}]}, OFF),  # the architecture's file comes second
    ],
)
def test_a_gpus_file_decides(card, capability, settings, wanted):
    card(capability, settings)
    assert chain(Gpu) == wanted


def test_asking_does_not_help_an_older_gpu(card):
    card((8, 0), {})
    with chained():
        assert chain(Gpu) == OFF
    card((9, 0), {})
    with chained():
        assert chain(Gpu) == ON


def test_nothing_ships_chained():
    """Until it has been measured to be faster."""
    for path in (ROOT / "kangaroo_kernels" / "configs").glob("*.json"):
        assert "launches" not in json.loads(path.read_text()), path.name


# ---- what it compiles to

COMPILE = """
import json

import torch
from compiled import compile_only
from kernel_calls import META, STEPS
from triton.runtime.jit import JITFunction

from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.workloads import MODELS, Settings

every = ("layer", "top-1 head", "filtered head", "accept", "commit", "draft step")
some = ("layer", "accept")
shape = next(model for model in MODELS if model.name == "Llama-3.2-1B")
found = {}
runs = (("chained", 90, True, every), ("not chained", 90, False, some), ("older", 80, False, some))
for run, architecture, on, names in runs:
    rows = found[run] = []
    with compile_only(architecture) as launches, chained(on):
        for step in STEPS:
            if step.name in names:
                before = len(launches)
                settings = Settings(1 if step.drafting else 16, 4096, torch.bfloat16, META)
                for each in step.calls(shape, settings):
                    each.launch()
                rows += [(step.drafting, launch) for launch in launches[before:]]
    found[run] = [
        (launch.kernel, drafting, launch.code.spills + launch.code.stack_bytes, launch.code.operations)
        for drafting, launch in {launch.binary: (drafting, launch) for drafting, launch in rows}.values()
    ]
print(json.dumps(found))
"""

KERNELS = {
    *("qkv_rope_kernel", "attention_kernel", "attention_merge_kernel", "linear_residual_kernel"),
    *("gate_up_kernel", "top1_head_kernel", "merge_tiles_kernel", "sample_head_kernel"),
    *("filtered_sample_kernel", "group_kernel", "accept_kernel", "commit_kernel"),
}
STREAMS_A_WEIGHT = {name for name in KERNELS if name.startswith(("qkv", "linear", "gate", "top1", "sample"))}
WAIT, RELEASE, PREFETCH = "ACQBULK", "PREEXIT", "CCTL.E.PF2"
MEMORY = ("LDG", "STG", "ATOM", "RED", "LDGSTS", "UTMA")

Compiled = list[tuple[str, bool, int, list[str]]]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    """Kernels of every step: name, whether under a drafting step's flag, spills and bytes of stack, operations."""
    return printed_by("-c", COMPILE)


def first(operations: list[str], *wanted: str) -> int:
    return next((place for place, operation in enumerate(operations) if operation.startswith(wanted)), len(operations))


def test_a_chained_kernel_waits_before_it_touches_memory(compiled):
    """And lets the next one begin only then: what it reads, its flag too, is behind the wait."""
    assert {name for name, *_ in compiled["chained"]} == KERNELS
    for name, drafting, spilt, operations in compiled["chained"]:
        wait = first(operations, WAIT)
        assert wait < first(operations, RELEASE) <= first(operations, *MEMORY), (name, drafting)
        assert operations.count(WAIT) == operations.count(RELEASE) == 1, name
        assert not any(operation.startswith("EXIT") for operation in operations[:wait]), name
        assert spilt == 0, name


def test_weights_are_fetched_ahead_of_the_wait(compiled):
    """But for the steps that a flag may skip, which would fetch for nothing."""
    for name, drafting, _, operations in compiled["chained"]:
        fetched = operations.count(PREFETCH)
        assert (fetched > 0) == (name in STREAMS_A_WEIGHT and not drafting), (name, drafting)
        if fetched:
            assert first(operations, PREFETCH) < first(operations, WAIT), name


@pytest.mark.parametrize("run", ["not chained", "older"])
def test_otherwise_there_is_nothing_of_it(compiled, run):
    assert {"qkv_rope_kernel", "accept_kernel"} < {name for name, *_ in compiled[run]}
    for name, _, _, operations in compiled[run]:
        assert not {WAIT, RELEASE, PREFETCH}.intersection(operations), name


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu_the_tokens_are_the_same(pair, graphs):
    prompt, settings = [7, 3, 5], {"max_new_tokens": 200, "draft_confidence_threshold": 0.3}
    wanted = pair.load(dtype="bfloat16", graphs=graphs).generate(prompt, **settings).tokens
    with chained():
        kangaroo = pair.load(dtype="bfloat16", graphs=graphs)
        assert kangaroo.generate(prompt, **settings).tokens == wanted
        assert kangaroo.generate(prompt, plain=True, max_new_tokens=200).tokens == wanted
