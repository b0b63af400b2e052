"""Iterations of Kangaroo stage by stage, as ``iteration_profile.py`` sees them, and the median one kernel by kernel."""

from dataclasses import asdict

from iteration_profile import median_of, profile_iterations, stage_bytes, stage_rows
from random_model import random_kangaroo, random_prompt, sharing_weights
from synthetic import MAX_DRAFTS, paper_trace

from .job import Job

CONTEXT, ITERATIONS = 2048, 20


def run(job: Job) -> None:
    """Synthetic acceptance at the first model's shape; in a smoke run on the references, which take milliseconds."""
    shape = job.models[0]
    kangaroo = random_kangaroo(shape, job.device, job.dtype, references=job.smoke)
    kangaroo = sharing_weights(kangaroo, trace=paper_trace())
    prompt = random_prompt(shape, 20 if job.smoke else CONTEXT)
    profiled = profile_iterations(kangaroo, prompt, 4 if job.smoke else ITERATIONS)
    job.note(
        model=shape.name,
        context=profiled.length,
        max_drafts=MAX_DRAFTS,
        graphs=profiled.graphs,
        iterations=len(profiled.iterations),
        stages=[row._asdict() for row in stage_rows(profiled, stage_bytes(kangaroo, profiled.length))],
        median=[asdict(stage) for stage in median_of(profiled.iterations)],
    )
