"""The guard behind every test: what it says, what it counts, and what goes on."""

import os
import re
import subprocess
import sys

import pytest
from compiling import ROOT

CONFTEST = "from lost_gpu import pytest_runtest_makereport\n"
TESTS = """
import pytest
import torch

def lose():
    def fail(): raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore about it")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, fail

@pytest.fixture(scope="module", autouse=True)
def memory():
    yield
    torch.cuda.synchronize() if torch.cuda.is_initialized() else None

@pytest.fixture
def small():
    yield
    torch.cuda.synchronize() if torch.cuda.is_initialized() else None

def test_before(): pass
def test_that_loses(small):
    lose()
    assert ENDING
def test_behind(): torch.cuda.synchronize() if torch.cuda.is_initialized() else None
"""
SENTENCE = (
    "test_some.py::test_that_loses left the GPU unusable, so no test can follow in this process: "
    "CUDA error: an illegal memory access was encountered"
)


def run(folder, ending, *arguments):
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(TESTS.replace("ENDING", ending))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "LOST_GPU_LOG": str(folder / "lost.txt")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "test_some.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    counts = dict(map(reversed, re.findall(r"(\d+) (passed|failed|error)", done.stdout.splitlines()[-1])))
    return done, counts


@pytest.mark.parametrize("ending", ["0, 'the wrong bits'", "True"], ids=["a test that fails", "one that passes"])
def test_a_run_stops_at_the_test_that_lost_the_gpu(ending, tmp_path):
    """Neither its teardown nor the module's is a failure of its own, and nothing comes behind."""
    done, counts = run(tmp_path, ending)
    assert (done.returncode, counts) == (2, {"passed": "1", "failed": "1"}), done.stdout
    assert f" {SENTENCE} " in done.stdout
    assert ("the wrong bits" if "bits" in ending else "the GPU is lost: CUDA error") in (
        tmp_path / "lost.txt"
    ).read_text()
    assert "INTERNALERROR" not in done.stdout + done.stderr


def test_of_workers_one_ends_and_another_goes_on(tmp_path):
    done, counts = run(tmp_path, "True", "-n", "1")
    assert (done.returncode, counts) == (1, {"passed": "2", "failed": "1"}), done.stdout
    assert SENTENCE in done.stderr + done.stdout
    assert "crashed while running 'test_some.py::test_that_loses'" in done.stdout
