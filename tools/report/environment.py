"""The machine, the versions, and what the card can do at most: measured, not looked up."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gpu_measure import ROUNDS, Replays, measure_ceiling, quantiles, read_card, snapshot

from kangaroo_kernels import launch_config

from .job import Job

PACKAGES = ("torch", "triton", "transformers", "kangaroo-kernels")
SQUARE = 8192
"""Rows and columns of the matrices whose product is the arithmetic ceiling."""


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


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of the library's product of two large square matrices."""
    left, right = (torch.randn(SQUARE, SQUARE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    replays = Replays([lambda: torch.mm(left, right, out=out)], repetitions=4)
    return 2 * SQUARE**3 / (quantiles([replays.seconds() for _ in range(ROUNDS)]).p50 / 1e6)


def seconds_on_cpu(work: Callable[[], object]) -> float:
    """The median of a few calls."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ceilings_of_a_cpu() -> dict[str, Any]:
    """The same figures of a CPU, small: they show that the part works, no more."""
    source = torch.randn(1 << 22)
    target, square = torch.empty_like(source), torch.randn(256, 256)
    return {
        "read_gigabytes_per_second": 4 * source.numel() / seconds_on_cpu(source.sum) / 1e9,
        "copy_gigabytes_per_second": 8 * source.numel() / seconds_on_cpu(lambda: target.copy_(source)) / 1e9,
        "product_flops": 2 * 256**3 / seconds_on_cpu(lambda: torch.mm(square, square)),
        "product_dtype": "float32",
    }


def run(job: Job) -> None:
    """Versions first, then the card's ceilings."""
    job.note(versions=versions(), cpu=processor(), cpu_count=os.cpu_count(), platform=platform.system())
    with torch.inference_mode():
        if job.smoke:
            job.note(gpu=None, ceilings=ceilings_of_a_cpu())
            return
        card, folder = read_card(job.device), launch_config.configs_folder()
        files = [name for name in launch_config.files_for(job.device) if (folder / name).is_file()]
        job.note(gpu=card._asdict(), before=snapshot(job.device), launch_configs=files)
        job.doing("memory ceiling")
        ceiling = measure_ceiling(job.device)
        ceilings = {
            "read_gigabytes_per_second": ceiling.read,
            "copy_gigabytes_per_second": ceiling.copy,
            "buffer_bytes": ceiling.buffer_bytes,
            "stream": ceiling.stream._asdict(),
        }
        job.note(ceilings=ceilings)
        job.free()
        job.doing("arithmetic ceiling")
        ceilings |= {"product_flops": product_speed(job.device, job.dtype), "product_dtype": "bfloat16"}
        job.note(ceilings=ceilings, after=snapshot(job.device))
