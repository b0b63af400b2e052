"""Every example runs as it stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_runs(path):
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # tests beside it use the others
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr


def test_a_kernel_serves_transformers_model():
    done = subprocess.run([sys.executable, EXAMPLES[-1], "--tokens", "5"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert EXAMPLES[-1].name == "use_kernels.py"
    assert len(lines) == 6
    assert lines[-1] == "the same tokens"
    assert 0 < float(lines[0].split("probability ")[1].split()[0]) <= 1
