"""Microbenchmarks: ``bench/bench_kernels.py``, every result noted as it comes, the most telling ones first."""

import os
from typing import Any

import pytest

from .job import ROOT, Job
from .tests import Counter

SMOKE = ("-k", "M1 and (gate_up or attention)")
BRIEF = ("-k", "Vicuna-7B and not (M16 or eager or compiled or attention or sample_head)")
FIRST_ROWS = (1, 8)
"""A drafting step's and a verification's; other numbers of rows come behind them."""

LATER = {"chained": 1, "compiled": 2}
"""Ways that come behind the others: one that may do harm, one that must be compiled."""


def rank(item: Any) -> tuple[int, bool, int]:
    """One row before eight, the kernel and PyTorch's own way side by side."""
    values = item.callspec.params
    return LATER.get(values["way"], 0), values["rows"] not in FIRST_ROWS, values["rows"]


class Collector(Counter):
    """A pytest plugin that orders the benchmarks, keeps what they found, and ends the session when the time is over."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.cells: list[dict[str, Any]] = []

    @pytest.hookimpl(trylast=True)  # behind what deselects
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Put the most telling ones first; those of a rank stay in the file's own order."""
        items.sort(key=rank)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Note the result of a benchmark that has just run."""
        report = yield
        if call.when == "call" and call.excinfo is None:
            benchmark = item.funcargs["benchmark"]
            raw = {"us": {"p50": 1e6 * benchmark.stats.stats.median}}  # of a CPU, which has no ceiling
            self.cells.append(raw | benchmark.extra_info)
            self.job.note(cells=self.cells)
        if self.job.left <= 0:
            item.session.shouldstop = "no time left"
        return report


def run(job: Job) -> None:
    """``pytest bench/bench_kernels.py --benchmark-only``, in this process."""
    os.chdir(ROOT)
    chosen = ["bench/bench_kernels.py", "--benchmark-only", "-p", "no:cacheprovider"]
    chosen += SMOKE if job.smoke else BRIEF if job.brief else ()
    collector = Collector(job)
    status = pytest.main(chosen, plugins=[collector])
    job.note(exit_status=int(status))
    if not collector.collected:
        raise RuntimeError(f"pytest ran no benchmark and ended with {int(status)}.")
