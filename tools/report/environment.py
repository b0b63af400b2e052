"""The machine, the versions, what the memory gives at most (measured, not looked up), and the first launch."""

import importlib.util
import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu_card import read_card, snapshot
from gpu_measure import STREAMS, measure_ceiling, read_stream
from triton.runtime import cache

from kangaroo_kernels import launch_config

from .job import Job

PACKAGES = ("torch", "triton", "transformers", "kangaroo-kernels")
TOOLS = ("gcc", "compute-sanitizer", "ncu", "nsys")
MODULES = ("xdist", "pytest_benchmark", "matplotlib", "jinja2")


def versions() -> dict[str, str | None]:
    """Of Python and of what the measurements run on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def key_in_use() -> str:
    """Under which digest Triton looks for kernels: its own, or that of carried ones (``gpu_kit/sitecustomize.py``)."""
    if not getattr(cache, "adopted", False):
        return "Triton's own"
    same: bool = cache.own_key() == cache.triton_key()
    return "carried, and Triton's own" if same else "carried, adopted"


def run(job: Job) -> None:
    """Versions first, then a launch, then the memory's ceilings."""
    job.note(versions=versions(), cpu=processor(), cpu_count=os.cpu_count(), platform=platform.system())
    lacking = [name for name in TOOLS if not shutil.which(name)]
    lacking += [name for name in MODULES if not importlib.util.find_spec(name)]
    job.note(gpu=None, lacking=lacking, triton_key=key_in_use())
    if job.smoke:
        return
    folder = launch_config.configs_folder()
    files = [name for name in launch_config.files_for(job.device) if (folder / name).is_file()]
    job.note(gpu=read_card(job.device)._asdict(), before=snapshot(job.device), launch_configs=files)
    job.note(doing="the first launch, for which Triton has a C compiler called")
    began, source = time.monotonic(), torch.zeros(STREAMS[0].chunk, dtype=torch.int32, device=job.device)
    read_stream(source, STREAMS[0], 1)
    job.synchronize()
    job.note(first_launch_seconds=time.monotonic() - began, doing="memory ceiling")
    with torch.inference_mode():
        ceiling = measure_ceiling(job.device)
    job.note(ceiling=ceiling._asdict() | {"stream": ceiling.stream._asdict()}, after=snapshot(job.device))
