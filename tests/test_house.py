"""The house's order: imports run one way, and importing the operations stays light."""

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kangaroo_kernels.operation import OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
KERNELS, MODEL = ROOT / "kangaroo_kernels", ROOT / "model"
PAIRS = {"demo_pair", "smollm2_adapter"}  # folders of what was trained, and no rooms

ROOMS = (
    ("errors",),
    ("files", "spans", "number"),
    ("results", "demo", "text"),
    ("chat", "backend", "named", "shaping", "rejection"),
    ("head",),
    ("sampling",),
    ("target",),
    ("drafters",),
    ("request",),
    ("loop",),
    ("load", "writer"),
    ("session",),
    ("kangaroo",),
    ("ahead",),
    ("integrations",),
    ("evaluation",),
    ("training", "serving"),
    ("commands",),
    ("__main__",),
)
"""Modules and folders of model/. Each may import those of a line above its own, never of the same line."""

RANKS = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
LIBRARIES = {"torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "gguf"}
TERMINAL = {"typer", "rich", "pynvml"}
FOR_THE_TERMINAL = {"commands", "evaluation", "training"}
OPTIONAL = {
    "evaluation": {"matplotlib", "pyarrow"},
    "training": {"matplotlib"},
    "serving": {"fastapi", "starlette", "uvicorn", "prometheus_client"},
}
"""What a room uses where it is installed; FastAPI brings Starlette."""
EXTRAS = set().union(*OPTIONAL.values())


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
    found = sorted(path for path in folder.rglob("*.py") if not PAIRS & set(path.parts))
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


def room_of(path: Path) -> str:
    """The module or folder of model/ that a file belongs to."""
    return path.relative_to(MODEL).parts[0].removesuffix(".py")


def without_types(path: Path) -> str:
    """The source but for what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    tree.body = [node for node in tree.body if node not in guards]
    return ast.unparse(tree)


def siblings_of(path: Path) -> Iterator[Path]:
    """The modules of model/ that a module imports, wherever it does."""
    for found in imports(without_types(path)):
        if found.name.startswith("."):
            name = found.name.lstrip(".")
            folder = path.parents[len(found.name) - len(name) - 1]
            inner = folder / name.replace(".", "/")
            yield inner.with_suffix(".py") if inner.with_suffix(".py").is_file() else inner / "__init__.py"


def test_every_room_has_its_place() -> None:
    """A new module or folder of model/ must be given a line in ``ROOMS``."""
    assert {room_of(path) for path in modules(MODEL)} - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("path", modules(MODEL), ids=show)
def test_model_imports_run_one_way(path: Path) -> None:
    if path.stem == "__init__":
        assert names_in(path) == set(), "importing the package must not import all of it"
        return
    for sibling in siblings_of(path):
        assert sibling.is_file(), f"{show(path)} imports {show(sibling)}, which is not there"
        if room_of(sibling) != room_of(path):
            assert RANKS[room_of(sibling)] < RANKS[room_of(path)], f"{show(path)} must not import {show(sibling)}"
    for name in names_in(path):
        assert not name.startswith("kangaroo_kernels.model"), f"{name}: siblings are imported relatively"
        assert top(name) not in {"model", "bench", "tests", "tools", "pairs"}, name


def test_no_module_of_the_model_imports_itself_by_a_detour() -> None:
    graph = {path: set(siblings_of(path)) for path in modules(MODEL)}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", modules(MODEL), ids=show)
def test_model_uses_few_libraries(path: Path) -> None:
    allowed = LIBRARIES | {"kangaroo_kernels"} | (TERMINAL if room_of(path) in FOR_THE_TERMINAL else set())
    allowed |= OPTIONAL.get(room_of(path), set())
    assert {top(name) for name in names_in(path) if is_library(name)} <= allowed


# ---- the documents


def tree_in_the_document(folder: str) -> list[str]:
    """The modules and folders that docs/architecture.md names in its picture of a folder, in its order."""
    picture = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition(f"\n{folder}/ ")[2]
    lines = itertools.takewhile(lambda line: line.startswith("  "), picture.splitlines()[1:])
    found = [re.match(r"  ((?:[\w/]+(?:\.py|/) ?)*)", line) for line in lines]
    names = " ".join(match.group(1) for match in found if match)
    return [name.removesuffix(".py").removesuffix("/") for name in names.split()]


def test_the_document_has_every_room_of_the_model_in_its_order() -> None:
    named = [name for name in tree_in_the_document("model") if name not in PAIRS]
    assert sorted(named) == sorted(RANKS)
    assert [RANKS[name] for name in named] == sorted(RANKS[name] for name in named)


def test_the_documents_have_every_module_of_the_kernels() -> None:
    entries = {path.stem for path in KERNELS.iterdir() if path.suffix == ".py" or path.is_dir()}
    named = tree_in_the_document("kangaroo_kernels")
    assert set(named) == entries - {"__init__", "__pycache__"}
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    for path in modules(KERNELS / "shared"):
        assert path.stem == "__init__" or f"{path.stem}.py" in text, f"docs/kernels.md does not name {show(path)}"


def test_the_readmes_tree_is_true() -> None:
    """Every folder that git has at the top, and nothing else."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## The tree\n")[2]
    named = set(re.findall(r"^(\w+)/ ", text.partition("```\n")[2].partition("```")[0], re.MULTILINE))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this copy of the project has no git")
    folders = {top(name.replace("/", ".")) for name in listed.stdout.splitlines() if "/" in name and name[0] != "."}
    assert named == folders


# ---- sizes

MOST_LINES = 400
LONGEST_FUNCTION = 80
MOST_PARAMETERS = {"kangaroo_kernels": 10, "model": 8, "tools": 8, "bench": 8}
INTERFACES = {"from_pretrained", "load_pair", *OPERATIONS}
"""What users call by keywords, and the operations themselves."""


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Every function of a module but its kernels, which a grid launches."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel"):
            yield node


HOUSE = [path for folder in MOST_PARAMETERS for path in modules(ROOT / folder)]


@pytest.mark.parametrize("path", HOUSE, ids=show)
def test_files_and_functions_can_be_seen_whole(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    most = MOST_PARAMETERS[show(path).partition("/")[0]]
    for function in functions(path):
        length = function.end_lineno - end_of_docstring(function)
        assert length <= LONGEST_FUNCTION, f"{function.name} has {length} lines below its docstring"
        named = function.args
        count = len([each for each in (*named.posonlyargs, *named.args, *named.kwonlyargs) if each.arg != "self"])
        is_command = any("typer" in ast.unparse(each) for each in ast.walk(named) if isinstance(each, ast.Call))
        if function.name not in INTERFACES and not is_command and path.parent.name != "commands":
            assert count <= most, f"{function.name} has {count} parameters"


def end_of_docstring(function: ast.FunctionDef) -> int:
    """The line before a function's first statement."""
    first = function.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno if is_text else first.lineno - 1


def declared(text: str) -> dict[str, set[SpecifierSet]]:
    """The versions that a list of requirements allows, by package."""
    found: dict[str, set[SpecifierSet]] = {}
    for each in map(Requirement, filter(None, (line.partition("#")[0].strip() for line in text.splitlines()))):
        found.setdefault(each.name, set()).add(each.specifier)
    return found


def requirements(table: str) -> dict[str, set[SpecifierSet]]:
    """A list of requirements in ``pyproject.toml``."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition(f"\n{table} = [\n")[2].partition("\n]")[0]
    return declared("\n".join(re.findall(r'^    "(.+?)"', text, re.MULTILINE)))


def test_libraries_are_declared() -> None:
    """What model/ imports stands in ``pyproject.toml``."""
    names = {top(name) for path in modules(MODEL) + modules(KERNELS) for name in names_in(path) if is_library(name)}
    extras = set().union(*(requirements(name) for name in ("plots", "parquet", "serve")))
    assert extras >= EXTRAS - {"starlette"}
    known = {name.replace("-", "_") for name in requirements("dependencies")} | EXTRAS
    assert names - {"kangaroo_kernels", "pynvml"} <= known  # nvidia-ml-py's own name for itself


def test_what_is_tested_is_within_the_bounds() -> None:
    """Each package has an upper bound, and the version that ``constraints.txt`` pins lies inside."""
    pinned = declared((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    for name, bounds in (requirements("dependencies") | requirements("dev")).items():
        for bound in bounds:
            assert "<" in {each.operator for each in bound}, name
            versions = {each.version for pins in pinned[name] for each in pins}
            assert versions and all(version in bound for version in versions), name


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
assert Kangaroo.__module__ == "kangaroo_kernels.model.kangaroo"
assert Generation.__module__ == "kangaroo_kernels.model.results"
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
