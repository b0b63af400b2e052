"""Iterations of Kangaroo stage by stage, as ``iteration_profile.py`` sees them, and a picture of the median one."""

import torch
from iteration_profile import median_of, profile_iterations, stage_bytes, stage_rows
from random_model import random_kangaroo, random_prompt

from .job import Job
from .page import SMOKE_LABEL
from .plots import iteration

CONTEXT, ITERATIONS, DRAFTS, PICTURE = 2048, 20, 2, "timeline.png"


def run(job: Job) -> None:
    """At the first model's shape, always the same number of drafts; a smoke run takes the references."""
    shape = job.models[0]
    kangaroo = random_kangaroo(shape, job.device, job.dtype, references=job.smoke)
    prompt = random_prompt(shape, 20 if job.smoke else CONTEXT)
    forced = {"num_speculative_tokens": DRAFTS, "draft_confidence_threshold": 0.0}
    profiled = profile_iterations(kangaroo, prompt, 4 if job.smoke else ITERATIONS, **forced)
    job.note(
        model=shape.name,
        context=profiled.length,
        drafts=DRAFTS,
        graphs=profiled.graphs,
        iterations=len(profiled.iterations),
        stages=stage_rows(profiled, stage_bytes(kangaroo, profiled.length)),
    )
    where = SMOKE_LABEL if job.smoke else torch.cuda.get_device_name()
    about = f"{where}, one iteration of {shape.name}, random weights, {DRAFTS} drafts"
    iteration(median_of(profiled.iterations), job.folder / PICTURE, about)
    job.note(picture=PICTURE)
