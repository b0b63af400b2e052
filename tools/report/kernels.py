"""Microbenchmarks: ``bench/bench_kernels.py``, every result noted as it comes, the most telling ones first."""

import os
from pathlib import Path
from typing import Any

import pytest

from .job import ROOT, Job

SELECTED = {
    "smoke": ["-k", "M1 and (gate_up or attention)"],
    "brief": ["-k", "Vicuna-7B and not (M16 or eager or compiled or attention or sample_head)"],
    "whole": [],
}
FIRST_ROWS = (1, 8)
"""A drafting step's and a verification's; other numbers of rows come behind them."""

LATER = {"chained": 1, "compiled": 2}
"""Ways that come behind the others: one that may do harm, one that must be compiled."""


class Collector:
    """A pytest plugin that orders the benchmarks, keeps what they found, and ends the session when the time is over."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cells: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.selected = 0

    @pytest.hookimpl(trylast=True)  # behind what deselects
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """One row before eight, the kernel and PyTorch's own way side by side."""

        def rank(item: Any) -> tuple[int, bool, int]:
            values = item.callspec.params
            return LATER.get(values["way"], 0), values["rows"] not in FIRST_ROWS, values["rows"]

        items.sort(key=rank)  # stable: otherwise the file's own order
        self.selected = len(items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Note a benchmark that has just run: its result or its failure."""
        report = yield
        if call.when == "call":
            if call.excinfo is None:  # its raw numbers are in pytest-benchmark's own file
                benchmark = item.funcargs["benchmark"]
                raw_us = 1e6 * benchmark.stats.stats.median
                info = {"us": {"p50": raw_us}, "gigabytes_per_second": None, "share_of_ceiling": None}
                self.cells.append(info | benchmark.extra_info)
            else:
                reason = str(call.excinfo.value).strip().splitlines()[0][:300]
                self.failures.append({"benchmark": item.name, "reason": reason})
            done = len(self.cells) + len(self.failures)
            doing = f"{done} of {self.selected}, {item.callspec.params['case']}"
            self.job.note(cells=self.cells, failures=self.failures, not_run=self.selected - done, doing=doing)
        return report

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        """Stop behind the benchmark that the deadline falls into."""
        if self.job.left <= 0:
            self.session.shouldstop = "no time left"

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: Any) -> None:
        """Keep what can be ended."""
        self.session = session


def run(job: Job) -> None:
    """``pytest bench/bench_kernels.py --benchmark-only``, in this process."""
    os.chdir(ROOT)
    raw = Path(os.path.relpath(job.folder / "kernels.json"))  # the record has the command
    chosen = ["bench/bench_kernels.py", "--benchmark-only", f"--benchmark-json={raw}", "-p", "no:cacheprovider"]
    collector = Collector(job)
    selected = SELECTED["smoke" if job.smoke else "brief" if job.brief else "whole"]
    status = pytest.main([*chosen, *selected], plugins=[collector])
    job.note(exit_status=int(status), raw=raw.name)
    if not collector.cells and not collector.failures and job.left > 0:
        raise RuntimeError(f"pytest ran no benchmark and ended with {int(status)}.")
