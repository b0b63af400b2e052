"""Compile what a GPU will be asked for, through the project's own launchers, in ``standin``'s place of a GPU.

``python -O fill.py NAME``, a model's name: every operation at its shapes; whole iterations, plain and Kangaroo's, in
every way to launch. ``loops``: the persistent loop at the sizes that ``first.py`` tries, and the yardstick's streams.
``kernel-tests``, ``model-tests``, ``decodes``: what ``first.py`` runs; the last two with ``STANDIN=compute``.
"""

import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import first
import loops as drafting
import pytest
import random_model
import standin  # before anything else of the library
import torch
from gpu_measure import STREAMS, read_stream
from report.job import Job
from steps import META, STEPS
from triton.runtime import cache

from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.model.loop.decode import LEAST_REACH
from kangaroo_kernels.model.loop.graphs import GraphRunner
from kangaroo_kernels.model.loop.iteration import Iteration
from kangaroo_kernels.model.loop.state import TextState
from kangaroo_kernels.model.sampling import Sampling
from kangaroo_kernels.model.target.cache import KVCache
from kangaroo_kernels.workloads import MODELS, Settings, workloads

BFLOAT16 = torch.bfloat16
LENGTHS = (128, 256, 1000, 2048, 8192, 32768)
SAMPLINGS = (Sampling(), Sampling(temperature=0.8), Sampling(temperature=0.8, top_k=50, top_p=0.9))
CAPACITY = 8192 + 64
REACHES = (LEAST_REACH, 2048, CAPACITY)
"""Which kernels are launched depends on them no further than these do: 2 splits, a multiple of 16, and 33."""


def launch(op, args, kwargs):
    getattr(import_module(f"kangaroo_kernels.{op}"), op)(*args, **kwargs)


def operations(shape, on):
    """What the report's parts on kernels and equality run, and the steps of ``kernel_report.py``."""
    for length in LENGTHS:
        for workload in workloads(shape):
            launch(workload.op, *workload.make(Settings(7, length, BFLOAT16, META)))
    for step in STEPS:
        if "paged" not in step.name and not (on and "loop" in step.name):
            settings = Settings(1 if step.drafting else 7, step.length or 2048, BFLOAT16, META)
            for call in step.calls(shape, settings):
                launch(call.op, call.args, call.kwargs)


def without_numbers(maker, config, device, seed):
    """Of a random model's weights: meta tensors hold none, and have no generator."""
    maker.config, maker.device, maker.generator = config, device, torch.Generator()


def iterations(shape, on):
    """Plain decoding and Kangaroo at every reach; two layers stand for all, which are alike."""
    random_model._Maker.__init__ = without_numbers
    target = random_model.random_target(shape._replace(layers=2), META, BFLOAT16)
    adapter = random_model.random_drafter(target, 1).adapter
    config, runner = target.config, GraphRunner(META)
    deep, own = KVCache(config, 2, META, BFLOAT16), KVCache(config, 1, META, BFLOAT16)
    deep.reserve(CAPACITY)
    own.reserve(CAPACITY)
    for drafts in (0, 6):
        for sampling in SAMPLINGS:
            for persistent in (False, True) if drafts and not on else (False,):
                states = torch.empty(drafts + 2, config.hidden_size, dtype=BFLOAT16, device=META)
                state = TextState([1, 2, 3], deep, own, 2, states)
                given = {"max_drafts": drafts, "threshold": 0.6, "stop_tokens": (), "length": 200, "runner": runner}
                iteration = Iteration(
                    target, adapter if drafts else None, state, sampling, persistent=persistent, **given
                )
                for reach in (*REACHES[:2], deep.capacity):
                    iteration.run(reach)


def empty(*shape, generator=None, dtype=None, device=None, scale=1.0):
    """In the place of random numbers: memory that nobody has touched."""
    return torch.empty(*shape, dtype=dtype, device=device)


def persistent(job):
    """The loop and its stages as they are compared."""
    drafting.drawer, drafting.LAUNCHES = lambda seed, dtype, device: partial(empty, dtype=dtype), 1
    for name in drafting.LOOPS:
        drafting.bits(job, name)
        drafting.again(job, name)


def streams():
    source = torch.empty((1 << 30) - (1 << 20), dtype=torch.int32, device=META)
    for each in STREAMS:
        read_stream(source, each, 132)


def tests(*chosen):
    """Lead them through their launches: asserts are compiled away, and nothing holds."""
    ways = ("-W", "ignore", "--assert=plain", "-p", "no:cacheprovider", "-q", "--tb=no", "--no-header", "-r", "N")
    pytest.main(["-m", "gpu", *ways, *chosen], plugins=[standin])


def main():
    began, what = time.monotonic(), sys.argv[1]
    if not getattr(cache, "adopted", False):
        sys.exit("sitecustomize.py was not run, or this is another Triton than the GPU's: nothing of it would be found")
    job = Job(Path(sys.argv[2]) / f"{what}.json", Path(), 1e6)
    Job.device, Job.smoke = torch.device("cpu"), False
    if what == "loops":
        streams()
        persistent(job)
    elif what == "decodes":
        first.TOKENS = 8
        first.pair(job)
        print([cell for cell in job.values["cells"] if "error" in cell] or "")
    elif what == "kernel-tests":
        torch.randn = empty
        tests("tests/kernels", "--deselect", first.PAIR_TEST, "-k", f"({first.CHOSEN}) and not thousand")
    elif what == "model-tests":
        tests("tests/model", first.PAIR_TEST, "-k", first.CHOSEN)
    else:
        shape = next(each for each in MODELS if each.name == what)
        for on in (False, True):
            with chained(on), torch.inference_mode():
                operations(shape, on)
                iterations(shape, on)
    print(
        f"{what}: {len(standin.compiled)} compiled, {len(standin.hits)} found, {time.monotonic() - began:.0f} s, "
        f"{time.process_time():.0f} s of one core"
    )


if __name__ == "__main__":
    main()
