"""Compile what a GPU will be asked for, through the project's own launchers, in ``standin``'s place of a GPU.

``python -O fill.py NAME FOLDER``, NAME being a model's: every operation at its shapes; whole iterations, plain and
Kangaroo's, in every way to launch. ``loops``: the persistent loop at the sizes of its tests, and the yardstick's
streams.
``kernel-tests``, ``model-tests``, ``decodes`` and ``parts``: what ``gpu_report.py --first`` runs; the last three with
``STANDIN=compute``. ``parts`` goes through the branches that a GPU takes, at a tiny shape; its times mean nothing.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import standin  # before anything else of the library

# isort: split
import gpu_measure as gm
import pytest
import random_model
import torch
from accuracy import launcher
from gpu_card import Card
from kernel_calls import META, STEPS
from report import decode as decoding
from report import environment
from report.job import Job
from report.page import cells_of
from report.parts import CHOSEN
from triton.runtime import cache

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.model.ahead import decode_works
from kangaroo_kernels.workloads import MODELS, TINY, ModelShape, Settings, workloads

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16
LENGTHS = (128, 256, 1000, 2048, 8192, 32768)
CHAIN_TESTS = "tests/kernels/test_chain.py"
"""One of them decodes, so they are led with the references computing."""


def model(shape: ModelShape) -> None:
    """All that is launched at a model's shape."""
    for on in (False, True):
        with chained(on), torch.inference_mode():
            operations(shape, on)
            iterations(shape)


def operations(shape: ModelShape, on: bool) -> None:
    """What the report's parts on kernels and equality run, and the steps of ``kernel_report.py``."""
    for length in LENGTHS:
        for workload in workloads(shape):
            args, kwargs = workload.make(Settings(7, length, BFLOAT16, META))
            launcher(workload.op)(*args, **kwargs)
    for step in STEPS:
        if "paged" not in step.name and not (on and "loop" in step.name):
            settings = Settings(1 if step.drafting else 7, step.length or 2048, BFLOAT16, META)
            for call in step.calls(shape, settings):
                call.launch()


def iterations(shape: ModelShape) -> None:
    """Every kind of decoding, of chains and trees; two layers stand for all, which are alike."""
    target = random_model.random_target(shape._replace(layers=2), META, BFLOAT16)
    for work in decode_works(target, random_model.random_drafter(target, 1, draft_tree=MAX_SPECULATIVE_TOKENS)):
        work.run()


def empty(*shape: int, dtype: Any = None, device: Any = None, **how: Any) -> torch.Tensor:
    """In the place of random numbers: memory that nobody has touched."""
    return torch.empty(*shape, dtype=dtype, device=device)


def loops() -> None:
    """The streams; the loop and its stages at every size."""
    source = torch.empty((1 << 30) - (1 << 20), dtype=torch.int32, device=META)
    for each in gm.STREAMS:
        gm.read_stream(source, each, multiprocessors=132)
    tests: Any = import_module("test_zz_one_kernel")
    draft_steps: Any = import_module("draft_steps")
    draft_steps.drawer = lambda seed, dtype, device: partial(empty, dtype=dtype, device=device)
    for hidden, inner, vocab, heads in tests.SIZES.values():
        draft_steps.HIDDEN, draft_steps.INNER, draft_steps.VOCAB = hidden, inner, vocab
        drafter = draft_steps.make_model(CPU, BFLOAT16, 2, (), heads, heads, tests.CAPACITY)
        for sampling in ({}, {"temperature": 0.8, "seed": 3}):
            for before in (126, 300, 2000):
                one, stages = (draft_steps.begin(drafter, 6, before) for _ in range(2))
                draft_steps.by(launcher("draft_loop"), drafter, one, threshold=0.0, **sampling)
                draft_steps.by_stages(drafter, stages, threshold=0.0, **sampling)


def tests(*chosen: str) -> None:
    """Lead them through their launches: asserts are compiled away, and nothing holds."""
    ways = ["-W", "ignore", "--assert=plain", "-p", "no:cacheprovider", "-q", "--tb=no", "--no-header", "-r", "N"]
    if not standin.COMPUTING:  # on memory that nobody has touched
        vars(torch)["randn"] = empty
    pytest.main(["-m", "gpu", *ways, "--continue-on-collection-errors", *chosen], plugins=[standin])


def decodes() -> None:
    """The bundled pair in every way to launch."""
    ways = import_module("test_ways_to_launch")
    for way in ways.WAYS:
        for temperature in (0.0, 0.8):
            list(ways.decodes(way, temperature, CPU, 9))


def parts(folder: Path) -> None:
    """``environment`` and ``decode`` as a GPU has them."""
    card, ceiling = Card("a card", 132, 50 << 20, 90), gm.Ceiling(4300.0, 4000.0, 1 << 30, gm.STREAMS[0])
    for module, values in (
        (Job, {"device": CPU, "dtype": BFLOAT16, "models": (TINY._replace(layers=3),)}),
        (environment, {"read_card": lambda device: card, "snapshot": lambda device: {}}),
        (environment, {"measure_ceiling": lambda device: ceiling}),
        (decoding, {"NEW_TOKENS": 4, "STEP_TOKENS": 4}),
    ):
        for name, value in values.items():
            setattr(module, name, value)
    for part in (environment, decoding):
        job = Job(folder / f"{part.__name__}.json", folder, 600, brief=True)
        part.run(job)
        if wrong := [cell for cell in cells_of(job.values) if "error" in cell]:
            sys.exit(f"{part.__name__}: {wrong}")


def main(what: str, folder: Path) -> None:
    """Do the work of that name."""
    began = time.monotonic()
    if not getattr(cache, "adopted", False):
        sys.exit("sitecustomize.py was not run, or this is not the GPU's Triton: nothing of it would be found.")
    works: dict[str, Callable[[], None]] = {shape.name: partial(model, shape) for shape in MODELS}
    works |= {"loops": loops, "decodes": decodes, "parts": partial(parts, folder)}
    chosen = f"({CHOSEN}) and not thousand"
    works["kernel-tests"] = partial(tests, "tests/kernels", f"--ignore={CHAIN_TESTS}", "-k", chosen)
    works["model-tests"] = partial(tests, "tests/model", CHAIN_TESTS, "-k", CHOSEN)
    works[what]()
    counts = f"{len(standin.compiled)} compiled, {len(standin.found)} found"
    counts += "".join(f", CANNOT BE COLLECTED: {name}" for name in standin.broken)
    print(f"{what}: {counts}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
