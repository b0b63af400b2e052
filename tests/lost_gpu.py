"""A test that leaves the GPU unusable is told of once, and no later test fails for it.

After an illegal access every later call of the same process fails, whatever it asks for. So the device is waited for
behind each phase of each test. Where that raises, the process runs no further test: a worker of pytest-xdist ends, and
another one goes on with the tests that are left; a run without workers stops with a sentence that names the test. The
file ``$LOST_GPU_LOG`` keeps what the test said.

``conftest.py`` takes the hook from here.
"""

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
import torch

LOST = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """Look after the GPU."""
    report = yield
    if LOST in item.config.stash:  # teardowns behind the loss fail as everything does
        report.outcome, report.longrepr = "passed", None
    elif error := loss():
        item.config.stash[LOST] = True
        if not report.failed:
            report.outcome, report.longrepr = "failed", f"the GPU is lost: {error}"
        tell(item, f"{item.nodeid} left the GPU unusable, so no test can follow in this process: {error}", report)
    return report


def loss() -> str | None:
    """Why the device cannot be waited for; None where it can, or was never used."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, this context is lost
        return str(error).partition("\n")[0]
    return None


def tell(item: pytest.Item, sentence: str, report: Any) -> None:
    """End this worker, or this run."""
    with open(os.environ.get("LOST_GPU_LOG", os.devnull), "a", encoding="utf-8") as log:
        log.write(f"{sentence}\n{report.longreprtext[-1500:]}\n\n")
    if hasattr(item.config, "workerinput"):
        print(sentence, file=sys.stderr, flush=True)
        os._exit(3)
    item.session.shouldstop = sentence
