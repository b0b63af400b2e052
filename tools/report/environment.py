"""The machine, the versions, and what the memory gives at most: measured, not looked up."""

import os
import platform

import torch
import transformers
import triton
from gpu_card import read_card, snapshot
from gpu_measure import measure_ceiling
from triton.runtime import cache

from kangaroo_kernels import launch_config

from .job import Job


def versions() -> dict[str, str | None]:
    """Of Python and of what the measurements run on."""
    packages = {module.__name__: str(module.__version__) for module in (torch, triton, transformers)}
    return {"python": platform.python_version(), "cuda": torch.version.cuda, **packages}


def run(job: Job) -> None:
    """Versions first, then the card and its memory's ceilings, which launch and compile."""
    job.note(versions=versions(), cpu_count=os.cpu_count(), gpu=None)
    job.note(triton_key="carried" if getattr(cache, "adopted", False) else "Triton's own")  # gpu_kit/sitecustomize.py
    if job.smoke:
        return
    folder = launch_config.configs_folder()
    files = [name for name in launch_config.files_for(job.device) if (folder / name).is_file()]
    job.note(gpu=read_card(job.device)._asdict(), launch_configs=files, doing="memory ceiling")
    with torch.inference_mode():
        ceiling = measure_ceiling(job.device)
    job.note(ceiling=ceiling._asdict() | {"stream": ceiling.stream._asdict()}, card=snapshot(job.device))
