"""The stages of ``first.py`` as a GPU has them, without a GPU: launches are looked up and answered by the references.

``prepare --dry`` runs it. The CUDA calls that are left stand for themselves, and times mean nothing. It shows that the
branches for a GPU run, and that what they launch at real shapes is found in the cache; ``streams`` and ``decode`` have
tiny ones, which are not. A reference on a CPU rounds its logits and has other bits in other batches, so a few cells of
``kernels`` are wrong.
"""

import sys
from pathlib import Path

import first
import gpu_measure as gm
import loops
import standin  # before anything else of the library
import torch
from report import decode as decoding
from report.job import Job

from kangaroo_kernels.workloads import MODELS, TINY

CARD = gm.Card("a card", 132, 50 << 20, 232448, 90)


def main():
    Job.device, Job.dtype, Job.models = torch.device("cpu"), torch.bfloat16, (MODELS[0]._replace(layers=2),)
    gm.read_card, gm.snapshot = lambda device: CARD, lambda device: {"sm_mhz": 1980}
    gm.measure_ceiling = lambda device: gm.Ceiling(4300.0, 4000.0, 1 << 30, gm.STREAMS[0])
    gm.time_graph = lambda calls, repetitions, rounds=30: [call() for call in calls] and gm.Quantiles(1.0, 2.0, 3.0)
    gm.sets_needed = lambda *sizes: 1
    torch.cuda.empty_cache = lambda: None
    first.TOKENS, loops.LAUNCHES, loops.drawer = 8, 2, loops.draft_steps.drawer
    loops.LOOPS = dict(list(loops.LOOPS.items())[:2])
    decoding.NEW_TOKENS = decoding.WARM_UP_TOKENS = decoding.LEAST_TOKENS = decoding.STEP_TOKENS = 4
    trace, meter = decoding.paper_trace(steps=4), decoding.EnergyMeter(None)
    decoding.paper_trace, decoding.EnergyMeter = lambda: trace, lambda device: meter
    for stage in (first.environment, first.kernels, first.pair, first.loop, first.streams, first.decode):
        found, asked = len(standin.hits), len(standin.compiled)
        if stage in (first.streams, first.decode):
            Job.models = (TINY._replace(layers=3),)
        job = Job(Path(sys.argv[1]) / f"{stage.__name__}.json", Path(sys.argv[1]), 600)
        stage(job)
        print(f"{stage.__name__}: {job.values['line']}", flush=True)
        print(f"    {len(standin.hits) - found} found, compiled: {standin.compiled[asked:]}", flush=True)
        for cell in job.values.get("cells", []):
            if "error" in cell:
                print("   ", cell, flush=True)


if __name__ == "__main__":
    main()
