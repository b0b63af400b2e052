"""The house's order: imports run one way, and importing the operations stays light."""

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kangaroo_kernels.operation import OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
KERNELS, MODEL = ROOT / "kangaroo_kernels", ROOT / "model"

# A module of model/ may import those of a line above its own, never of the same line: draft and verify do not see
# each other.
ORDER = (
    {"errors", "graphs", "mailbox", "spans", "threads"},
    {"config", "demo", "operations", "text"},
    {"sampling", "weights", "cache"},
    {"llama", "state"},
    {"adapter"},
    {"draft", "iteration", "verify"},
    {"decode"},
    {"generate"},
    {"compare", "info", "train"},
    {"show"},
    {"cli"},
)
RANKS = {module: rank for rank, modules in enumerate(ORDER) for module in modules}
LIBRARIES = {"torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy"}
TERMINAL = {"typer", "rich", "pynvml"}
FOR_THE_TERMINAL = {"cli", "compare", "info", "show", "train"}


class Import(NamedTuple):
    """One imported module, dotted; relative ones begin with a dot."""

    name: str
    at_module_level: bool


def imports(source: str) -> Iterator[Import]:
    """Every import of a module, wherever it stands."""
    tree = ast.parse(source)
    inner = {node for function in ast.walk(tree) if isinstance(function, SCOPES) for node in ast.walk(function)}
    for node in ast.walk(tree):
        level = node not in inner
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            if node.module is None:
                yield from (Import(dots + alias.name, level) for alias in node.names)
            else:
                yield Import(dots + node.module, level)
                # "from kangaroo_kernels import model" imports a module, too
                if not dots and node.module == "kangaroo_kernels":
                    yield from (Import(f"kangaroo_kernels.{alias.name}", level) for alias in node.names)


SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def top(name: str) -> str:
    return name.partition(".")[0]


def is_library(name: str) -> bool:
    """Whether a module comes from a package that must be installed."""
    return not name.startswith(".") and top(name) not in sys.stdlib_module_names


def names_in(path: Path) -> set[str]:
    return {found.name for found in imports(path.read_text(encoding="utf-8"))}


def modules(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"{folder} holds no modules: this test looks in the wrong place"
    return found


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- the test's own eyes


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import os.path, torch as t
from .config import LlamaConfig
from . import errors
from kangaroo_kernels import model
if True:
    import json
def f():
    from transformers import AutoConfig
    def g():
        import rich.table
class C:
    import math
    method = lambda self: __import__("sys")
"""
    assert set(imports(source)) == {
        Import("os.path", True),
        Import("torch", True),
        Import(".config", True),
        Import(".errors", True),
        Import("kangaroo_kernels", True),
        Import("kangaroo_kernels.model", True),
        Import("json", True),
        Import("transformers", False),
        Import("rich.table", False),
        Import("math", True),
    }


# ---- kangaroo_kernels/


@pytest.mark.parametrize("path", modules(KERNELS), ids=show)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    for found in imports(path.read_text(encoding="utf-8")):
        assert not found.name.startswith("."), "the kernels import each other by their full names"
        allowed = {"torch", "triton", "kangaroo_kernels"}
        assert not is_library(found.name) or top(found.name) in allowed, found.name
        assert found.at_module_level, f"{found.name} is imported inside a function"


@pytest.mark.parametrize("path", modules(KERNELS), ids=show)
def test_kernels_do_not_know_the_model(path: Path) -> None:
    """But for the names that ``__init__`` hands out lazily, and type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path == KERNELS / "__init__.py":
        guards = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        assert len(guards) == 1
        tree.body.remove(guards[0])
    for found in imports(ast.unparse(tree)):
        assert not found.name.startswith(("kangaroo_kernels.model", "model")), found.name


def reached(path: Path, seen: set[Path]) -> set[str]:
    """The libraries that importing a module of ``kangaroo_kernels`` takes."""
    seen.add(path)
    libraries = set()
    for name in names_in(path):
        inner = KERNELS / (name.removeprefix("kangaroo_kernels.").replace(".", "/") + ".py")
        if name.startswith("kangaroo_kernels.") and inner.is_file():
            if inner not in seen:
                libraries |= reached(inner, seen)
        elif is_library(name) and name != "kangaroo_kernels":
            libraries.add(top(name))
    return libraries


REFERENCES = sorted((KERNELS / "reference").glob("*.py"))
WITHOUT_TRITON = [*REFERENCES, *(KERNELS / f"{name}.py" for name in ("contract", "operation", "ops", "workloads"))]


@pytest.mark.parametrize("path", WITHOUT_TRITON, ids=show)
def test_references_and_their_table_work_without_triton(path: Path) -> None:
    assert reached(path, set()) <= {"torch"}


@pytest.mark.parametrize("path", REFERENCES, ids=show)
def test_references_see_each_other_and_what_kernels_share_with_them(path: Path) -> None:
    allowed = {f"kangaroo_kernels.{name}" for name in ("contract", "packed_weight", "shared.checks")}
    allowed |= {f"kangaroo_kernels.reference.{each.stem}" for each in REFERENCES}
    assert {name for name in names_in(path) if top(name) == "kangaroo_kernels"} <= allowed


def test_kernels_do_not_see_the_references() -> None:
    """An oracle that its kernel can change is none. The table alone knows both."""
    for path in modules(KERNELS):
        if path not in (*REFERENCES, KERNELS / "operation.py"):
            assert not any("kangaroo_kernels.reference" in name for name in names_in(path)), show(path)


def test_every_kernel_is_an_operation_and_has_its_reference() -> None:
    """Under one name: ``x.py``, or a folder ``x/``, where Triton is used; ``reference/x.py``; ``OPERATIONS["x"]``."""
    with_triton = [path for path in modules(KERNELS) if "triton" in {top(name) for name in names_in(path)}]
    kernels = {path.relative_to(KERNELS).parts[0].removesuffix(".py") for path in with_triton} - {"shared"}
    assert kernels == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        assert operation.reference.__module__ == f"kangaroo_kernels.reference.{name}"
        assert operation.launcher.__module__ in (f"kangaroo_kernels.{name}", f"kangaroo_kernels.{name}.kernel")


# ---- model/


def test_every_module_has_its_place() -> None:
    """A new module of model/ must be given a line in ``ORDER``."""
    found = {path.stem for path in modules(MODEL)} - {"__init__"}
    assert found <= set(RANKS), f"no place in ORDER for {sorted(found - set(RANKS))}"
    assert set(RANKS) <= found, f"ORDER names {sorted(set(RANKS) - found)}, which model/ does not hold"


def tree_in_the_document(folder: str) -> list[str]:
    """The modules that docs/architecture.md names in its picture of a folder, in its order."""
    picture = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition(f"\n{folder}/ ")[2]
    lines = itertools.takewhile(lambda line: line.startswith("  "), picture.splitlines()[1:])
    return re.findall(r"(\w+)\.py\b", "\n".join(lines))


def test_the_document_has_every_module_in_its_order() -> None:
    named = tree_in_the_document("model")
    assert sorted(named) == sorted(RANKS)
    assert named == sorted(named, key=RANKS.__getitem__)


def test_the_documents_have_every_module_of_the_kernels() -> None:
    stems = {path.stem for path in KERNELS.glob("*.py")} - {"__init__"}
    own = {stem for stem in stems if stem.startswith("_")}
    assert set(tree_in_the_document("kangaroo_kernels")) - {"_ref"} == {
        stem for stem in stems - own if not stem.endswith("_ref")
    }
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(_\w+)\.py`", text)) == own


@pytest.mark.parametrize("path", modules(MODEL), ids=show)
def test_model_imports_run_one_way(path: Path) -> None:
    if path.stem == "__init__":
        assert names_in(path) == set(), "importing the package must not import all of it"
        return
    for name in names_in(path):
        if name.startswith("."):
            sibling = name.removeprefix(".")
            assert sibling in RANKS, f"{name} is no module of model/"
            assert RANKS[sibling] < RANKS[path.stem], f"{path.stem} must not import {sibling}"
        else:
            assert not name.startswith("kangaroo_kernels.model"), f"{name}: siblings are imported relatively"
            assert top(name) not in {"model", "bench", "tests", "tools", "pairs"}, name


@pytest.mark.parametrize("path", modules(MODEL), ids=show)
def test_model_uses_few_libraries(path: Path) -> None:
    allowed = LIBRARIES | {"kangaroo_kernels"} | (TERMINAL if path.stem in FOR_THE_TERMINAL else set())
    assert {top(name) for name in names_in(path) if is_library(name)} <= allowed


def test_libraries_are_declared() -> None:
    """What model/ imports stands in ``pyproject.toml``."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = text.partition("dependencies = [")[2].partition("]")[0].replace("-", "_")
    names = {top(name) for path in modules(MODEL) + modules(KERNELS) for name in names_in(path) if is_library(name)}
    for name in names - {"kangaroo_kernels", "pynvml"}:  # nvidia-ml-py's own name for itself
        assert f'"{name}' in declared, name


# ---- what an import costs


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LIGHT = """
import sys
import kangaroo_kernels
{}
heavy = ("kangaroo_kernels.model", "transformers", "tokenizers", "safetensors", "typer", "rich", "triton", "model")
loaded = sorted(name for name in sys.modules if name.startswith(heavy))
assert not loaded, loaded
"""


def test_importing_the_operations_is_light() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in WITHOUT_TRITON]
    run(LIGHT.format("\n".join(f"import {name}" for name in names)))


def test_importing_the_runtime_leaves_transformers_out() -> None:
    """It takes seconds, and is fetched where it is used."""
    run(
        """
import sys
from kangaroo_kernels import DecodeStats, Generation, Kangaroo, KangarooError
assert Kangaroo.__module__ == Generation.__module__ == "kangaroo_kernels.model.kangaroo"
assert issubclass(KangarooError, ValueError)
assert "transformers" not in sys.modules
assert "model" not in sys.modules
"""
    )


def test_public_names() -> None:
    import kangaroo_kernels

    assert sorted(dir(kangaroo_kernels)) == sorted(kangaroo_kernels.__all__)
    for name in kangaroo_kernels.__all__:
        assert getattr(kangaroo_kernels, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = kangaroo_kernels.nothing


def test_helpers_of_tests_have_names_of_their_own() -> None:
    """Tests import them by name alone; of two the first found would hide the other, a second conftest the first."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    assert len({path.name for path in paths}) == len(paths)
