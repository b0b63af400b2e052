"""The report on a GPU: each part runs (tiny, on the CPU), none spoils the others, and it says what it saw."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gpu_report
import pytest
import torch
import typer
from report import baselines, decode, runner, tests
from report.job import Job
from report.page import SMOKE_LABEL, complaints, decode_cells, page, state_of
from report.parts import FIRST, PARTS, Part
from typer.testing import CliRunner

from kangaroo_kernels.model.demo import PAIR as DEMO_PAIR

TOOLS = Path(__file__).resolve().parent.parent / "tools"
NAMES, FIRST_NAMES = [part.name for part in PARTS], [part.name for part in FIRST]


def single_spaced(text):
    """A page without what aligns its columns."""
    return re.sub(" +", " ", text)


# ---- the whole commands


def line(*arguments):
    """The command line; the folder that it writes into comes last."""
    *options, folder = map(str, arguments)
    return [sys.executable, str(TOOLS / "gpu_report.py"), *options, "--out", folder]


def run(command):
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOOLS)


def read(file):
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder in which the first call of ``gpu_kit`` has run, then what is the second one's alone, and a pair."""
    folder = tmp_path_factory.mktemp("report")
    for parts in (
        ("--first",),
        ("--minutes", "20", "--only", "equality,baselines,timeline,pair", "--pair", str(DEMO_PAIR)),
    ):
        done = run(line("--smoke", *parts, folder))
        assert done.returncode == 0, done.stderr
    parts = read(folder / "report.json")["parts"]
    return SimpleNamespace(folder=folder, parts=parts, text=(folder / "report.md").read_text())


def test_every_part_has_run_and_earlier_ones_are_kept(smoke):
    assert list(smoke.parts) == [*FIRST_NAMES, "equality", "baselines", "timeline", "pair"]
    assert {piece["status"] for piece in smoke.parts.values()} == {"done"}
    assert list(complaints(smoke.parts)) == []
    for name, piece in smoke.parts.items():
        assert piece["commit"]
        assert ("--first" in piece["command"]) == (name in FIRST_NAMES)
        assert piece["compiled"] == 0, "the interpreter compiles nothing"
    assert f"**{SMOKE_LABEL}**" in smoke.text
    assert len(list(smoke.folder.iterdir())) <= 8, "what comes back from a rented GPU"
    assert (smoke.folder / "timeline.png").read_bytes().startswith(b"\x89PNG") and "](timeline.png)" in smoke.text


def test_every_part_finds_its_figures(smoke):
    for name, passed in (("operations", 8), ("launches", 1), ("loop", 2), ("tests", 55), ("equality", 15)):
        counted = smoke.parts[name]
        assert (counted["passed"], counted["collected"], counted["not_run"]) == (passed, passed, 0)
    measured, decoded, found = (smoke.parts[name] for name in ("kernels", "decode", "pair"))
    assert {cell["op"] for cell in measured["cells"]} == {"gate_up", "attention"}
    assert all(cell["us"]["p50"] > 0 and cell["relative_error"] < 1e-5 for cell in measured["cells"])
    assert [cell["way"] for cell in decode_cells(smoke.parts)] == [*decode.WAYS, *baselines.WAYS]
    assert all(cell["tokens_per_second"] > 0 for cell in (*decode_cells(smoke.parts), *found["cells"]))
    for cell in (*decode_cells(smoke.parts), *decoded["steps"]):
        assert cell["agreeing_tokens"] == cell["new_tokens"] > 4, "float32 on a CPU: the same text"
    assert "vLLM was not measured" in smoke.text
    stagewise = [(drafts, way) for drafts in (1, 2, 6) for way in decode.DRAFTING[:2]]
    last = [(drafts, "in one kernel") for drafts in (1, 2, 6)]  # what may do harm
    assert [(step["drafts"], step["drafting"]) for step in decoded["steps"]] == stagewise + last
    assert [row["stage"] for row in smoke.parts["timeline"]["stages"]][-1] == "iteration"
    assert found["total"]["identical"] and found["total"]["mean_acceptance_length"] > 1.3
    same = [(cell["agreeing_tokens"], cell["new_tokens"]) for cell in found["cells"]]
    assert same == [(24, 24)] * 8, "float32 on a CPU: the same text"


def test_a_report_that_is_ended_writes_what_it_has(tmp_path):
    """As ``timeout`` ends it: by SIGTERM."""
    with subprocess.Popen(
        line("--smoke", "--only", "timeline", tmp_path), stderr=subprocess.PIPE, text=True
    ) as process:
        while "timeline" not in process.stderr.readline():  # the plan, just before the part begins
            assert process.poll() is None
        time.sleep(1)  # while the part still imports PyTorch
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert read(tmp_path / "report.json")["parts"]["timeline"]["status"] == "interrupted"
    assert "| timeline | interrupted |" in single_spaced((tmp_path / "report.md").read_text())


# ---- the command line


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(*arguments)`` with parts that are over at once; ``command.found`` has what they find, by name."""
    given, found = [], {}
    app = typer.Typer()
    app.command()(gpu_report.main)

    def run_part(part, seconds, plan):
        given.append((part.name, seconds))
        what = found.get(part.name, {})
        if isinstance(what, BaseException):
            raise what
        return {"status": "done", "seconds": 0.0, "limit": seconds, **what}

    def call(*arguments):
        given.clear()
        done = CliRunner().invoke(app, ["--smoke", "--out", str(tmp_path), *arguments])
        report = read(tmp_path / "report.json")
        return SimpleNamespace(code=done.exit_code, errors=done.stderr, report=report, given=list(given))

    monkeypatch.setattr(gpu_report, "run_part", run_part)
    call.found = found
    return call


def test_what_one_part_leaves_the_next_ones_have(command):
    given = command("--minutes", "10").given
    assert [name for name, _ in given] == NAMES
    assert given[0][1] == pytest.approx(580 * PARTS[0].share / sum(part.share for part in PARTS), abs=5)
    assert given[-1][1] == pytest.approx(580, abs=10), "the last part may have all that is left"
    assert command("--minutes", "0.04").given == [], "without time nothing is begun"


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
        ({"status": "stopped", "at": "7 of 300"}, 1, len(NAMES), "s and was stopped (at: 7 of 300).\n"),
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
    monkeypatch.setattr(gpu_report, "digest_of_sources", partial(gpu_report.digest_of_sources, tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    sources, key, digests = tmp_path / "tools", tmp_path / ".dev" / "key.json", set()
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.py", "2")):
        shutil.rmtree(sources, ignore_errors=True)
        sources.mkdir()
        (sources / name).write_text(content)
        digests.add(digest := gpu_report.digest_of_sources())
    assert len(digests) == 3
    assert gpu_report.commit() == f"unknown, sources {digest}"
    key.parent.mkdir()
    key.write_text(json.dumps({"sources": digest, "commit": "c"}))
    assert gpu_report.commit() == "c"


# ---- a part's process

SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
def found(**values): pathlib.Path(json.loads(sys.argv[-1])["piece"]).write_text(json.dumps(values))
found(half=1, doing="something")
"""


@pytest.fixture
def part(tmp_path, monkeypatch):
    """``part(script)``: what becomes of a part that does that."""
    monkeypatch.setattr(runner, "GRACE", 0.5)

    def become(script, seconds=30.0, smoke=False):
        monkeypatch.setattr(runner, "WORKER", (sys.executable, "-c", SCRIPT + script))
        return runner.run_part(Part("decode", 1, ""), seconds, Job(tmp_path / "report.json", tmp_path, seconds, smoke))

    return become


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("", {"status": "done", "compiled": 0}),
        ("time.sleep(1); os.kill(os.getppid(), signal.SIGINT); time.sleep(300)", {"status": "interrupted"}),
        ("os.kill(os.getpid(), signal.SIGKILL)", {"status": "failed", "exit_status": -signal.SIGKILL}),
        ("print('on stdout', flush=True); raise SystemExit('bad luck')", {"output": ["on stdout", "bad luck"]}),
        (
            "pathlib.Path(os.environ['COMPILED_LOG']).write_text('one\\ntwo\\n')",
            {"status": "done", "compiled": 2, "compiled_names": ["one", "two"]},
        ),
    ],
)
def test_a_part_keeps_what_it_found_however_it_ends(script, wanted, part):
    left = part(script)
    assert {"half": 1, **wanted}.items() <= left.items()
    assert "doing" not in left and ("at" in left) == (left["status"] != "done")


def test_what_a_part_finds_is_in_the_reports_folder_at_once(part, tmp_path):
    left = part("print(json.loads(sys.argv[-1])['piece'], flush=True); raise SystemExit(1)")
    assert left["output"] == [str(tmp_path / runner.UNDER_WAY)]
    assert not (tmp_path / runner.UNDER_WAY).exists(), "then it is in the report"


def test_a_part_that_hangs_writes_what_it_has_and_is_ended_with_its_children(part, tmp_path):
    script = f"""
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", deaf])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
try: time.sleep(300)
except KeyboardInterrupt: found(half=2)
time.sleep(300)
"""
    found = part(script, 3)
    assert (found["status"], found["half"]) == ("stopped", 2)
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    deadline = time.monotonic() + 10  # the system takes a moment
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_smoke_run_sees_no_gpu_and_a_part_is_no_worker_of_another_pytest(monkeypatch):
    """pytest-benchmark refuses to measure in a worker."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    smoke, real = map(runner.environment_of, (True, False))
    assert (smoke["CUDA_VISIBLE_DEVICES"], smoke["TRITON_INTERPRET"]) == ("", "1")
    assert "TRITON_INTERPRET" not in real
    assert not [name for name in (*smoke, *real) if name.startswith("PYTEST_")]


def work(name, folder, first):
    """A part's own process, behind a first line; it leaves ``piece.json``."""
    told = {"piece": folder / "piece.json", "folder": folder, "seconds": 60.0, "pair": None, "smoke": True}
    last = f"runner.work({name!r}, {json.dumps(told, default=str)!r})"
    code = f"from report import environment, runner, tests\n{first}\n{last}"
    return subprocess.run(
        [sys.executable, "-c", code], env=runner.environment_of(True), capture_output=True, text=True, check=False
    )


def test_a_part_hears_the_interrupt_where_the_report_does_not(tmp_path):
    """Started by nohup or in a shell's background, all of them would ignore it."""
    heard = "lambda job: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    done = work("environment", tmp_path, f"{ignored}; environment.run = {heard}")
    assert done.stdout == "True\n", done.stderr


def test_a_cell_that_fails_leaves_the_others(job):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    job.cell("cells", {"model": "a"}, fail)
    job.cell("cells", {"model": "b"}, lambda: {"us": 1.0})
    job.deadline = 0
    job.cell("cells", {"model": "c"}, fail)
    assert read(job.piece)["cells"] == [
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


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_outcomes_are_counted_and_a_lost_gpu_ends_a_worker_alone(workers, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS + (LOST if workers else ""))
    hooks = "import sys; sys.path.append({tests!r})\nfrom lost_gpu import pytest_runtest_makereport\n"
    (tmp_path / "conftest.py").write_text(hooks.format(tests=str(Path(__file__).parent)))
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    done = work("tests", tmp_path, f"tests.SMOKE_TESTS = {[str(tmp_path), *workers]}")
    assert done.returncode == 0, done.stderr
    found, lost = read(tmp_path / "piece.json"), bool(workers)
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
    where = {"model": "m", "context": 8}
    parts = {
        "kernels": piece(status="failed", at="7 of 9", output=["", "Killed"]),
        "tests": piece(failures=[{"test": "tests/x.py::test_y", "reason": "E  1 != 2"}]),
        "decode": piece(
            cells=[where | {"way": "plain", "error": "OutOfMemoryError"}, where | {"skipped": "no time left"}],
            steps=[
                where | {"drafts": 6, "drafting": "kernel by kernel", "agreeing_tokens": 3, "new_tokens": 4},
                where | {"drafts": 6, "drafting": "in one kernel", "error": "lost"},
            ],
            not_run=2,
        ),
        "baselines": piece(cells=[where | {"way": "eager", "agreeing_tokens": 3, "new_tokens": 4}]),
        "pair": piece(total={"identical": False}),
    }
    assert list(complaints(parts)) == [
        "kernels failed (at: 7 of 9): Killed",
        "tests: tests/x.py::test_y failed: E  1 != 2",
        "decode, m, 8, plain: OutOfMemoryError",
        "decode, m, 8, 6, kernel by kernel: its tokens differ from plain decoding's.",
        "decode, m, 8, 6, in one kernel: lost",
        "pair: Kangaroo's tokens differ from plain decoding's.",
    ]
    assert state_of(parts["decode"]) == "done, 3 not reached"


def test_figures_are_set_against_plain_decoding_the_kernel_and_the_ceiling():
    where = {"model": "m|n", "context": 128}
    plain = {"way": "plain", "tokens_per_second": 100.0, "us_per_step": 120.0, "bytes_per_token": 2 * 10**10}
    drafted = {"way": "kangaroo", "tokens_per_second": 150.0, "agreeing_tokens": 63, "new_tokens": 64}
    step = {"drafts": 2, "drafting": "in one kernel", "us_per_step": 150.0}
    cell = {"model": "m", "op": "attention", "role": "kv", "length": 2048, "gigabytes_per_second": 900.0}
    decoded = piece(
        cells=[where | plain, where | drafted],
        steps=[where | step, {"model": "m|n", "context": 256} | step],
    )
    measured = [
        cell | {"rows": rows, "way": way, "us": {"p50": us}, "share_of_ceiling": share}
        for rows, way, us, share in ((1, "kernel", 10.0, 0.9), (8, "kernel", 11.0, 0.8), (1, "eager", 25.0, 0.4))
    ]
    text = page_of(environment=piece(ceiling={"read": 4000.0}), decode=decoded, kernels=piece(cells=measured))
    for row in (
        r"| m\|n | 128 | plain | 100.0 | 1.00 | 50.0 % | - | - |",  # a bar in a name ends no column
        r"| m\|n | 128 | kangaroo | 150.0 | 1.50 | - | - | 63 of 64 |",
        r"| m\|n | 128 | 2 | in one kernel | 150.0 | 1.25 | - |",  # a step that lasts as long as 1.25 plain ones
        r"| m\|n | 256 | 2 | in one kernel | 150.0 | - | - |",
        "| m | attention 2048 | 10.0 | 900 | 90.0 % | 11.0 | - | 2.50 | - |",
    ):
        assert row in text


# ---- on a GPU


@pytest.mark.gpu
def test_one_part_on_the_card(tmp_path):
    done = run(line("--only", "environment", tmp_path))
    assert done.returncode == 0, done.stderr
    report = read(tmp_path / "report.json")
    assert report["gpu"] == torch.cuda.get_device_name()
    assert report["parts"]["environment"]["ceiling"]["read"] > 50
