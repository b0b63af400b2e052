#!/usr/bin/env python3
"""Make ``.dev/``, which is carried to a GPU that is there for minutes: the kit and the compiled kernels. Run it in the project's root.

    python3 tools/gpu_kit/prepare.py [--python 312] [--triton 3.6.0] [--dry] [--again]

The GPU's machine has another Python than this one, and Triton's cache is keyed by the digest of Triton's own files, its
library for that Python included: the digest is read off that wheel. The kernels are compiled here with the same version
for this Python, in ``/tmp/kcache``, since Triton's cache holds absolute paths, and stripped to what a launch needs.
Nothing is done where neither the sources nor the kit changed; where a kernel changed, that one is compiled.
"""

import argparse
import hashlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KIT = Path(__file__).resolve().parent
ROOT = KIT.parents[1]
DEV, BUILD, CACHE = ROOT / ".dev", ROOT / "build" / "gpu", Path("/tmp/kcache")
CARRIED = ("first.py", "loops.py", "guard.py", "sitecustomize.py")
DECIDING = ("fill.py", "standin.py", "first.py", "loops.py", "sitecustomize.py")
SOURCES = ("kangaroo_kernels", "model", "tools", "tests")
WORK = ("Vicuna-7B", "kernel-tests", "Llama-3.1-8B", "Llama-3.2-1B", "loops", "model-tests", "decodes")
COMPUTING = ("model-tests", "decodes")
DIRECTORIES = (".venv/triton-3.6", "build/gpu/triton")


def run(*command, **environment):
    """A program in the root, politely: its exit status, and what it printed."""
    done = subprocess.run(
        ["nice", "-n", "5", *map(str, command)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.strip()


def require(what, *command, **environment):
    """The same, or the end."""
    status, said = run(*command, **environment)
    if status:
        sys.exit(f"prepare: {what} failed:\n{said[-1500:]}")
    return said


def digest(data):
    return hashlib.sha256(data).hexdigest()


def key_of(wheel, triton):
    """``triton.runtime.cache.triton_key()`` as it is where that wheel is installed; ``triton`` has its Python files."""
    with zipfile.ZipFile(wheel) as archive:

        def parts(folder):
            for module in pkgutil.iter_modules([str(triton / folder)]):
                path = f"{folder}/{module.name}"
                yield digest(archive.read(f"triton/{path}/__init__.py" if module.ispkg else f"triton/{path}.py"))
                if module.ispkg:
                    yield from parts(path)

        found = [digest(archive.read("triton/runtime/cache.py"))]
        found += [*parts("compiler"), *parts("backends")]
        found.append(digest(archive.read("triton/_C/libtriton.so")))
        found += parts("language")
        source = archive.read("triton/__init__.py").decode()
    version = source.split("__version__ = ")[1].split("\n")[0].strip("'\"")
    return version, version + "-".join(found)


def wheel_of(python, pip, version):
    """The wheel for the GPU's Python, fetched once."""
    folder = BUILD / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"triton-{version}-cp{python}-*.whl"
    if not list(folder.glob(pattern)):
        fetch = ("download", "--quiet", "--no-deps", "--only-binary=:all:", f"--python-version={python}")
        require("fetching Triton's wheel", *pip, *fetch, "-d", folder, f"triton=={version}")
    return next(folder.glob(pattern))


def triton_for(pip, version):
    """A folder with that Triton for this Python: the Makefile's, or one of its own."""
    for folder in DIRECTORIES:
        if (ROOT / folder / f"triton-{version}.dist-info").is_dir():
            return ROOT / folder
    fetch = ("install", "--quiet", "--no-deps", "--target", BUILD / "triton")
    require("installing Triton", *pip, *fetch, f"triton=={version}")
    return BUILD / "triton"


def sources():
    """What decides which kernels there are."""
    files = [file for folder in SOURCES for file in (ROOT / folder).glob("**/*") if file.suffix in (".py", ".json")]
    return digest(b"".join(file.read_bytes() for file in [*sorted(files), *(KIT / name for name in DECIDING)]))


def pack(used):
    """The kernels that were asked for: machine code, and what a launcher must know of it."""
    names = sorted(set(used.read_text(encoding="utf-8").split()))
    with tarfile.open(DEV / "kcache.tgz", "w:gz", compresslevel=9) as archive:
        for file in sorted(file for name in names for file in (CACHE / name).iterdir()):
            if file.suffix in (".cubin", ".json"):
                archive.add(file, f"{CACHE.name}/{file.parent.name}/{file.name}")
    return len(names)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default="312", help="of the GPU's machine")
    parser.add_argument("--triton", default="3.6.0", help="of the GPU's machine")
    parser.add_argument("--with", dest="interpreter", default=str(ROOT / ".venv/bin/python"), help="this machine's")
    parser.add_argument("--dry", action="store_true", help="then lead first.py through it without a GPU: minutes")
    parser.add_argument("--again", action="store_true", help="even if nothing changed")
    given = parser.parse_args()
    began, pip = time.monotonic(), (given.interpreter, "-m", "pip", "--disable-pip-version-check")
    if not Path(given.interpreter).is_file() or not (ROOT / "kangaroo_kernels").is_dir():
        sys.exit("prepare: run it in the project's root, after 'make demo' or 'make test' has set up .venv.")

    DEV.mkdir(exist_ok=True)
    for name in CARRIED:
        shutil.copy(KIT / name, DEV / name)
    triton = triton_for(pip, given.triton)
    version, key = key_of(wheel_of(given.python, pip, given.triton), triton / "triton")
    state = sources() + digest(key.encode())
    known = json.loads((DEV / "key.json").read_text()) if (DEV / "key.json").is_file() else {}
    if known.get("state") == state and (DEV / "kcache.tgz").is_file() and not given.again:
        print("nothing changed")
    else:
        (DEV / "key.json").write_text(json.dumps({"triton": version, "key": key}), encoding="utf-8")
        failed = compile_all(given.interpreter, triton)
        print(f"{pack(BUILD / 'used')} kernels, of {sum(1 for _ in CACHE.iterdir())} in {CACHE}")
        commit = require("git", "git", "describe", "--always", "--dirty")
        told = {"triton": version, "key": key, "commit": commit, "state": "" if failed else state}
        (DEV / "key.json").write_text(json.dumps(told), encoding="utf-8")
    for file in sorted(DEV.iterdir()):
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")
    if given.dry:
        dry(given.interpreter, triton)
    print(f"{time.monotonic() - began:.0f} s")


def environment_of(triton):
    """What the kit's other programs need on this machine."""
    paths = [triton, ROOT, DEV, KIT, ROOT / "tools", ROOT / "tests"]
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(CACHE),
        "TRITON_INTERPRET": "0",
        "STANDIN_USED": str(BUILD / "used"),
    }


def compile_all(python, triton):
    """Two processes at a time; whether one failed."""
    (BUILD / "used").write_text("")

    def work(what):
        mode = "compute" if what in COMPUTING else ""
        status, said = run(python, "-O", KIT / "fill.py", what, BUILD, **environment_of(triton), STANDIN=mode)
        print(said[-1500:] if status else said.splitlines()[-1], flush=True)
        return status

    with ThreadPoolExecutor(2) as pool:
        return any(list(pool.map(work, WORK)))


def dry(python, triton):
    """What is carried, unpacked in the place of the cache; then ``first.py``'s stages on it."""
    shutil.rmtree(CACHE)
    with tarfile.open(DEV / "kcache.tgz") as archive:
        archive.extractall(CACHE.parent, filter="data")
    environment = environment_of(triton) | {"STANDIN_USED": os.devnull, "STANDIN": "compute"}
    print(require("the dry run", python, "-O", KIT / "dry.py", BUILD, **environment))


if __name__ == "__main__":
    main()
