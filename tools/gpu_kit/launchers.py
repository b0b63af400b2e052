"""Build the kernels' launchers, on the GPU's machine and all of them at once.

    python3 tools/gpu_kit/launchers.py

Triton 3.6 compiles a C module for every signature of a kernel, when it is first launched. Such a module fits one Python
alone, so ``prepare.py`` carries the sources, and Triton itself builds them here, where it will look for them in
``$TRITON_CACHE_DIR``. Newer versions of Triton have one launcher for all kernels, and nothing is done.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triton.backends.nvidia import driver


def build(source: Path) -> None:
    """As ``CudaLauncher`` does it; the compiler is a process of its own."""
    where = {"library_dirs": driver.library_dirs(), "include_dirs": driver.include_dirs, "libraries": driver.libraries}
    driver.compile_module_from_src(src=source.read_text(encoding="utf-8"), name=source.stem, **where)


def build_all() -> int:
    """Build what is not there yet; how many there are."""
    wanted = hasattr(driver, "make_launcher")
    sources = sorted(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.c")) if wanted else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, sources))
    return len(sources)


if __name__ == "__main__":
    began = time.monotonic()
    print(f"{build_all()} launchers, {time.monotonic() - began:.1f} s")
