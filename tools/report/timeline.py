"""Iterations of Kangaroo stage by stage, as ``iteration_profile.py`` sees them, and the median one kernel by kernel."""

from dataclasses import asdict

from iteration_profile import median_of, profile_iterations, stage_bytes, stage_rows
from random_model import random_kangaroo, random_prompt

from .job import Job

CONTEXT, ITERATIONS, DRAFTS = 2048, 20, 2


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
        stages=[row._asdict() for row in stage_rows(profiled, stage_bytes(kangaroo, profiled.length))],
        median=[asdict(stage) for stage in median_of(profiled.iterations)],
    )
