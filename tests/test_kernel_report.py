"""Every kernel, compiled ahead of time at the shapes of real models: no spill, no narrow load, enough bytes under way.

No GPU is needed. The report runs in processes of its own, for here Triton interprets.
"""

import itertools
import re
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton
import typer
from compiling import ROOT, printed_by
from triton import knobs
from typer.testing import CliRunner

from kangaroo_kernels.cards import CARDS

sys.path.insert(0, str(ROOT / "tools"))
occupancy, sass = import_module("occupancy"), import_module("sass")
resident_programs, waves = occupancy.resident_programs, occupancy.waves
report, compare = import_module("kernel_report"), import_module("compare_binaries")

OLDER_TRITON = ROOT / ".venv" / "triton-3.6"
MODELS = ("Vicuna-7B", "Llama-3.1-8B", "Llama-3.2-1B")
ARCHITECTURES = ("sm_80", "sm_90")
PERSISTENT, MERGE = "draft_loop_kernel", "attention_merge_kernel"
STREAMING = {"qkv_rope_kernel", "linear_residual_kernel", "gate_up_kernel", "top1_head_kernel", "sample_head_kernel"}

SOME_ROWS = "sampling draft head, 8192 rows", "sampling draft loop, 8192 rows"
DRAFTING = (
    *("draft step", "sampling draft head", "draft loop", "sampling draft loop", "draft head, trained confidence"),
    *SOME_ROWS,
)
RUNS = {
    "bfloat16": ("--variants", "--rows", "1", "--rows", "16"),
    "float16 and float32": ("--dtype", "float16", "--dtype", "float32"),
    "Triton 3.6": ("--dtype", "bfloat16", "--dtype", "float32", "--rows", "1", "--rows", "16"),
    "Triton 3.6, drafting": tuple(word for step in DRAFTING for word in ("--step", step)),
}
"""What is compiled: every variant in the dtype that matters most, the plain kernels otherwise."""

Row = dict[str, Any]


@pytest.fixture(scope="module", params=RUNS)
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The rows of one run."""
    triton = OLDER_TRITON if request.param.startswith("Triton") else None
    if triton and not triton.is_dir():
        pytest.skip("Triton 3.6 is not there; `make .venv/triton-3.6` fetches it")
    return printed_by("tools/kernel_report.py", "--json", *RUNS[request.param], triton=triton)


# ---- what is wrong with a kernel


def streams(row: Row) -> bool:
    """Whether a kernel streams a weight or the KV cache."""
    return row["tile_bytes"] is not None


def sms_of(row: Row) -> int:
    return {"sm_80": 108, "sm_90": 132}[row["architecture"]]


def has_plenty(row: Row) -> bool:
    """To fill a card with: a text of one split has few bytes, and float32 is bound by its arithmetic."""
    return "short" not in row["step"] and row["dtype"] != "float32"


def narrow_share(loop: Any) -> float:
    """The share of an iteration's bytes in loads under 16 bytes: up to a 16th is a norm's weight or a paged table."""
    counts = [(int(width), count) for kind in ("copies", "loads") for width, count in loop[kind].items()]
    return sum(width * count for width, count in counts if width < 16) / sum(width * count for width, count in counts)


def least_copied(row: Row) -> int:
    """Bytes that a program's threads copy 16 at a time in an iteration."""
    return 16 * 32 * row["num_warps"] * min(loop["copies"].get("16", 0) for loop in row["loops"])


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
    """A few words of stack in attention on sm_80, at the end of a short text."""
    place = (row["kernel"], row["model"], row["architecture"])
    its = place == ("attention_kernel", "Llama-3.1-8B", "sm_80") and "short" in row["step"]
    return its and row["stack_bytes"] <= 16


Faults = dict[str, Callable[[Row], bool]]
FAULTS: Faults = {
    "it spills": lambda row: row["spills"] > 0 and not is_known(row),
    "it has a stack frame": lambda row: row["stack_bytes"] > 0 and not is_known(row),
    "it does not fit on an SM": lambda row: row["resident_programs"] < 1,
    "it waits for programs that are not resident": lambda row: row["kernel"] == PERSISTENT and row["waves"] != 1,
    "it leaves SMs without work": lambda row: row["kernel"] in STREAMING and row["grid"][0] < 0.7 * sms_of(row),
}
STREAMING_FAULTS: Faults = {
    "it loads its weight narrowly": lambda row: max(map(narrow_share, row["loops"])) > 1 / 16,
    "its copies of 16 bytes leave some of a tile out": lambda row: least_copied(row) < row["tile_bytes"],
    "its loop waits for every load": lambda row: any(loop["loads"] for loop in row["loops"]),
    "its pipeline is shorter than it was told": lambda row: sorted(each["depth"] for each in row["loops"]) != told(row),
    "it leaves the tensor cores alone": lambda row: row["dtype"] != "float32" and row["tensor_cores"] is None,
    "it has too few bytes under way": lambda row: has_plenty(row) and row["bytes_in_flight"] < row["bytes_needed"],
}


def faults_of(row: Row) -> set[str]:
    paths = row["kernel"] == "attention_kernel" and "tree" in row["step"]  # its second loop is too short for a pipeline
    faults = FAULTS | (STREAMING_FAULTS if streams(row) and not paths else {})
    return {fault for fault, is_there in faults.items() if is_there(row)}


def name_of(row: Row) -> str:
    facts = ("kernel", "matrix", "step", "model", "architecture", "dtype", "rows")
    return ", ".join(str(row[fact]) for fact in facts)


def test_no_kernel_is_at_fault(rows: list[Row]) -> None:
    assert {name_of(row): faults for row in rows if (faults := faults_of(row))} == {}


# ---- all of them


def test_every_kernel_is_compiled_for_every_model_and_architecture(
    rows: list[Row], request: pytest.FixtureRequest
) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kangaroo_kernels").rglob("*.py"))
    kernels, steps = set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)), {row["step"] for row in rows}
    assert kernels > STREAMING
    if "draft loop" not in steps:
        kernels -= {PERSISTENT}
    if "layer" not in steps:  # drafting alone
        kernels -= {"accept_kernel", "commit_kernel", "filtered_sample_kernel", "look_up_kernel", "weigh_kernel"}
        kernels -= {"group_kernel", "rank_kernel", "grow_kernel", "walk_kernel", "straighten_kernel"}
    places: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        places.setdefault((row["model"], row["architecture"], row["dtype"]), set()).add(row["kernel"])
        assert streams(row) == (row["kernel"] in STREAMING | {"attention_kernel", PERSISTENT}), name_of(row)
    dtypes = {dtype for _, _, dtype in places}
    wanted = dict.fromkeys(itertools.product(MODELS, ARCHITECTURES, dtypes), kernels)
    for model, architecture, dtype in wanted:
        if "layer" not in steps or model == "Vicuna-7B" or dtype == "float32":  # a block has few packed rows
            wanted[model, architecture, dtype] = kernels - {MERGE}
    assert places == wanted
    older = request.node.callspec.params["rows"].startswith("Triton 3.6")
    assert all(row["triton"].startswith("3.6." if older else triton.__version__) for row in rows)


# ---- bytes and launches


def of_step(rows: list[Row], step: str, model: str, architecture: str = "sm_90") -> list[Row]:
    places = [row for row in rows if (row["step"], row["model"], row["architecture"]) == (step, model, architecture)]
    return [row for row in places if (row["rows"], row["dtype"]) == (places[0]["rows"], places[0]["dtype"])]


LAUNCHES = {"layer": 5, "layer, short text": 5, "top-1 head": 2, "sampling head": 2, "filtered head": 3, "accept": 1}
LAUNCHES |= {"prompt lookup": 2, "commit": 1, "draft step": 15, "draft step, short text": 15, "draft loop": 1}
LAUNCHES["draft loop, adapter with an MLP"] = 1


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
def test_launches(rows: list[Row]) -> None:
    for place in itertools.product(MODELS, ARCHITECTURES):
        found = {step: sum(row["launches"] for row in of_step(rows, step, *place)) for step in LAUNCHES}
        assert found == LAUNCHES, place
        many = [row for row in of_step(rows[::-1], "layer", *place) if row["rows"] == 16]
        assert sum(row["launches"] for row in many) == 5 + (place[0] != "Vicuna-7B"), place  # a merge of its own


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
@pytest.mark.parametrize(
    ("model", "full_pass", "draft_step"), [("Vicuna-7B", 13.21e9, 1.21e9), ("Llama-3.1-8B", 15.01e9, 2.01e9)]
)
def test_bytes_are_those_of_the_models(rows: list[Row], model: str, full_pass: float, draft_step: float) -> None:
    """Weights of a plain step, 32 layers, and of a drafting step, exit layer 2, as the project's design counts them.

    (It gives the 8B model's adapter 32 key-value heads; here it has the model's own 8, and 0.05 GB less.)
    """

    def moved(step: str, without: str | None = "kv") -> int:
        its = [row for row in of_step(rows, step, model) if row["bytes_moved"] and row["matrix"] != without]
        return sum(row["launches"] * row["bytes_moved"] for row in its)

    assert moved("draft step", without=None) == moved("draft loop")
    assert 32 * moved("layer") + moved("top-1 head") == pytest.approx(full_pass, rel=0.005)
    assert moved("draft step") == pytest.approx(draft_step, rel=0.005)


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
def test_one_drafting_loop_for_any_exit_layer_and_number_of_drafts(rows: list[Row]) -> None:
    for place in itertools.product(MODELS, ARCHITECTURES):
        (two,), (four,) = (of_step(rows, step, *place) for step in ("draft loop", "draft loop, 4 layers"))
        assert two["binary"] == four["binary"], place
        assert two["bytes_moved"] < four["bytes_moved"]


def test_the_floor_is_bytes_over_bandwidth(rows: list[Row]) -> None:
    bandwidths = {"sm_80": {"A100": 1.7e12}, "sm_90": {"H100": 3.0e12, "H200": 4.3e12}}
    for row in rows:
        assert (row["bytes_moved"] is not None) == streams(row), name_of(row)
        floors = {card: 1e6 * (row["bytes_moved"] or 0) / its for card, its in bandwidths[row["architecture"]].items()}
        assert row["floor_us"] == (pytest.approx(floors, abs=0.01) if streams(row) else {})


# ---- one binary for 1 to 16 rows

A_PROGRAM_A_ROW = dict.fromkeys(("merge_tiles_kernel", "group_kernel", "filtered_sample_kernel", "rank_kernel"), 0)
"""The axis of the grid that counts rows."""


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
        if MERGE in place:  # one row's splits are merged by the last program to arrive
            assert set(by_rows) == {16}, place
            continue
        assert set(by_rows) == {1, 16}, place
        one, sixteen = by_rows[1], by_rows[16]
        assert one["binary"] == sixteen["binary"], place
        axis = A_PROGRAM_A_ROW.get(one["kernel"])
        grid = [16 if axis == each else count for each, count in enumerate(one["grid"])]
        if one["kernel"] == "attention_kernel":
            grid[0] = sixteen["grid"][0]  # blocks of packed rows
            assert 1 <= grid[0] <= 4
        assert sixteen["grid"] == grid, place


# ---- the drafting loop adds in the order of the stages


def sums_of(rows: list[Row]) -> dict[str, set[str]]:
    """How sums lie across the threads, by their place in the source."""
    found: dict[str, set[str]] = {}
    for place, layouts in (each for row in rows for each in row["sums"].items()):
        found.setdefault(place, set()).update(layouts)
    return found


def sums_that_differ(stages: dict[str, set[str]], loop: dict[str, set[str]]) -> set[str]:
    """The modules of those sums in the stage kernels that lie otherwise in the loop, or are not there.

    A stage kernel's sum and the loop's are the same line of the same function, called from the same lines up to the
    stage's kernel, the last.
    """
    differ = set()
    for place, layouts in stages.items():
        inner, _, kernel = place.rpartition(" ")
        in_loop = {layout for other, lying in loop.items() if other.startswith(f"{inner} ") for layout in lying}
        if in_loop != layouts:
            differ.add(kernel.partition(":")[0])
    return differ


@pytest.mark.parametrize("rows", ["bfloat16", "Triton 3.6, drafting"], indirect=True)
@pytest.mark.parametrize(
    ("stages", "loop", "count"),
    [("draft step", "draft loop", 15), ("sampling draft head", "sampling draft loop", 5), (*SOME_ROWS, 5)],
)
def test_the_drafting_loop_adds_as_its_stages_do(rows: list[Row], stages: str, loop: str, count: int) -> None:
    """All but the order of a sum is theirs by construction; that follows from how the compiler lays tiles out."""
    for place in itertools.product(MODELS, ARCHITECTURES):
        by_stages, by_loop = (sums_of(of_step(rows, step, *place)) for step in (stages, loop))
        assert (len(by_stages), len(by_loop)) == (count, 15), place
        assert sums_that_differ(by_stages, by_loop) == set(), place


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("text", ["", ", short text"])
def test_rows_of_a_tree_add_as_those_of_a_chain(rows: list[Row], text: str) -> None:
    """Attention's sums and products lie alike in both, so that a row of a tree has the bits of a chain's."""

    def lying(step: str, *place: str) -> dict[str, set[str]]:
        its = [row for row in of_step(rows, step + text, *place) if row["kernel"] == "attention_kernel"]
        found: dict[str, set[str]] = {}
        for line, layouts in sums_of(its).items():
            found.setdefault(line.partition(" ")[0], set()).update(layouts)
        return found

    for place in itertools.product(MODELS, ARCHITECTURES):
        chain = lying("layer", *place)
        assert len(chain) == 3, place  # two products and the sum of the weights
        assert lying("tree, its rows", *place) == chain, place


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
def test_another_number_of_warps_is_found(rows: list[Row], bad: Any) -> None:
    for architecture in ARCHITECTURES:
        loop = sums_of(of_step(rows, "draft loop", "Llama-3.2-1B", architecture))
        streaming = {"qkv_rope.py", "attention.py", "linear_residual.py", "gate_up.py", "top1_head.py"}
        assert sums_that_differ(sums_of(bad["eight warps"][architecture]), loop) >= streaming


# ---- the checks bite


BAD = """
import json

import torch
from compiled import compile_only
from kernel_report import rows_of
from kernel_calls import META, STEPS, Call, Step
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kangaroo_kernels import launch_config
from kangaroo_kernels.launch_config import configured_by
from kangaroo_kernels.workloads import MODELS, ModelShape, Settings

vicuna, _, smallest = MODELS
settings = Settings(8, 4096, torch.bfloat16, META)

def project(columns, row_stride):
    def calls(shape, settings):
        x = torch.empty(settings.rows, 4096, dtype=settings.dtype, device=META)
        weight = torch.empty(columns, row_stride, dtype=settings.dtype, device=META)[:, :4096]
        yield Call("linear_residual", "output", (x, weight, x[:, :columns]), {}, weight.nbytes)
    return [Step("a bad step", calls)]

def rows(architecture, steps, shape, settings, **changed):
    with compile_only(architecture) as launches:
        shipped = launch_config._pickers[-1]
        with configured_by(lambda *place: shipped(*place)._replace(**changed)):
            return [row for step in steps for row in rows_of(step, shape, settings, launches)]

before, whole = (JITFunction.run, driver._active), project(4096, 4096)
found = {
    "as shipped": rows(80, whole, vicuna, settings),
    "few registers": rows(80, whole, vicuna, settings, num_warps=1, num_stages=2, block_n=128),
    "odd rows": rows(80, project(4096, 4097), vicuna, settings),
    "no stages": rows(80, whole, vicuna, settings, num_stages=1),
    "many stages": rows(80, whole, vicuna, settings, num_stages=20),
    "few programs": rows(80, project(512, 4096), vicuna, settings),
}
ones, one = ModelShape("ones", 1, 1, 1, 1, 2, 1, 1), Settings(1, 1, torch.float32, META)
found["ones"] = rows(90, [step for step in STEPS if not step.variant], ones, one)
drafting = ([step for step in STEPS if step.name == "draft step"], smallest, settings._replace(rows=1))
found["eight warps"] = {f"sm_{each}": rows(each, *drafting, num_warps=8) for each in (80, 90)}
found["as it was"] = (JITFunction.run, driver._active) == before and not launch_config._pickers
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def bad() -> Any:
    """``linear_residual`` as it ships, and badly launched, on sm_80."""
    return printed_by("-c", BAD)


BITES = {
    "few registers": {"it spills", "it has a stack frame"},
    "odd rows": {"it loads its weight narrowly", "its loop waits for every load"},
    "no stages": {"its loop waits for every load", "its pipeline is shorter than it was told"},
    "many stages": {"it does not fit on an SM"},
    "few programs": {"it has too few bytes under way", "it leaves SMs without work"},
}


def test_a_bad_kernel_is_found(bad: Any) -> None:
    found = {case: faults_of(*bad[case]) for case in ("as shipped", *BITES)}
    assert found.pop("as shipped") == set()
    assert {case: faults & BITES[case] for case, faults in found.items()} == BITES


def test_sizes_of_one_compile(bad: Any) -> None:
    """Triton gives a kernel a size of 1 as a number, which has no methods; the interpreter does not."""
    assert {row["kernel"] for row in bad["ones"]} > STREAMING


def test_compiling_leaves_triton_as_it_was(bad: Any) -> None:
    assert bad["as it was"]


# ---- the machine code of two commits


def test_two_commits_are_compared_by_their_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another name, and lines that are moved, do not count; that ``commit`` writes another position does."""
    for folder in ("kangaroo_kernels", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for module, here, there in (("accept", "agrees", "is_alike"), ("commit", "reached - 2", "reached - 3")):
        file = tmp_path / f"kangaroo_kernels/{module}.py"
        text = file.read_text(encoding="utf-8")
        assert here in text
        file.write_text(text.replace(here, there).replace("import triton\n", "import triton\n# more\n"), "utf-8")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    app = typer.Typer()
    app.command()(compare.main)
    refused = CliRunner().invoke(app, "no-such-commit")
    said = "compare_binaries: no-such-commit is no commit that has kangaroo_kernels/ and tools/.\n"
    assert (refused.exit_code, refused.stderr) == (2, said)
    monkeypatch.setattr(compare, "export", lambda commit, folder: shutil.copytree(tmp_path, folder, dirs_exist_ok=True))
    done = CliRunner().invoke(app, "another --step accept --step commit --model 1B --arch 90")
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
    assert code[:5] == (40, 16, 1024, 2, "HMMA")
    assert code.loops == (({16: 1, 4: 1}, {2: 1}, depth, 8, 1),)
    assert sass.read_machine_code(listing.replace("LDGSTS", "LDS")).loops == (({}, {16: 1}, 0, 2, 0),)


@pytest.mark.parametrize("text", ["", CODE.replace("REG", ""), CODE.replace(";", "")])
def test_refuses_what_is_no_listing_of_a_kernel(text: str) -> None:
    with pytest.raises(ValueError, match="give it one kernel's"):
        sass.read_machine_code(text)


# ---- filling a card


A100, _, H200 = CARDS


def launch_of(programs: int = 10**6, registers: int = 32, shared: int = 0, threads: int = 128) -> SimpleNamespace:
    code = SimpleNamespace(registers=registers, static_shared=0)
    return SimpleNamespace(programs=programs, threads=threads, dynamic_shared=shared, code=code)


def test_resident_programs() -> None:
    assert resident_programs(A100, launch_of()) == 16  # 2048 threads
    assert resident_programs(A100, launch_of(threads=32)) == 32  # programs
    assert resident_programs(A100, launch_of(registers=128)) == 4  # 65536 registers
    assert resident_programs(A100, launch_of(registers=170)) == 2  # given out by eights
    assert resident_programs(A100, launch_of(shared=40 << 10)) == 4  # 164 KB, one of each program's is the system's
    assert resident_programs(H200, launch_of(shared=75 << 10)) == 3  # 228 KB
    assert resident_programs(A100, launch_of(shared=200 << 10)) == 0
    assert resident_programs(A100, launch_of(216)) == 2  # there are no more
    assert resident_programs(H200, launch_of(96)) == 1


def test_waves_and_bytes_under_way() -> None:
    """An H200 needs about 32 KB an SM."""
    assert waves(A100, launch_of(324, registers=255)) == 1.5  # two at once
    assert waves(H200, launch_of(66)) == occupancy.programs_under_way(H200, launch_of(66)) == 0.5
    assert H200.bytes_needed == pytest.approx(32 << 10, rel=0.01)


# ---- the table


def test_the_table_shows_what_is_known(bad: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*bad["as shipped"], *bad["few registers"]]
    report.show(rows)
    title, _, step, *lines = capsys.readouterr().out.splitlines()[1:]
    assert title.startswith("Vicuna-7B, sm_80, bfloat16, Triton ")
    assert step == "a bad step, M = 8, launches: 2"
    for row, line in zip(rows, lines, strict=True):
        figures = [str(row["registers"]), f"{row['spills']}+{row['stack_bytes']}", f"{row['waves']:.2f}", "33.6"]
        figures += [f"{row['shared_bytes'] / 1024:.1f}", f"{row['bytes_in_flight'] / 1024:.1f}/15"]
        figures += [f"{row['floor_us']['A100']:.1f}", f"{row['loops'][0]['copies']['16']}x16"]
        assert all(figure in line.split() for figure in figures), line
