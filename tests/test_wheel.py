"""The wheel: one top-level name, everything that ``kangaroo demo`` needs, and it runs from where it was unpacked."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "kangaroo_kernels", "model")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout keeps no ``build/``."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``site-packages`` would be."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_of(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}


def test_the_only_top_level_name(names: list[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    information = {name for name in tops if name.endswith(".dist-info")}
    assert len(information) == 1
    assert tops - information == {"kangaroo_kernels"}


def test_every_module_is_inside(names: list[str]) -> None:
    kernels = {f"kangaroo_kernels/{name}" for name in files_of(ROOT / "kangaroo_kernels", ("*.py", "py.typed"))}
    model = {f"kangaroo_kernels/model/{name}" for name in files_of(ROOT / "model", ("*.py", "py.typed"))}
    assert "kangaroo_kernels/model/kangaroo.py" in model
    assert "kangaroo_kernels/py.typed" in kernels
    assert "kangaroo_kernels/model/py.typed" in model
    assert {name for name in names if name.endswith((".py", "py.typed"))} == kernels | model


@pytest.mark.parametrize("folder", ["demo_pair", "smollm2_adapter"])
def test_what_was_trained_is_inside(folder: str, names: list[str]) -> None:
    shipped = {f"kangaroo_kernels/model/{folder}/{name}" for name in files_of(ROOT / "model" / folder, ("*",))}
    assert shipped == {name for name in names if f"/{folder}/" in name}
    assert len(shipped) > 4


def test_nothing_else_is_inside(names: list[str]) -> None:
    known = (".dist-info/", "/demo_pair/", "/smollm2_adapter/")
    others = [
        name for name in names if not name.endswith((".py", "py.typed")) and not any(folder in name for folder in known)
    ]
    configs = sorted((ROOT / "kangaroo_kernels" / "configs").glob("*.json"))
    assert configs
    assert sorted(others) == [str(path.relative_to(ROOT)) for path in configs]


@pytest.mark.parametrize("file", ["LICENSE", "NOTICE"])
def test_licence_files_are_inside(file: str, site: Path) -> None:
    (found,) = site.glob(f"*.dist-info/licenses/{file}")
    assert found.read_bytes() == (ROOT / file).read_bytes()


def test_the_command(site: Path) -> None:
    (path,) = site.glob("*.dist-info/entry_points.txt")
    entries = configparser.ConfigParser()
    entries.read(path)
    assert dict(entries["console_scripts"]) == {"kangaroo": "kangaroo_kernels.model.commands.cli:main"}


def test_version(site: Path) -> None:
    from kangaroo_kernels import __version__

    (path,) = site.glob("*.dist-info/METADATA")
    assert f"\nVersion: {__version__}\n" in path.read_text(encoding="utf-8")


RUN = """
import importlib.util, sys
from pathlib import Path
site = Path(sys.argv[1])
import kangaroo_kernels
import kangaroo_kernels.model.kangaroo as generate
from kangaroo_kernels.model.commands.cli import main
assert Path(kangaroo_kernels.__file__).is_relative_to(site), kangaroo_kernels.__file__
assert Path(generate.__file__).is_relative_to(site), generate.__file__
assert kangaroo_kernels.Kangaroo is generate.Kangaroo
assert callable(main)
assert importlib.util.find_spec("model") is None, importlib.util.find_spec("model")
"""


def test_the_wheel_runs_from_where_it_is_unpacked(site: Path, tmp_path: Path) -> None:
    """Elsewhere than the checkout, with nothing called ``model`` at top level."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{RUN}", str(site)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
