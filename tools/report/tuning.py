"""Launch configurations for this card, in the time that is left: ``tools/tune.py``, its rules put beside the report."""

import json
import subprocess
import sys
from typing import Any

import torch

from kangaroo_kernels import launch_config

from .job import ROOT, Job

LEAST_SECONDS = 30
SHARE = 0.8
"""Of the time that the search is given; the rest is for starting and writing."""


def run(job: Job) -> None:
    """Tune, or in a smoke run list what would be tried."""
    if job.left < LEAST_SECONDS and not job.smoke:
        job.note(skipped="no time left")
        return
    command = [sys.executable, str(ROOT / "tools" / "tune.py"), "--json"]
    if job.smoke:
        command += ["--dry-run", "--model", "Llama-3.2-1B"]
    else:
        rules = job.folder / launch_config.file_name(torch.cuda.get_device_name(job.device))
        command += ["--minutes", f"{SHARE * job.left / 60:.2f}", "--out", str(rules)]
        job.note(rules=rules.name)
    job.doing("searching")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if not done.stdout.strip():
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "tune.py said nothing.")
    job.note(cases=[figures(case) for case in json.loads(done.stdout)["cases"]])


def figures(case: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a case."""
    if "candidates" in case:
        return {name: case[name] for name in ("op", "n", "k")} | {"candidates": len(case["candidates"])}
    return {name: case[name] for name in ("op", "n", "k", "default", "best", "tried", "rejected", "failed")}
