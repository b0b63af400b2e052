"""Iterations of Kangaroo stage by stage, as ``iteration_profile.py`` sees them, and one of them kernel by kernel."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from iteration_profile import PREFIX, Iteration, profile_iterations, stage_bytes, stage_rows
from random_model import exit_layer_of, random_drafter, random_target
from synthetic import MAX_DRAFTS, paper_trace, with_synthetic_acceptance

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.backend import REFERENCES

from .decode import random_prompt
from .job import Job

CONTEXT, ITERATIONS = 2048, 20


def median_of(iterations: list[Iteration]) -> Iteration:
    """The one of median length."""
    return sorted(iterations, key=lambda each: sum(stage.us for stage in each))[len(iterations) // 2]


def events_of(iteration: Iteration, max_drafts: int) -> Iterator[dict[str, Any]]:
    """Every event from the iteration's beginning, in lanes: drafts, the last row's layers, other stages."""
    begin, draft = iteration[0].start, 0
    for stage in iteration:
        name = stage.name.removeprefix(PREFIX)
        draft += name == "draft/shallow"
        lane = name
        if name.startswith("draft/"):
            lane = f"draft {draft}" if draft <= max_drafts else "last row"
        for event in stage.events:
            yield {
                "lane": lane,
                "name": event.name,
                "start": round(event.start - begin, 3),
                "us": event.us,
                "skipped": stage.skipped,
            }


def run(job: Job) -> None:
    """Synthetic acceptance at the first model's shape; in a smoke run on the references, which take milliseconds."""
    shape = job.models[0]
    operations = replace(REFERENCES, kernels="triton") if job.smoke else None  # the loop of the kernels all the same
    target = with_synthetic_acceptance(
        random_target(shape, job.device, job.dtype, operations=operations), paper_trace()
    )
    kangaroo = Kangaroo(target, random_drafter(target, exit_layer_of(shape)))
    prompt = random_prompt(shape, 20 if job.smoke else CONTEXT)
    profiled = profile_iterations(kangaroo, prompt, 4 if job.smoke else ITERATIONS)
    median = median_of(profiled.iterations)
    job.note(
        model=shape.name,
        context=profiled.length,
        max_drafts=MAX_DRAFTS,
        graphs=profiled.graphs,
        iterations=len(profiled.iterations),
        stages=[row._asdict() for row in stage_rows(profiled, stage_bytes(kangaroo, profiled.length))],
        us=sum(stage.us for stage in median),
        busy_us=sum(stage.busy_us for stage in median),
        events=list(events_of(median, MAX_DRAFTS)),
    )
