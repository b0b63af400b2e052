"""Make ``.dev/``, which is carried to a GPU beside the project: the compiled kernels, and what Triton finds them by.

    python tools/gpu_kit/prepare.py

The kernels are compiled for sm_90 by the Triton of the GPU's machine, whatever its Python, in ``/tmp/kcache``, since
Triton's cache holds absolute paths, and stripped to what a launch needs. ``sitecustomize.py`` makes Triton find them,
and ``launchers.py`` builds there what depends on the Python of that machine. Nothing is done where neither the sources
nor the kit changed; where a kernel changed, that one is compiled.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import typer

# ruff: noqa: E402 (the tools first)
KIT = Path(__file__).resolve().parent
ROOT = KIT.parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from command import refuse
from gpu_report import commit, digest_of_sources
from report.job import write_json
from report.runner import read_json

TRITON = "3.6.0"
"""Of the GPU's machine."""

DEV, BUILD, CACHE = ROOT / ".dev", ROOT / "build" / "gpu", Path("/tmp/kcache")
WORK = ("Vicuna-7B", "kernel-tests", "Llama-3.1-8B", "Llama-3.2-1B", "loops", "model-tests", "decodes", "parts")
COMPUTING = ("model-tests", "decodes", "parts")


def run(*command: Any, **environment: str) -> tuple[int, str]:
    """A program of this Python in the root, politely: its exit status, and what it printed."""
    line = ["nice", "-n", "5", sys.executable, *map(str, command)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(line, cwd=ROOT, env=os.environ | environment, check=False, **pipes)
    return done.returncode, done.stdout.strip()


def triton_here() -> Path:
    """A folder with that Triton for this Python: the Makefile's, or one of its own."""
    for folder in (ROOT / ".venv/triton-3.6", BUILD / "triton"):
        if (folder / f"triton-{TRITON}.dist-info").is_dir():
            return folder
    status, said = run("-m", "pip", "install", "-q", "--no-deps", "--target", BUILD / "triton", f"triton=={TRITON}")
    if status:
        refuse("prepare", f"fetching Triton failed: {said[-1500:]}")
    return BUILD / "triton"


def compile_all(triton: Path) -> bool:
    """Two processes at a time; whether all went well, and whether nothing had to be compiled is what they print."""
    paths = [triton, ROOT, DEV, KIT, *(ROOT / name for name in ("tools", "tests", "tests/gpu"))]
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(CACHE),
        "TRITON_INTERPRET": "0",
        "STANDIN_USED": str(BUILD / "used"),
        "GPU_TESTS_ON_CPU": "1",
    }

    def work(what: str) -> bool:
        mode = "compute" if what in COMPUTING else ""
        status, said = run("-O", KIT / "fill.py", what, BUILD, **environment, STANDIN=mode)
        print(f"{what} failed:\n{said[-1500:]}" if status else said.splitlines()[-1], flush=True)
        return status == 0

    (BUILD / "used").write_text("")
    with ThreadPoolExecutor(2) as pool:
        return all(list(pool.map(work, WORK)))


def pack() -> int:
    """The kernels that were asked for: machine code, what a launcher must know of it, and the launchers' sources."""
    names = sorted(set((BUILD / "used").read_text(encoding="utf-8").split()))
    with tarfile.open(DEV / "kcache.tgz", "w:gz", compresslevel=9) as archive:
        for file in sorted(file for name in names for file in (CACHE / name).iterdir()):
            if file.suffix in (".cubin", ".json", ".c"):
                archive.add(file, f"{CACHE.name}/{file.parent.name}/{file.name}")
    return len(names)


def main() -> None:
    """Compile the kernels that a GPU will be asked for."""
    file, carried = DEV / "key.json", DEV / "kcache.tgz"
    DEV.mkdir(exist_ok=True)
    shutil.copy(KIT / "sitecustomize.py", DEV)
    BUILD.mkdir(parents=True, exist_ok=True)
    told = {"triton": TRITON, "sources": digest_of_sources()}
    same = carried.is_file() and (told | {"complete": True}).items() <= read_json(file).items()
    told["commit"] = commit()
    write_json(file, told | {"complete": same})
    if not same:
        complete = compile_all(triton_here())
        print(f"{pack()} kernels and launchers, of {sum(1 for _ in CACHE.iterdir())} in {CACHE}")
        write_json(file, told | {"complete": complete})
    print(f"{carried}: {carried.stat().st_size / 2**20:.2f} MiB{', nothing changed' if same else ''}")


if __name__ == "__main__":
    typer.run(main)
