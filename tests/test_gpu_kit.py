"""What is carried to a GPU: the launchers of Triton 3.6 are built there once, and found ever after."""

import re
import shutil
import subprocess

import pytest
from compiling import ROOT, printed_by

OLDER_TRITON = ROOT / ".venv" / "triton-3.6"

LAUNCH = """
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, "tools/gpu_kit")
from triton.backends.nvidia import driver as nvidia
real, on_a_gpu, asked = (nvidia.compile_module_from_src, nvidia.library_dirs), sys.argv[1:], []
import standin
import torch
from report.job import log_compilations
from kernel_calls import META, STEPS
from kangaroo_kernels.workloads import TINY, Settings

def launcher(src, metadata):
    asked.append((src, metadata))
    nvidia.CudaLauncher(src, metadata)
    return lambda *args: None

def logged():
    log = Path(os.environ["COMPILED_LOG"])
    return log.read_text().split() if log.exists() else []

if on_a_gpu:
    nvidia.compile_module_from_src, nvidia.library_dirs = real
    standin.Driver.launcher_cls = staticmethod(launcher)
    log_compilations()
(step,) = (step for step in STEPS if step.name == "commit")
for call in step.calls(TINY, Settings(3, 128, torch.bfloat16, META)):
    call.launch()
found = logged()
if on_a_gpu:
    for module in Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.so"):
        module.unlink()
    nvidia.CudaLauncher(*asked[0])
print(json.dumps([len(asked), found, logged()]))
"""
BUILD = "import sys; sys.path.insert(0, 'tools/gpu_kit'); import launchers; print(launchers.build_all())"


def test_launchers_are_built_once(tmp_path, monkeypatch):
    if not (OLDER_TRITON.is_dir() and shutil.which("gcc")):
        pytest.skip("Triton 3.6 or a C compiler is not there; `make .venv/triton-3.6` fetches the former")
    cuda, cache = tmp_path / "libcuda.so.1", tmp_path / "cache"
    for name, value in {
        "TRITON_CACHE_DIR": cache,
        "TRITON_LIBCUDA_PATH": tmp_path,
        "LD_LIBRARY_PATH": tmp_path,
        "STANDIN_USED": tmp_path / "used",
        "COMPILED_LOG": tmp_path / "log",
    }.items():
        monkeypatch.setenv(name, str(value))
    printed_by("-c", LAUNCH, triton=OLDER_TRITON)
    (source,) = cache.glob("*/*.c")
    assert source.parent.name in (tmp_path / "used").read_text().split()
    functions = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", source.read_text())))
    stubs = "".join(f"void {name}(void) {{}}\n" for name in functions)
    subprocess.run(["gcc", "-shared", "-o", cuda, "-x", "c", "-"], input=stubs, text=True, check=True)
    assert printed_by("-c", BUILD, triton=OLDER_TRITON) == 1
    assert printed_by("-c", LAUNCH, "for a GPU", triton=OLDER_TRITON) == [1, [], ["__triton_launcher"]]
