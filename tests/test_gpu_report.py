"""The report on a GPU: each part runs (tiny, on the CPU), none spoils the others, and it says what it saw."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gpu_report
import typer
from report import baselines, decode, runner, tests
from report.job import Job
from report.page import SMOKE_LABEL, complaints, decode_cells, page, state_of
from report.parts import FIRST, PARTS, Part

from kangaroo_kernels.model.demo import PAIR as DEMO_PAIR

TOOLS = Path(__file__).resolve().parent.parent / "tools"
NAMES, FIRST_NAMES = [part.name for part in PARTS], [part.name for part in FIRST]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "piece.json", tmp_path, 60.0, smoke=True)


def single_spaced(text):
    """A page without what aligns its columns."""
    return re.sub(" +", " ", text)


# ---- the whole commands


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder in which the first minutes have run, then the parts that are the report's alone, and a pair."""
    folder = tmp_path_factory.mktemp("report")
    rest = ("--only", "baselines,timeline,pair", "--pair", str(DEMO_PAIR))
    for parts in (("--first",), rest):
        line = [sys.executable, str(TOOLS / "gpu_report.py"), "--smoke", "--out", str(folder), *parts]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=TOOLS.parent)
        assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    return SimpleNamespace(folder=folder, report=report, parts=report["parts"], text=(folder / "report.md").read_text())


def test_every_part_has_run_and_earlier_ones_are_kept(smoke):
    assert list(smoke.parts) == [*FIRST_NAMES, "baselines", "timeline", "pair"]
    assert {piece["status"] for piece in smoke.parts.values()} == {"done"}
    assert list(complaints(smoke.parts)) == []
    for name, piece in smoke.parts.items():
        assert piece["commit"]
        assert ("--first" in piece["command"]) == (name in FIRST_NAMES)
        assert piece["compiled"] == 0, "the interpreter compiles nothing"
    assert (smoke.report["gpu"], smoke.report["smoke"]) == (None, True)
    assert f"**{SMOKE_LABEL}**" in smoke.text
    assert (smoke.folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert f"({SMOKE_LABEL})](timeline.png)" in smoke.text


def test_every_part_finds_its_figures(smoke):
    for name, passed in (("operations", 7), ("launches", 1), ("loop", 2), ("tests", 55)):
        counted = smoke.parts[name]
        assert (counted["passed"], counted["collected"], counted["not_run"]) == (passed, passed, 0)
    measured, decoded = smoke.parts["kernels"], smoke.parts["decode"]
    assert {cell["op"] for cell in measured["cells"]} == {"gate_up", "attention"}
    assert all(cell["us"]["p50"] > 0 and cell["relative_error"] < 1e-5 for cell in measured["cells"])
    assert [cell["way"] for cell in decoded["cells"]] == list(decode.WAYS)
    assert [cell["way"] for cell in smoke.parts["baselines"]["cells"]] == list(baselines.WAYS)
    assert all(cell["tokens_per_second"] > 0 for cell in decode_cells(smoke.parts))
    ways = [(step["drafts"], step["drafting"]) for step in decoded["steps"]]
    stagewise = [(drafts, way) for drafts in (1, 2, 6) for way in decode.DRAFTING[:2]]
    assert ways == [*stagewise, *((drafts, "in one kernel") for drafts in (1, 2, 6))], "what may do harm comes last"
    assert [row["stage"] for row in smoke.parts["timeline"]["stages"]][-1] == "iteration"
    found = smoke.parts["pair"]
    assert found["total"]["identical"]
    assert found["total"]["mean_acceptance_length"] > 1.3
    assert len(found["cells"]) == 2 * 2
    for cell in found["cells"]:
        assert cell["agreeing_tokens"] == cell["new_tokens"] == 24, "float32 on a CPU: the same text"
        assert cell["tokens_per_second"] > 0


def test_a_report_that_is_ended_writes_what_it_has(tmp_path):
    """As ``timeout`` ends it: by SIGTERM."""
    command = [sys.executable, str(TOOLS / "gpu_report.py"), "--smoke", "--out", str(tmp_path), "--only", "timeline"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "timeline" not in process.stderr.readline():  # the plan, just before the part begins
            assert process.poll() is None
        time.sleep(1)  # while the part still imports PyTorch
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert json.loads((tmp_path / "report.json").read_text())["parts"]["timeline"]["status"] == "interrupted"
    assert "| timeline | interrupted |" in single_spaced((tmp_path / "report.md").read_text())


# ---- the command line


def invoke(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments, terminal_width=200)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(*arguments)`` with parts that are over at once; ``command.found`` has what they find, by name."""
    given, found = [], {}

    def run_part(part, seconds, plan):
        given.append((part.name, seconds))
        what = found.get(part.name, {})
        if isinstance(what, BaseException):
            raise what
        return {"status": "done", "seconds": 0.0, "limit": seconds, **what}

    monkeypatch.setattr(gpu_report, "run_part", run_part)

    def call(*arguments):
        given.clear()
        done = invoke(gpu_report.main, "--smoke", "--out", str(tmp_path), *arguments)
        report = json.loads((tmp_path / "report.json").read_text())
        return SimpleNamespace(code=done.exit_code, errors=done.stderr, report=report, given=list(given))

    call.found = found
    return call


def test_what_one_part_leaves_the_next_ones_have(command):
    given = command("--minutes", "10").given
    assert [name for name, _ in given] == NAMES
    assert given[0][1] == pytest.approx(580 * PARTS[0].share / sum(part.share for part in PARTS), abs=5)
    assert given[-1][1] == pytest.approx(580, abs=10), "the last part may have all that is left"
    done = command("--minutes", "0.04")
    assert done.given == [], "without time nothing is begun"


def test_parts_that_are_not_run_again_are_kept_unless_another_gpu_ran_them(command, tmp_path):
    command.found["tests"] = {"failures": [{"test": "t", "reason": "r"}]}
    assert command().code == 1
    command.found["decode"] = {"cells": []}
    again = command("--only", "decode, environment")
    assert list(again.report["parts"]) == NAMES
    assert again.report["parts"]["tests"]["failures"]
    assert (again.code, again.report["parts"]["decode"]["cells"]) == (0, []), "what was wrong before is no news"
    (tmp_path / "report.json").write_text(json.dumps(again.report | {"gpu": "another"}))
    assert list(command("--only", "decode").report["parts"]) == ["decode"]


@pytest.mark.parametrize(
    ("ending", "code", "kept", "said"),
    [
        ({"status": "failed", "output": ["Killed"]}, 1, len(NAMES), "gpu_report: decode failed: Killed\n"),
        ({"status": "stopped", "at": "7 of 300"}, 1, len(NAMES), "s and was stopped (at: 7 of 300)"),
        ({"status": "interrupted", "cells": []}, 130, 5, "interrupted"),
        (KeyboardInterrupt(), 130, 4, "wrote"),
    ],
)
def test_a_part_that_ends_badly_takes_nothing_along(ending, code, kept, said, command):
    command.found["decode"] = ending
    done = command()
    assert (done.code, list(done.report["parts"])) == (code, NAMES[:kept])
    assert said in done.errors


def test_the_commit_is_the_sources(tmp_path, monkeypatch):
    """Without git there is a digest of the sources, by name and content, or the commit that was carried with it."""
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    source, digest = tmp_path / "tools" / "a.py", gpu_report.digest_of_sources
    source.parent.mkdir()
    source.write_text("1")
    digests = {digest(tmp_path)}
    source.write_text("2")
    digests |= {digest(tmp_path)}
    source.rename(tmp_path / "tools" / "b.py")
    assert len(digests | {digest(tmp_path)}) == 3
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(gpu_report, "digest_of_sources", lambda: "d")
    assert gpu_report.commit() == "unknown, sources d"
    (tmp_path / ".dev").mkdir()
    (tmp_path / ".dev" / "key.json").write_text(json.dumps({"sources": "d", "commit": "c"}))
    assert gpu_report.commit() == "c"


# ---- a part's process

SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
def found(**values): pathlib.Path(json.loads(sys.argv[-1])["piece"]).write_text(json.dumps(values))
found(half=1, doing="something")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(script)``: what becomes of a part that does that."""
    monkeypatch.setattr(runner, "GRACE", 0.5)

    def run(script, seconds=30.0, smoke=False):
        monkeypatch.setattr(runner, "WORKER", (sys.executable, "-c", SCRIPT + script))
        return runner.run_part(Part("decode", 1, ""), seconds, Job(tmp_path / "report.json", tmp_path, seconds, smoke))

    return run


@pytest.mark.parametrize(
    ("script", "limit", "wanted"),
    [
        ("", 30, {"status": "done", "compiled": 0}),
        ("time.sleep(1); os.kill(os.getppid(), signal.SIGINT); time.sleep(300)", 30, {"status": "interrupted"}),
        ("os.kill(os.getpid(), signal.SIGKILL)", 30, {"status": "failed", "exit_status": -signal.SIGKILL}),
        ("try: time.sleep(300)\nexcept KeyboardInterrupt: found(half=2)", 2, {"status": "stopped", "half": 2}),
        (
            "print('on stdout', flush=True); raise SystemExit('CUDA error: out of luck')",
            30,
            {"status": "failed", "exit_status": 1, "output": ["on stdout", "CUDA error: out of luck"]},
        ),
        (
            "pathlib.Path(os.environ['COMPILED_LOG']).write_text('one\\ntwo\\n')",
            30,
            {"status": "done", "compiled": 2, "compiled_names": ["one", "two"]},
        ),
    ],
)
def test_a_part_keeps_what_it_found_however_it_ends(script, limit, wanted, run):
    left = run(script, limit)
    at = {} if wanted["status"] == "done" or "half" in wanted else {"at": "something"}
    assert {"half": 1, **at, **wanted}.items() <= left.items()
    assert "doing" not in left and ("at" in left) == bool(at)


def test_a_part_that_hangs_is_ended_with_its_children(run, tmp_path):
    script = f"""
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(300)
"""
    found = run(script, 3)
    assert (found["status"], found["half"]) == ("stopped", 1)
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    deadline = time.monotonic() + 10  # the system takes a moment
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_smoke_run_sees_no_gpu_and_a_part_is_no_worker_of_another_pytest(run, monkeypatch):
    """pytest-benchmark refuses to measure in a worker."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script = "found(**os.environ)"
    found = run(script, smoke=True)
    assert (found["CUDA_VISIBLE_DEVICES"], found["TRITON_INTERPRET"]) == ("", "1")
    assert not [name for name in found if name.startswith("PYTEST_")]
    assert "TRITON_INTERPRET" not in run(script)


def test_a_part_hears_the_interrupt_where_the_report_does_not(tmp_path):
    """Started by nohup or in a shell's background, all of them would ignore it."""
    told = json.dumps({"piece": str(tmp_path / "p"), "folder": ".", "seconds": 9, "pair": None})
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from report import environment, runner\n"
        "environment.run = lambda job: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        f"runner.work('environment', {told!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TOOLS, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_cell_that_fails_leaves_the_others(job):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    job.cell("cells", {"model": "a"}, fail)
    job.cell("cells", {"model": "b"}, lambda: {"us": 1.0})
    job.deadline = 0
    job.cell("cells", {"model": "c"}, fail)
    assert json.loads(job.piece.read_text())["cells"] == [
        {"model": "a", "error": "OutOfMemoryError: CUDA out of memory."},
        {"model": "b", "us": 1.0},
        {"model": "c", "skipped": "no time left"},
    ]


# ---- tests and benchmarks as parts

TESTS = """
import os
import pytest
import torch
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_right(record_property): record_property("us_a_launch", 7.5)
def test_wrong(): assert 1 == 2, "one is not two"
def test_unready(broken): pass
def test_left_out(): pytest.skip("so")
"""
LOST = """
def test_a_lost(monkeypatch):
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lambda: 1 / 0
    raise AssertionError("illegal access")
"""

COUNT = """
import sys
from pathlib import Path
from report import tests
from report.job import Job
from report.parts import Part

tests.SMOKE_TESTS = sys.argv[2:]
tests.run(Job(Path(sys.argv[1]) / "piece.json", Path(sys.argv[1]), 60.0, smoke=True), Part("tests", 1, "", ("tests",)))
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_outcomes_are_counted_and_a_lost_gpu_ends_a_worker_alone(workers, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS + (LOST if workers else ""))
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    command = [sys.executable, "-c", COUNT, str(tmp_path), str(tmp_path), *workers]
    done = subprocess.run(command, env=runner.environment_of(True), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, lost = json.loads((tmp_path / "piece.json").read_text()), bool(workers)
    counts = [found[count] for count in ("passed", "failed", "skipped", "collected", "not_run")]
    assert counts == [1, 2 + lost, 1, 4 + lost, 0]
    reasons = {failure["test"].rpartition("test_")[2]: failure["reason"] for failure in found["failures"]}
    assert reasons["broken.py"] == "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert reasons["wrong"].startswith("AssertionError: one is not two")
    assert reasons["unready"] == "ValueError: no fixture"
    assert [each["us_a_launch"] for each in found["noted"]] == [7.5]
    assert not lost or "illegal access" in (tmp_path / "lost.txt").read_text()


def test_no_tests_is_a_failure(job, monkeypatch):
    monkeypatch.setattr(tests.pytest, "main", lambda *arguments, **named: 5)
    with pytest.raises(RuntimeError, match="pytest found no tests and ended with 5"):
        tests.run(job, Part("tests", 1, "", ("tests",)))


# ---- the page


def piece(**values):
    return {"status": "done", "seconds": 1.0, "limit": 2.0, "date": "today", "commit": "abc", **values}


def page_of(**found):
    about = {"gpu": "H200", "smoke": False, "command": "c", "date": "today", "commit": "abc"}
    return single_spaced(page(about | {"parts": found}))


def test_everything_wrong_is_told_and_spoils_no_page():
    found = {name: piece(status="failed", output=["RuntimeError: boom", ""]) for name in {*NAMES, *FIRST_NAMES, "pair"}}
    text = page_of(**found)
    assert text.startswith("# H200\n")
    assert all(f"- {name} failed: RuntimeError: boom" in text for name in found)
    lost = {**piece(status="failed", at="7 of 9"), "output": ["", "Killed"]}
    assert list(complaints({"decode": lost})) == ["decode failed (at: 7 of 9): Killed"]
    parts = {
        "tests": piece(failures=[{"test": "tests/x.py::test_y", "reason": "E  1 != 2"}]),
        "decode": piece(
            cells=[{"model": "m", "context": 8, "way": "plain", "error": "OutOfMemoryError"}],
            steps=[{"model": "m", "context": 8, "drafts": 6, "drafting": "in one kernel", "error": "lost"}],
        ),
        "pair": piece(total={"identical": False}),
    }
    assert list(complaints(parts)) == [
        "tests: tests/x.py::test_y failed: E  1 != 2",
        "decode, m, 8, plain: OutOfMemoryError",
        "decode, m, 8, 6, in one kernel: lost",
        "pair: Kangaroo's tokens differ from plain decoding's.",
    ]
    assert state_of(piece(cells=[{"skipped": "no time left"}, {"us": 1}], not_run=2)) == "done, 3 not reached"


def test_figures_are_set_against_plain_decoding_the_kernel_and_the_ceiling():
    cells = [
        {"model": "m|n", "context": 128, "way": "plain", "tokens_per_second": 100.0, "us_per_step": 120.0},
        {"model": "m|n", "context": 128, "way": "kangaroo", "tokens_per_second": 150.0},
    ]
    cell = {"model": "m", "op": "attention", "role": "kv", "length": 2048, "gigabytes_per_second": 900.0}
    shares = [
        cell | {"rows": 1, "way": "kernel", "us": {"p50": 10.0}, "share_of_ceiling": 0.9},
        cell | {"rows": 8, "way": "kernel", "us": {"p50": 11.0}, "share_of_ceiling": 0.8},
        cell | {"rows": 1, "way": "eager", "us": {"p50": 25.0}, "share_of_ceiling": 0.4},
    ]
    cells[0]["bytes_per_token"] = 2 * 10**10
    steps = [
        {"model": "m|n", "context": context, "drafts": 2, "drafting": "in one kernel", "us_per_step": 150.0}
        for context in (128, 256)
    ]
    found = {"decode": piece(cells=cells, steps=steps), "kernels": piece(cells=shares)}
    text = page_of(environment=piece(ceiling={"read": 4000.0}), **found)
    assert r"| m\|n | 128 | plain | 100.0 | 1.00 | 50.0 % | - |" in text, "a bar in a name ends no column"
    assert r"| m\|n | 128 | kangaroo | 150.0 | 1.50 | - | - |" in text
    assert r"| m\|n | 128 | 2 | in one kernel | 150.0 | 1.25 |" in text, "a step that lasts as long as 1.25 plain ones"
    assert r"| m\|n | 256 | 2 | in one kernel | 150.0 | - |" in text
    assert "| m | attention 2048 | 10.0 | 900 | 90.0 % | 11.0 | - | 2.50 | - |" in text


# ---- on a GPU


@pytest.mark.gpu
def test_one_part_on_the_card(tmp_path):
    command = [sys.executable, str(TOOLS / "gpu_report.py"), "--only", "environment", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["gpu"] == torch.cuda.get_device_name()
    assert report["parts"]["environment"]["ceiling"]["read"] > 50
