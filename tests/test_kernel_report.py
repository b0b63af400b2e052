"""Every kernel, compiled ahead of time at the shapes of real models: no spill, no narrow load, enough bytes under way.

No GPU is needed. The report runs in processes of its own, for here Triton interprets.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton
import typer
from triton import knobs
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
cards, sass = import_module("cards"), import_module("sass")
report, compare = import_module("kernel_report"), import_module("compare_binaries")

OLDER_TRITON = ROOT / ".venv" / "triton-3.6"
MODELS = ("Vicuna-7B", "Llama-3.1-8B", "Llama-3.2-1B")
ARCHITECTURES = ("sm_80", "sm_90")
PERSISTENT = "draft_loop_kernel"
STREAMING = {"qkv_rope_kernel", "linear_residual_kernel", "gate_up_kernel", "top1_head_kernel", "sample_head_kernel"}

RUNS = {
    "bfloat16": ("--variants", "--rows", "1", "--rows", "16"),
    "float16 and float32": ("--dtype", "float16", "--dtype", "float32"),
    "Triton 3.6": ("--dtype", "bfloat16", "--dtype", "float32", "--rows", "1", "--rows", "16"),
    "Triton 3.6, the drafting loop": ("--step", "draft loop", "--step", "sampling draft loop"),
}
"""What is compiled: every variant in the dtype that matters most, the plain kernels otherwise."""

STACK_BYTES = 16
"""The most of a stack where one is known: a few words, off the streaming loops."""

Row = dict[str, Any]


def start(*command: str, triton: Path | None = None) -> subprocess.Popen[str]:
    """A Python of its own that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(path) for path in (triton, TOOLS) if path is not None]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def results() -> Iterator[Callable[[str], Any]]:
    """What each of the runs, ``SUMS`` and ``BAD`` printed; they all go on side by side."""
    started = {"bad": start("-c", BAD), "sums": start("-c", SUMS, "--warps")}
    if OLDER_TRITON.is_dir():
        started["sums under Triton 3.6"] = start("-c", SUMS, triton=OLDER_TRITON)
    for name, options in RUNS.items():
        triton = OLDER_TRITON if name.startswith("Triton") else None
        if triton is None or triton.is_dir():
            started[name] = start("tools/kernel_report.py", "--json", *options, triton=triton)

    @functools.cache
    def result(name: str) -> Any:
        if name not in started:
            pytest.skip("Triton 3.6 is not there; `make .venv/triton-3.6` fetches it")
        out, err = started[name].communicate()
        assert started[name].returncode == 0, err
        return json.loads(out)

    yield result
    for process in started.values():
        process.kill()
        with process:  # closes its pipes and waits
            pass


@pytest.fixture(scope="module", params=RUNS)
def rows(request: pytest.FixtureRequest, results: Callable[[str], Any]) -> list[Row]:
    """The rows of one run."""
    return results(request.param)


# ---- what is wrong with a kernel


def streams(row: Row) -> bool:
    """Whether a kernel streams a weight or the KV cache."""
    return row["tile_bytes"] is not None


def fills_a_card(row: Row) -> bool:
    """Whether it has the bytes to: a text of one split has few, and float32 is bound by its arithmetic."""
    return streams(row) and "short" not in row["step"] and row["dtype"] != "float32"


def depths(row: Row) -> list[float]:
    """Tiles under way in each loop that streams."""
    return sorted(loop["depth"] for loop in row["loops"])


def told(row: Row) -> list[float]:
    """The depths that the number of stages asks for.

    The persistent kernel has four loops over weights (qkv, both linear, gate and up, head) and one over the cache with
    a tile less in it. Attention has one of its own depth. All have at least a tile.
    """
    stages = max(1, row["num_stages"] - 1)
    if row["kernel"] == "attention_kernel":
        return [max(1, row["loops"][0]["depth"])]
    return [1, *[stages] * 4] if row["kernel"] == PERSISTENT else [stages]


def is_known(row: Row) -> bool:
    """The end of a short text's attention on sm_80."""
    place = (row["kernel"], row["model"], row["architecture"])
    short = place == ("attention_kernel", "Llama-3.1-8B", "sm_80") and "short" in row["step"]
    return short and row["stack_bytes"] <= STACK_BYTES


FAULTS: dict[str, Callable[[Row], bool]] = {
    "it spills": lambda row: row["spills"] > 0 and not is_known(row),
    "it has a stack frame": lambda row: row["stack_bytes"] > 0 and not is_known(row),
    "it does not fit on an SM": lambda row: row["resident_programs"] < 1,
    "it loads its weight narrowly": lambda row: streams(row) and row["weight_load_bytes"] < 16,
    "its loop waits for every load": lambda row: streams(row) and any(loop["loads"] for loop in row["loops"]),
    "its pipeline is shorter than it was told": lambda row: streams(row) and depths(row) != told(row),
    "it leaves the tensor cores alone": lambda row: (
        streams(row) and row["dtype"] != "float32" and row["tensor_cores"] is None
    ),
    "it has too few bytes under way": lambda row: fills_a_card(row) and row["bytes_in_flight"] < row["bytes_needed"],
}


def name_of(row: Row) -> str:
    facts = ("kernel", "matrix", "step", "model", "architecture", "dtype", "rows")
    return ", ".join(str(row[fact]) for fact in facts)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_kernel_is_at_fault(rows: list[Row], fault: str) -> None:
    assert [name_of(row) for row in rows if FAULTS[fault](row)] == []


# ---- all of them


def kernels_in_source() -> set[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kangaroo_kernels").rglob("*.py"))
    return set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))


def test_every_kernel_is_compiled_for_every_model_and_architecture(rows: list[Row]) -> None:
    assert kernels_in_source() > STREAMING
    for dtype in {row["dtype"] for row in rows}:
        for model in MODELS:
            for architecture in ARCHITECTURES:
                place = (model, architecture, dtype)
                found = {row["kernel"] for row in rows if (row["model"], row["architecture"], row["dtype"]) == place}
                steps = {row["step"] for row in rows}
                kernels = kernels_in_source() if "layer" in steps else {PERSISTENT}
                assert found == kernels - ({PERSISTENT} if "draft loop" not in steps else set()), place


def test_each_triton_is_the_one_asked_for(rows: list[Row], request: pytest.FixtureRequest) -> None:
    older = request.node.callspec.params["rows"].startswith("Triton 3.6")
    found = {row["triton"] for row in rows}
    assert all(name.startswith("3.6.") for name in found) if older else found == {triton.__version__}


def test_every_weight_comes_asynchronously(rows: list[Row]) -> None:
    """In copies of 16 bytes a thread that bring the whole tile."""
    for row in rows:
        assert streams(row) == (row["kernel"] in STREAMING | {"attention_kernel", PERSISTENT}), name_of(row)
        if streams(row):
            copied = min(16 * loop["copies"].get("16", 0) for loop in row["loops"])
            assert 32 * row["num_warps"] * copied >= row["tile_bytes"], name_of(row)


def test_most_sms_have_work(rows: list[Row]) -> None:
    """Where there is a weight to stream; at least so many programs as 70 % of the SMs."""
    for row in rows:
        sms = {"sm_80": 108, "sm_90": 132}[row["architecture"]]
        if row["kernel"] in STREAMING:
            assert row["grid"][0] >= 0.7 * sms, name_of(row)
            assert row["waves"] == pytest.approx(row["grid"][0] / (sms * row["resident_programs"]), abs=1e-3)
        if row["kernel"] == PERSISTENT:  # every program is resident, or a barrier would never end
            assert row["waves"] == 1, name_of(row)


# ---- bytes and launches


def of_step(rows: list[Row], step: str, model: str, architecture: str = "sm_90") -> list[Row]:
    places = [row for row in rows if (row["step"], row["model"], row["architecture"]) == (step, model, architecture)]
    return [row for row in places if (row["rows"], row["dtype"]) == (places[0]["rows"], places[0]["dtype"])]


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("step", "launches"),
    [
        ("layer", 6),
        ("layer, short text", 5),
        ("top-1 head", 2),
        ("sampling head", 2),
        ("filtered head", 2),
        ("accept", 1),
        ("commit", 1),
        ("draft step", 18),
        ("draft step, short text", 15),
        ("draft loop", 1),
    ],
)
def test_launches(rows: list[Row], step: str, launches: int, model: str, architecture: str) -> None:
    assert sum(row["launches"] for row in of_step(rows, step, model, architecture)) == launches


def kv_bytes(rows: list[Row], model: str) -> int:
    """What a block of a drafting step reads of the cache."""
    (row,) = (row for row in of_step(rows, "draft step", model) if row["kernel"] == "attention_kernel")
    return row["bytes_moved"]


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
@pytest.mark.parametrize(
    ("model", "layers", "full_pass", "draft_step"),
    [("Vicuna-7B", 32, 13.21e9, 1.21e9), ("Llama-3.1-8B", 32, 15.01e9, 2.01e9)],
)
def test_bytes_are_those_of_the_models(
    rows: list[Row], model: str, layers: int, full_pass: float, draft_step: float
) -> None:
    """Weights of a plain step and of a drafting step, exit layer 2, as the project's design counts them.

    (It gives the 8B model's adapter 32 key-value heads; here it has the model's own 8, and 0.05 GB less.)
    """

    def weights(step: str) -> int:
        its = [row for row in of_step(rows, step, model) if row["bytes_moved"] and row["matrix"] != "kv"]
        return sum(row["launches"] * row["bytes_moved"] for row in its)

    assert weights("draft step") == weights("draft loop") - 3 * kv_bytes(rows, model)
    assert layers * weights("layer") + weights("top-1 head") == pytest.approx(full_pass, rel=0.005)
    assert weights("draft step") == pytest.approx(draft_step, rel=0.005)


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
def test_one_drafting_loop_for_any_exit_layer_and_number_of_drafts(rows: list[Row]) -> None:
    for model in MODELS:
        for architecture in ARCHITECTURES:
            (two,), (four,) = (
                of_step(rows, step, model, architecture) for step in ("draft loop", "draft loop, 4 layers")
            )
            assert two["binary"] == four["binary"], (model, architecture)
            assert two["bytes_moved"] < four["bytes_moved"]


def test_the_floor_is_bytes_over_bandwidth(rows: list[Row]) -> None:
    bandwidth = {"A100": 1.7e12, "H100": 3.0e12, "H200": 4.3e12}
    cards = {"sm_80": {"A100"}, "sm_90": {"H100", "H200"}}
    for row in rows:
        assert (row["bytes_moved"] is not None) == streams(row), name_of(row)
        assert set(row["floor_us"]) == (cards[row["architecture"]] if streams(row) else set())
        for card, microseconds in row["floor_us"].items():
            assert microseconds == pytest.approx(1e6 * row["bytes_moved"] / bandwidth[card], abs=0.01)


# ---- one binary for 1 to 16 rows


@pytest.mark.parametrize("rows", ["bfloat16", "Triton 3.6"], indirect=True)
def test_one_binary_for_any_number_of_rows(rows: list[Row]) -> None:
    """The same machine code, the same programs: what makes a row's bits independent of its neighbours."""
    facts = ("step", "kernel", "matrix", "model", "architecture", "dtype")
    pairs: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        if "draft" not in row["step"]:
            pairs.setdefault(tuple(row[fact] for fact in facts), {})[row["rows"]] = row
    assert pairs
    for place, by_rows in pairs.items():
        assert set(by_rows) == {1, 16}, place
        one, sixteen = by_rows[1], by_rows[16]
        assert one["binary"] == sixteen["binary"], place
        grid = [1, 1, 1] if one["kernel"] == "accept_kernel" else list(one["grid"])
        if one["kernel"] in {"merge_tiles_kernel", "filtered_sample_kernel"}:
            grid[0] = 16  # a program a row
        elif one["kernel"] == "attention_reduce_kernel":
            grid[1] = 16
        elif one["kernel"] == "attention_kernel":
            grid[0] = sixteen["grid"][0]  # blocks of packed rows
            assert 1 <= grid[0] <= 4
        assert sixteen["grid"] == grid, place


# ---- the drafting loop adds in the order of the stages


SUMS = """
import json
import sys

import torch
from compiled import compile_only, layouts_of_sums
from steps import META, STEPS

from kangaroo_kernels import launch_config
from kangaroo_kernels.launch_config import configured_by
from kangaroo_kernels.workloads import MODELS, Settings

settings = Settings(1, 4096, torch.bfloat16, META)
names = ("draft step", "draft loop", "sampling draft head", "sampling draft loop")

def sums_of(shape, name, launches):
    found = {}
    for step in STEPS:
        for each in step.calls(shape, settings) if step.name == name else ():
            before = len(launches)
            each.launch()
            for launch in launches[before:]:
                for place, layouts in layouts_of_sums(launch.ttgir).items():
                    found.setdefault(" ".join(place), []).extend(layouts)
    return found

found = {}
for architecture in (80, 90):
    with compile_only(architecture) as launches:
        for shape in MODELS:
            found[f"{shape.name} sm_{architecture}"] = {name: sums_of(shape, name, launches) for name in names}
        if "--warps" in sys.argv:
            shipped = launch_config._pickers[-1]
            with configured_by(lambda *place: shipped(*place)._replace(num_warps=8)):
                found[f"{shape.name} sm_{architecture}"]["eight warps"] = sums_of(shape, "draft step", launches)
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["sums", "sums under Triton 3.6"])
def sums(request: pytest.FixtureRequest, results: Callable[[str], Any]) -> Any:
    """How the sums of a drafting step and loop lie across threads, by place in the source, for each model."""
    return results(request.param)


def sums_that_differ(stages: dict[str, list[str]], loop: dict[str, list[str]]) -> set[str]:
    """The modules of those sums in the stage kernels that lie otherwise in the loop, or are not there.

    A stage kernel's sum and the loop's are the same line of the same function, called from the same lines up to the
    stage's kernel, the last.
    """
    differ = set()
    for place, layouts in stages.items():
        inner, _, kernel = place.rpartition(" ")
        in_loop = {layout for other, lying in loop.items() if other.startswith(f"{inner} ") for layout in lying}
        if in_loop != set(layouts):
            differ.add(kernel.partition(":")[0])
    return differ


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("stages", "loop", "count"),
    [("draft step", "draft loop", 17), ("sampling draft head", "sampling draft loop", 5)],
)
def test_the_drafting_loop_adds_as_its_stages_do(
    sums: Any, stages: str, loop: str, count: int, model: str, architecture: str
) -> None:
    """All but the order of a sum is theirs by construction; that follows from how the compiler lays tiles out."""
    found = sums[f"{model} {architecture}"]
    assert len(found[stages]) == count
    assert len(found[loop]) == 17
    assert sums_that_differ(found[stages], found[loop]) == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_number_of_warps_is_found(results: Callable[[str], Any], architecture: str) -> None:
    found = results("sums")[f"Llama-3.2-1B {architecture}"]
    streaming = {"qkv_rope.py", "attention.py", "linear_residual.py", "gate_up.py", "top1_head.py"}
    assert sums_that_differ(found["eight warps"], found["draft loop"]) >= streaming


# ---- the checks bite


BAD = """
import json

import torch
from compiled import compile_only
from kernel_report import rows_of
from steps import META, STEPS, Call, Step
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kangaroo_kernels import launch_config, linear_residual
from kangaroo_kernels.launch_config import LaunchConfig, configured_by
from kangaroo_kernels.workloads import MODELS, ModelShape, Settings

shape, settings = MODELS[0], Settings(8, 4096, torch.bfloat16, META)

def project(columns, row_stride):
    def calls(shape, settings):
        x = torch.empty(settings.rows, 4096, dtype=settings.dtype, device=META)
        weight = torch.empty(columns, row_stride, dtype=settings.dtype, device=META)[:, :4096]
        yield Call("linear_residual", "output", (x, weight, x[:, :columns]), {}, weight.nbytes)
    return Step("a bad step", calls)

whole = project(4096, 4096)
cases = {
    "as shipped": (whole, None),
    "few registers": (whole, LaunchConfig(1, 2, 128)),
    "odd rows": (project(4096, 4097), None),
    "no stages": (whole, LaunchConfig(4, 1, 32)),
    "many stages": (whole, LaunchConfig(4, 20, 32)),
    "few programs": (project(512, 4096), LaunchConfig(4, 4, 32)),
}
before = JITFunction.run, driver._active
found = {}
for name, (step, config) in cases.items():
    with compile_only(80) as launches:
        shipped = launch_config._pickers[-1]
        with configured_by(shipped if config is None else lambda *_: config):
            found[name] = rows_of(step, shape, settings, launches)
ones, one = ModelShape("ones", 1, 1, 1, 1, 2, 1, 1), Settings(1, 1, torch.float32, META)
with compile_only(90) as launches:
    rows = [row for step in STEPS if not step.variant for row in rows_of(step, ones, one, launches)]
found["ones"] = sorted({row["kernel"] for row in rows})
cached = [device for device in linear_residual.linear_residual_kernel.device_caches if "compile" in str(device)]
left = [(JITFunction.run, driver._active) != before, launch_config._pickers, cached]
print(json.dumps({"found": found, "left": [str(each) for each in left if each]}))
"""


@pytest.fixture(scope="module")
def bad(results: Callable[[str], Any]) -> Any:
    """``linear_residual`` as it ships, and badly launched, on sm_80."""
    return results("bad")


@pytest.mark.parametrize(
    ("case", "faults"),
    [
        ("as shipped", set()),
        ("few registers", {"it spills", "it has a stack frame"}),
        ("odd rows", {"it loads its weight narrowly", "its loop waits for every load"}),
        ("no stages", {"its loop waits for every load", "its pipeline is shorter than it was told"}),
        ("many stages", {"it does not fit on an SM"}),
        ("few programs", {"it has too few bytes under way"}),
    ],
)
def test_a_bad_kernel_is_found(bad: Any, case: str, faults: set[str]) -> None:
    (row,) = bad["found"][case]
    found = {fault for fault, is_there in FAULTS.items() if is_there(row)}
    assert faults <= found
    assert bool(found) == bool(faults)


def test_sizes_of_one_compile(bad: Any) -> None:
    """Triton gives a kernel a size of 1 as a number, which has no methods; the interpreter does not."""
    assert {*bad["found"]["ones"]} > STREAMING


def test_compiling_leaves_triton_as_it_was(bad: Any) -> None:
    assert bad["left"] == []


# ---- the machine code of two commits


def test_two_commits_are_compared_by_their_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines and names are moved in ``accept``, which does not count; ``commit`` writes another position, which does."""
    for folder in ("kangaroo_kernels", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    accept, commit = (tmp_path / f"kangaroo_kernels/{name}.py" for name in ("accept", "commit"))
    moved = re.sub(r"\bagrees\b", "is_alike", accept.read_text(encoding="utf-8"))
    accept.write_text(moved.replace("import triton\n", "import triton\n# a line more\n"), encoding="utf-8")
    text = commit.read_text(encoding="utf-8")
    assert text.count("reached - 2") == 1
    commit.write_text(text.replace("reached - 2", "reached - 3"), encoding="utf-8")
    monkeypatch.setattr(compare, "export", lambda commit, folder: shutil.copytree(tmp_path, folder, dirs_exist_ok=True))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    only = ("--step", "accept", "--step", "commit", "--model", "1B", "--arch", "90")
    done = invoke(compare, "another", *only)
    assert done.exit_code == 1, done.output
    case = "Llama-3.2-1B, sm_90, bfloat16, "
    assert done.stdout.splitlines() == [
        f"{case}accept: accept, accept_kernel: identical",
        f"{case}commit: commit, commit_kernel: different",
        f"Triton {triton.__version__}: 2 cases, 1 identical, 1 not",
    ]


# ---- reading machine code


CODE = """
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
    /*0000*/ @P0 LDG.E R2, desc[UR4][R2.64] ;
    /*0010*/ LDG.E.U8 R1, [R2.64] ;
    /*0020*/ LDG.E.128 R4, [R2.64] ;
    /*0030*/ @P0 BRA 0x20 ;
    /*0040*/ @P1 BRA 0x10 ;
    /*0050*/ DEPBAR.LE SB0, LEFT ;                             /* 0x00000a00ff017b82 */
                                                              /* 0x000e300000000800 */
    /*0060*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
    /*0070*/ @P1 LDGSTS.E.BYPASS.LTC128B.128 [R39], desc[UR8][R12.64], P5 ;
    /*0080*/ LDGDEPBAR ;
    /*0090*/ @P1 LDGSTS.E [R39], desc[UR8][R12.64], P5 ;
    /*00a0*/ LDGDEPBAR ;
    /*00b0*/ LDG.E.U16.CONSTANT R2, desc[UR4][R2.64] ;
    /*00c0*/ @!P4 BRA 0x50 ;
    /*00d0*/ DEPBAR.LE SB0, 0x0 ;
    /*00e0*/ STL.64 [R1+0x8], R2 ;
    /*00f0*/ @P0 LDL R2, [R1] ;
    /*0100*/ EXIT ;
    /*0110*/ BRA 0x110 ;
"""
"""As ``cuobjdump`` prints it: a loop in a loop, one that copies in two groups, spills."""


@pytest.mark.parametrize(("left", "depth"), [("0x0", 1), ("0x2", 2), ("0x6", 4)])
def test_machine_code_is_read(left: str, depth: int) -> None:
    """Two groups an iteration: six left under way are three tiles, and the one waited for is the fourth."""
    listing = CODE.replace("LEFT", left)
    code = sass.read_machine_code(listing)
    assert code[:6] == (40, 16, 1024, 1, 1, "HMMA")
    assert code.loops == (({16: 1, 4: 1}, {2: 1}, depth),)
    assert sass.read_machine_code(listing.replace("LDGSTS", "LDS")).loops == (({}, {16: 1}, 0),)


@pytest.mark.parametrize("text", ["", CODE.replace("REG", ""), CODE.replace(";", "")])
def test_refuses_what_is_no_listing_of_a_kernel(text: str) -> None:
    with pytest.raises(ValueError, match="give it one kernel's"):
        sass.read_machine_code(text)


# ---- filling a card


def launch_of(programs: int, registers: int = 32, shared: int = 0, threads: int = 128) -> SimpleNamespace:
    code = SimpleNamespace(registers=registers, static_shared=0)
    return SimpleNamespace(programs=programs, threads=threads, dynamic_shared=shared, code=code)


CARDS = {card.name: card for card in cards.CARDS}


@pytest.mark.parametrize(
    ("card", "launch", "resident"),
    [
        ("A100", launch_of(10**6), 16),  # 2048 threads
        ("A100", launch_of(10**6, threads=32), 32),  # programs
        ("A100", launch_of(10**6, registers=128), 4),  # 65536 registers
        ("A100", launch_of(10**6, registers=129), 3),  # given out by eights
        ("A100", launch_of(10**6, shared=40 << 10), 4),  # 164 KB, one of each program's is the system's
        ("H200", launch_of(10**6, shared=75 << 10), 3),  # 228 KB
        ("A100", launch_of(10**6, shared=200 << 10), 0),
        ("A100", launch_of(216), 2),  # there are no more
        ("H200", launch_of(96), 1),
    ],
)
def test_resident_programs(card: str, launch: SimpleNamespace, resident: int) -> None:
    assert CARDS[card].resident_programs(launch) == resident


def test_waves() -> None:
    assert CARDS["A100"].waves(launch_of(324, registers=255)) == 1.5  # two at once
    assert CARDS["H200"].waves(launch_of(66)) == 0.5
    assert CARDS["H200"].programs_under_way(launch_of(66)) == 0.5


def test_an_h200_needs_about_32_kilobytes_an_sm() -> None:
    assert CARDS["H200"].bytes_needed == pytest.approx(32 << 10, rel=0.01)


# ---- the command


def invoke(module: Any, *options: str) -> Any:
    """What came of a command line."""
    app = typer.Typer(add_completion=False)
    app.command()(module.main)
    return CliRunner().invoke(app, options)


@pytest.mark.parametrize("module", [report, compare])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--model gpt", "no model is called gpt; there are Vicuna-7B, Llama-3.1-8B, Llama-3.2-1B."),
        ("--arch 75", "--arch is 75; it must be one of 80, 90."),
        ("--dtype int8", "--dtype is int8; it must be one of bfloat16, float16, float32."),
        ("--step dinner", "--step is dinner; it must be one of {steps}."),
        ("--rows 0", "rows are 0; they must be 1 to 16."),
        ("--rows 4 --rows 17", "rows are 4, 17; they must be 1 to 16."),
        ("--length 7", "the length is 7; it must hold the rows, 8."),
        ("", "TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it."),
    ],
)
def test_a_wrong_option_is_one_sentence(
    module: Any, options: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    given = options.split()
    if module is compare:
        if given[:1] in (["--rows"], ["--length"]):
            pytest.skip("it has no such option")
        given.insert(0, "HEAD")
    sentence = sentence.replace("{steps}", ", ".join(step.name for step in report.STEPS))
    result = invoke(module, *given)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"{module.NAME}: {sentence}\n")


def test_a_commit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    result = invoke(compare, "no-such-commit")
    assert result.exit_code == 2
    assert result.stderr == "compare_binaries: no-such-commit is no commit that has kangaroo_kernels/ and tools/.\n"


def test_the_table_loses_nothing(bad: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = [*bad["found"]["as shipped"], *bad["found"]["few registers"]]
    report.show(rows)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "Vicuna-7B, sm_80, bfloat16, Triton" in shown
    assert "a bad step, 2 launches" in shown
    lines = [line for line in shown.splitlines() if "1 x linear_residual" in line]
    for row, line in zip(rows, lines, strict=True):
        figures = [str(row["registers"]), f"{row['spills']}, {row['stack_bytes']}", "33.6", "HMMA"]
        figures += [f"{row['shared_bytes'] / 1024:.1f}", f"{row['waves']:.2f}", f"{row['bytes_in_flight'] / 1024:.1f}"]
        figures.append(f"{row['floor_us']['A100']:.1f}")
        assert all(figure in line for figure in figures), line
