"""Parts that are tests, counted while they run: a test that hangs does not take the others' results along.

This module is a pytest plugin as well, for the workers of pytest-xdist. What a test said that left the GPU unusable
(``tests/lost_gpu.py``) goes to ``lost.txt``.
"""

import importlib.util
import os
from typing import Any

import pytest

from .job import ROOT, Job, log_compilations
from .parts import Part

SMOKE_TESTS = ("tests/kernels/test_rms_norm.py",)
SHOWN_FAILURES = 20


def pytest_configure() -> None:
    """Every worker tells what it compiles."""
    log_compilations()


class Counter:
    """A pytest plugin that counts outcomes as they come: a run that is stopped keeps its counts."""

    def __init__(self, job: Job) -> None:
        self.job, self.collected = job, 0
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[dict[str, str]] = []
        self.noted: list[dict[str, Any]] = []

    def pytest_collection_finish(self, session: Any) -> None:
        """Note how many there are."""
        self.collected = max(self.collected, len(session.items))

    @pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is none
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Note how many there are, as a worker tells it."""
        self.collected = max(self.collected, len(ids))

    def pytest_collectreport(self, report: Any) -> None:
        """Count tests that cannot be imported as failures."""
        if report.failed:
            self.fail(report)

    def fail(self, report: Any) -> None:
        """Keep a failure's name and what pytest says of its cause."""
        lines = report.longreprtext.strip().splitlines()
        errors = [line[1:].strip() for line in lines if line.startswith("E ")]
        self.failures.append({"test": report.nodeid, "reason": " ".join(errors or lines[-1:])[:300]})
        self.job.note(failures=self.failures[:SHOWN_FAILURES])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test when it was called, or when its setup failed or skipped it."""
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed:
            self.fail(report)
        self.noted += [{"test": report.nodeid, name: value} for name, value in report.user_properties]
        done = sum(self.counts.values())
        left = {"not_run": max(0, self.collected - done), "doing": f"{done} of {self.collected}"}
        self.job.note(**self.counts, **left, collected=self.collected, noted=self.noted)


def run(job: Job, part: Part) -> None:
    """Run the GPU's tests among those of a part, in this process or in workers; in a smoke run on the CPU."""
    os.chdir(ROOT)
    os.environ["LOST_GPU_LOG"] = str((job.folder / "lost.txt").resolve())
    counter, chosen = Counter(job), [*part.tests, "-m", "gpu"]
    if job.smoke:
        os.environ["GPU_TESTS_ON_CPU"] = "1"
        if not part.tests[0].startswith("tests/gpu"):  # those are tiny on a CPU
            chosen = list(SMOKE_TESTS)
    workers = 1 if job.smoke else min(part.workers, (os.cpu_count() or 1) - 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        chosen += ["-n", str(workers), "--max-worker-restart=24"]
    job.note(ran="pytest " + " ".join(chosen))
    quietly = ("--continue-on-collection-errors", "--tb=short", "-p", "no:cacheprovider", "-p", "report.tests")
    status = pytest.main([*chosen, *quietly, "-W", "default"], plugins=[counter])  # others' warnings are no failures
    job.note(exit_status=int(status))
    if not counter.collected:
        raise RuntimeError(f"pytest found no tests and ended with {int(status)}.")
