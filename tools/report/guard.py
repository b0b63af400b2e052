"""A pytest plugin for GPU tests: a test that broke the GPU's context takes its process along, and no other test.

After an illegal access every later call of that process fails. So a failed test is followed by a synchronisation, and
where that raises, the process ends; pytest-xdist starts another worker, which goes on with the tests that are left.
What the test said goes to the file ``$GUARD_LOG``. Which kernels each worker had to compile is told to its controller.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest
import torch
from triton import knobs

found, compiled = list[str](), list[str]()


def note(*, src: Any, cache_hit: bool, **event: Any) -> None:
    """Triton tells of every kernel once a process."""
    (found if cache_hit else compiled).append(src.name)


knobs.compilation.listener = note


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    """Look after the GPU behind a test that failed."""
    report = yield
    if report.failed and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:  # whatever it is, this context is lost
            with open(os.environ.get("GUARD_LOG", os.devnull), "a", encoding="utf-8") as log:
                log.write(f"{item.nodeid}: {report.longreprtext[-1500:]}\nafterwards: {error}\n\n")
            os._exit(3)
    return report


def pytest_sessionfinish(session: Any) -> None:
    """A worker tells what it compiled."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["found"], output["compiled"] = found, compiled


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """The controller adds it up."""
    told = getattr(node, "workeroutput", {})
    found.extend(told.get("found", ()))
    compiled.extend(told.get("compiled", ()))
