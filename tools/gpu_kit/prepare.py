"""Make ``.dev/``, which is carried to a GPU beside the project: the compiled kernels, and what Triton finds them by.

    python tools/gpu_kit/prepare.py

The GPU's machine has another Python than this one, and Triton's cache is keyed by the digest of Triton's own files, its
library for that Python included: the digest is read off that wheel. The kernels are compiled here with the same version
for this Python, in ``/tmp/kcache``, since Triton's cache holds absolute paths, and stripped to what a launch needs.
Nothing is done where neither the sources nor the kit changed; where a kernel changed, that one is compiled.
"""

import hashlib
import os
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
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

PYTHON, TRITON = "312", "3.6.0"
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


def pip(*command: Any) -> None:
    """pip, or the end."""
    status, said = run("-m", "pip", "--disable-pip-version-check", "--quiet", *command)
    if status:
        refuse("prepare", f"fetching Triton failed: {said[-1500:]}")


def digest(data: bytes) -> str:
    """As Triton has it."""
    return hashlib.sha256(data).hexdigest()


def key_of(wheel: Path, triton: Path) -> str:
    """``triton.runtime.cache.triton_key()`` as it is where that wheel is installed; ``triton`` has its Python files."""
    with zipfile.ZipFile(wheel) as archive:

        def parts(folder: str) -> Iterator[str]:
            for module in pkgutil.iter_modules([str(triton / folder)]):
                path = f"{folder}/{module.name}"
                yield digest(archive.read(f"triton/{path}/__init__.py" if module.ispkg else f"triton/{path}.py"))
                if module.ispkg:
                    yield from parts(path)

        found = [digest(archive.read("triton/runtime/cache.py")), *parts("compiler"), *parts("backends")]
        found += [digest(archive.read("triton/_C/libtriton.so")), *parts("language")]
        source = archive.read("triton/__init__.py").decode()
    return source.split("__version__ = ")[1].split("\n")[0].strip("'\"") + "-".join(found)


def wheel() -> Path:
    """The wheel for the GPU's Python, fetched once."""
    folder, pattern = BUILD / "wheels", f"triton-{TRITON}-cp{PYTHON}-*.whl"
    if not list(folder.glob(pattern)):
        which = ("--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "-d", folder, f"triton=={TRITON}")
        pip("download", *which)
    return next(folder.glob(pattern))


def triton_here() -> Path:
    """A folder with that Triton for this Python: the Makefile's, or one of its own."""
    for folder in (ROOT / ".venv/triton-3.6", BUILD / "triton"):
        if (folder / f"triton-{TRITON}.dist-info").is_dir():
            return folder
    pip("install", "--no-deps", "--target", BUILD / "triton", f"triton=={TRITON}")
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
    """The kernels that were asked for: machine code, and what a launcher must know of it."""
    names = sorted(set((BUILD / "used").read_text(encoding="utf-8").split()))
    with tarfile.open(DEV / "kcache.tgz", "w:gz", compresslevel=9) as archive:
        for file in sorted(file for name in names for file in (CACHE / name).iterdir()):
            if file.suffix in (".cubin", ".json"):
                archive.add(file, f"{CACHE.name}/{file.parent.name}/{file.name}")
    return len(names)


def main() -> None:
    """Compile the kernels that a GPU will be asked for."""
    file, carried = DEV / "key.json", DEV / "kcache.tgz"
    DEV.mkdir(exist_ok=True)
    shutil.copy(KIT / "sitecustomize.py", DEV)
    installed = triton_here()
    key = key_of(wheel(), installed / "triton")
    told = {"triton": TRITON, "key": key, "sources": digest_of_sources()}
    same = carried.is_file() and (told | {"complete": True}).items() <= read_json(file).items()
    told["commit"] = commit()
    write_json(file, told | {"complete": same})
    if not same:
        complete = compile_all(installed)
        print(f"{pack()} kernels, of {sum(1 for _ in CACHE.iterdir())} in {CACHE}")
        write_json(file, told | {"complete": complete})
    print(f"{carried}: {carried.stat().st_size / 2**20:.2f} MiB{', nothing changed' if same else ''}")


if __name__ == "__main__":
    typer.run(main)
