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
from collections.abc import Callable
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

DRAFTING = ("draft step", "sampling draft head", "draft loop", "sampling draft loop")
RUNS = {
    "bfloat16": ("--variants", "--rows", "1", "--rows", "16"),
    "float16 and float32": ("--dtype", "float16", "--dtype", "float32"),
    "Triton 3.6": ("--dtype", "bfloat16", "--dtype", "float32", "--rows", "1", "--rows", "16"),
    "Triton 3.6, drafting": tuple(word for step in DRAFTING for word in ("--step", step)),
}
"""What is compiled: every variant in the dtype that matters most, the plain kernels otherwise."""

STACK_BYTES = 16
"""The most of a stack where one is known: a few words, off the streaming loops."""

Row = dict[str, Any]


@functools.cache
def run(*command: str, triton: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python of its own that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in (triton, TOOLS) if path is not None)
    line = [sys.executable, *command]
    return subprocess.run(line, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)


def printed_by(*command: str, triton: Path | None = None) -> Any:
    done = run(*command, triton=triton)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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


def fills_a_card(row: Row) -> bool:
    """Whether it has the bytes to: a text of one split has few, and float32 is bound by its arithmetic."""
    return streams(row) and "short" not in row["step"] and row["dtype"] != "float32"


def narrow_share(loop: Any) -> float:
    """The share of an iteration's bytes in loads under 16 bytes: up to a 16th is a norm's weight or a paged table."""
    counts = [(int(width), count) for kind in ("copies", "loads") for width, count in loop[kind].items()]
    return sum(width * count for width, count in counts if width < 16) / sum(width * count for width, count in counts)


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
    "it loads its weight narrowly": lambda row: streams(row) and 16 * max(map(narrow_share, row["loops"])) > 1,
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
    kernels, steps = kernels_in_source(), {row["step"] for row in rows}
    assert kernels > STREAMING
    if "draft loop" not in steps:
        kernels -= {PERSISTENT}
    if "layer" not in steps:  # drafting alone
        kernels -= {"accept_kernel", "commit_kernel", "filtered_sample_kernel"}
    for dtype in {row["dtype"] for row in rows}:
        for model in MODELS:
            for architecture in ARCHITECTURES:
                place = (model, architecture, dtype)
                found = {row["kernel"] for row in rows if (row["model"], row["architecture"], row["dtype"]) == place}
                assert found == kernels, place


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


LAUNCHES = {"layer": 6, "layer, short text": 5, "top-1 head": 2, "sampling head": 2, "filtered head": 2, "accept": 1}
LAUNCHES |= {"commit": 1, "draft step": 18, "draft step, short text": 15, "draft loop": 1}


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
def test_launches(rows: list[Row], model: str, architecture: str) -> None:
    found = {step: of_step(rows, step, model, architecture) for step in LAUNCHES}
    assert {step: sum(row["launches"] for row in its) for step, its in found.items()} == LAUNCHES


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

    def moved(step: str, without: str | None = None) -> int:
        its = [row for row in of_step(rows, step, model) if row["bytes_moved"] and row["matrix"] != without]
        return sum(row["launches"] * row["bytes_moved"] for row in its)

    weights = functools.partial(moved, without="kv")
    assert moved("draft step") == moved("draft loop")
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


Sums = dict[str, set[str]]
"""How sums lie across the threads, by their place in the source."""


def sums_of(rows: list[Row]) -> Sums:
    found: Sums = {}
    for row in rows:
        for place, layouts in row["sums"].items():
            found.setdefault(place, set()).update(layouts)
    return found


def sums_that_differ(stages: Sums, loop: Sums) -> set[str]:
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
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("stages", "loop", "count"),
    [("draft step", "draft loop", 17), ("sampling draft head", "sampling draft loop", 5)],
)
def test_the_drafting_loop_adds_as_its_stages_do(
    rows: list[Row], stages: str, loop: str, count: int, model: str, architecture: str
) -> None:
    """All but the order of a sum is theirs by construction; that follows from how the compiler lays tiles out."""
    by_stages, by_loop = (sums_of(of_step(rows, step, model, architecture)) for step in (stages, loop))
    assert (len(by_stages), len(by_loop)) == (count, 17)
    assert sums_that_differ(by_stages, by_loop) == set()


@pytest.mark.parametrize("rows", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_number_of_warps_is_found(rows: list[Row], bad: Any, architecture: str) -> None:
    eight_warps = sums_of(bad["eight warps"][architecture])
    loop = sums_of(of_step(rows, "draft loop", "Llama-3.2-1B", architecture))
    streaming = {"qkv_rope.py", "attention.py", "linear_residual.py", "gate_up.py", "top1_head.py"}
    assert sums_that_differ(eight_warps, loop) >= streaming


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
from kangaroo_kernels.launch_config import configured_by
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
    "as shipped": (whole, {}),
    "few registers": (whole, {"num_warps": 1, "num_stages": 2, "block_n": 128}),
    "odd rows": (project(4096, 4097), {}),
    "no stages": (whole, {"num_stages": 1}),
    "many stages": (whole, {"num_stages": 20}),
    "few programs": (project(512, 4096), {}),
}

def rows(architecture, steps, shape, settings, **changed):
    with compile_only(architecture) as launches:
        shipped = launch_config._pickers[-1]
        with configured_by(lambda *place: shipped(*place)._replace(**changed)):
            return [row for step in steps for row in rows_of(step, shape, settings, launches)]

before = JITFunction.run, driver._active
found = {name: rows(80, [step], shape, settings, **changed) for name, (step, changed) in cases.items()}
ones, one = ModelShape("ones", 1, 1, 1, 1, 2, 1, 1), Settings(1, 1, torch.float32, META)
found["ones"] = rows(90, [step for step in STEPS if not step.variant], ones, one)
(smallest,) = (shape for shape in MODELS if shape.name == "Llama-3.2-1B")
(draft_step,) = (step for step in STEPS if step.name == "draft step")
drafting = ([draft_step], smallest, settings._replace(rows=1))
found["eight warps"] = {f"sm_{each}": rows(each, *drafting, num_warps=8) for each in (80, 90)}
cached = [device for device in linear_residual.linear_residual_kernel.device_caches if "compile" in str(device)]
left = [(JITFunction.run, driver._active) != before, launch_config._pickers, cached]
print(json.dumps(found | {"left": [str(each) for each in left if each]}))
"""


@pytest.fixture(scope="module")
def bad() -> Any:
    """``linear_residual`` as it ships, and badly launched, on sm_80."""
    return printed_by("-c", BAD)


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
    (row,) = bad[case]
    found = {fault for fault, is_there in FAULTS.items() if is_there(row)}
    assert faults <= found
    assert bool(found) == bool(faults)


def test_sizes_of_one_compile(bad: Any) -> None:
    """Triton gives a kernel a size of 1 as a number, which has no methods; the interpreter does not."""
    assert {row["kernel"] for row in bad["ones"]} > STREAMING


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


def test_a_commit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    result = invoke(compare, "no-such-commit")
    assert result.exit_code == 2
    assert result.stderr == "compare_binaries: no-such-commit is no commit that has kangaroo_kernels/ and tools/.\n"


def test_the_table_loses_nothing(bad: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = [*bad["as shipped"], *bad["few registers"]]
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
