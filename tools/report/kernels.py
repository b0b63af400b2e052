"""Microbenchmarks: ``bench/bench_kernels.py``, every result noted as it comes, the most telling ones first."""

import os
from pathlib import Path
from typing import Any

import pytest

from kangaroo_kernels.workloads import MODELS, TINY, ModelShape, Workload

from .job import ROOT, Job

SHAPES = {shape.name: shape for shape in (*MODELS, TINY)}


def flops(shape: ModelShape, workload: Workload, rows: int, length: int) -> int:
    """Multiplications and additions of the matrix products of an operation on ``rows`` tokens in flight."""
    if workload.op == "attention":
        return 4 * rows * length * shape.heads * shape.head_dim
    return 2 * rows * workload.out_features * workload.in_features


FIRST_ROWS = (1, 8)
"""A drafting step's and a verification's; other numbers of rows come behind them."""


class Collector:
    """A pytest plugin that orders the benchmarks, keeps what they found, and ends the session when the time is over."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cells: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.selected = 0

    @pytest.hookimpl(trylast=True)  # behind what deselects
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """One row before eight, the kernel and PyTorch's own way side by side, what must be compiled last."""

        def rank(item: Any) -> tuple[bool, bool, int]:
            values = item.callspec.params
            return values["way"] == "compiled", values["rows"] not in FIRST_ROWS, values["rows"]

        items.sort(key=rank)  # stable: otherwise the file's own order
        self.selected = len(items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Note a benchmark that has just run."""
        report = yield
        if call.when == "call":
            self.add(item, call)
        return report

    def add(self, item: Any, call: Any) -> None:
        """A result or a failure."""
        if call.excinfo is not None:
            self.failures.append(
                {"benchmark": item.name, "reason": str(call.excinfo.value).strip().splitlines()[0][:300]}
            )
        else:
            self.cells.append(self.cell(item))
        done = len(self.cells) + len(self.failures)
        self.job.note(
            cells=self.cells,
            failures=self.failures,
            not_run=self.selected - done,
            doing=f"{done} of {self.selected}, {item.callspec.params['case']}",
        )

    def cell(self, item: Any) -> dict[str, Any]:
        """What is shown of a benchmark; its raw numbers are in pytest-benchmark's own file."""
        benchmark, case = item.funcargs["benchmark"], item.callspec.params["case"]
        rows, way, info = item.callspec.params["rows"], item.callspec.params["way"], benchmark.extra_info
        microseconds = info["us"]["p50"] if "us" in info else 1e6 * benchmark.stats.stats.median
        workload, length = case.workload, case.length
        bytes_moved = workload.bytes_moved(rows, length, self.job.dtype.itemsize)
        return {
            "model": case.model,
            "op": workload.op,
            "role": workload.role,
            "length": length,
            "rows": rows,
            "way": way,
            "us": microseconds,
            "us_p20": info.get("us", {}).get("p20"),
            "us_p80": info.get("us", {}).get("p80"),
            "bytes": bytes_moved,
            "flops": flops(SHAPES[case.model], workload, rows, length),
            "gigabytes_per_second": bytes_moved / microseconds / 1e3,
            "share_of_ceiling": info.get("share_of_ceiling"),
            "relative_error": info.get("relative_error"),
        }

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
    if job.smoke:
        chosen += ["-k", "M1 and (gate_up or attention)"]
    collector = Collector(job)
    status = pytest.main(chosen, plugins=[collector])
    job.note(exit_status=int(status), raw=raw.name)
    if not collector.cells and not collector.failures and job.left > 0:
        raise RuntimeError(f"pytest ran no benchmark and ended with {int(status)}.")
