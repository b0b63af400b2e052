"""Parts that are tests, counted while they run: a test that hangs does not take the others' results along."""

import importlib.util
import os
import re
from typing import Any

import pytest

from . import guard
from .job import ROOT, Job
from .parts import Part

SMOKE_TESTS = ("tests/kernels/test_rms_norm.py",)
SHOWN_FAILURES = 20


class Counter:
    """A pytest plugin that counts outcomes as they come: a run that is stopped keeps its counts."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[dict[str, str]] = []
        self.noted: list[dict[str, Any]] = []
        self.collected = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """In a smoke run no test waits for a GPU."""
        for item in items if self.job.smoke else ():
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]

    def pytest_collection_finish(self, session: Any) -> None:
        """How many there are."""
        self.collected = max(self.collected, len(session.items))

    @pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is none
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """The same, told by a worker."""
        self.collected = max(self.collected, len(ids))

    def pytest_collectreport(self, report: Any) -> None:
        """Tests that cannot be imported are failures, too."""
        if report.outcome == "failed":
            self.fail(report)
            self.job.note(failures=self.failures)

    def fail(self, report: Any) -> None:
        """Keep a failure's name and what pytest says of its cause."""
        lines = str(report.longrepr).strip().splitlines()
        errors = [line for line in lines if line.startswith("E ")] or lines[-1:]
        reason = re.sub(r"\s+", " ", " ".join(errors).replace("E  ", ""))[:300]
        self.failures.append({"test": report.nodeid, "reason": reason.strip()})

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test when it was called, or when its setup failed or skipped it."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.fail(report)
        self.noted += [{"test": report.nodeid, name: value} for name, value in report.user_properties]
        done = sum(self.counts.values())
        self.job.note(
            **self.counts,
            collected=self.collected,
            not_run=max(0, self.collected - done),
            failures=self.failures[:SHOWN_FAILURES],
            noted=self.noted,
            doing=f"{done} of {self.collected}",
        )


def run(job: Job, part: Part) -> None:
    """Run the GPU's tests among those of a part, in this process or in workers; in a smoke run on the CPU."""
    os.chdir(ROOT)
    os.environ["GUARD_LOG"] = str((job.folder / "lost.txt").resolve())
    counter, chosen = Counter(job), [*part.tests, "-m", "gpu"]
    if job.smoke and not part.tests[0].startswith("tests/gpu"):  # those are tiny on a CPU
        chosen = list(SMOKE_TESTS)
    workers = 1 if job.smoke else min(part.workers, (os.cpu_count() or 1) - 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        chosen += ["-n", str(workers), "--max-worker-restart=24"]
    job.note(ran="pytest " + " ".join(chosen))
    quietly = ("--continue-on-collection-errors", "--tb=short", "-p", "no:cacheprovider", "-p", "report.guard")
    status = pytest.main([*chosen, *quietly, "-W", "default"], plugins=[counter])  # others' warnings are no failures
    compiled = {"compiled": len(guard.compiled), "compiled_names": sorted(set(guard.compiled))}
    job.note(exit_status=int(status), found=len(guard.found), **compiled)
    if not counter.collected:
        raise RuntimeError(f"pytest found no tests and ended with {int(status)}.")
