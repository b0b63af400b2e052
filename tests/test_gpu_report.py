"""The report on a GPU: each part runs (tiny, on the CPU), none spoils the others, and it says what it saw."""

import json
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gpu_report
import typer
from report import kernels, plots, runner, tests
from report.job import Job
from report.page import SMOKE_LABEL, complaints, page, state_of
from report.parts import FIRST, PAIR, PARTS, Part, budgets
from report.plots import draw
from report.runner import run_part

from kangaroo_kernels.model.demo import PAIR as DEMO_PAIR

TOOLS = Path(__file__).resolve().parent.parent / "tools"
NAMES, FIRST_NAMES = [part.name for part in PARTS], [part.name for part in FIRST]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "piece.json", tmp_path, 60.0, smoke=True)


# ---- the whole commands


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder in which the first minutes have run, then the parts that are the report's alone, and a pair."""
    folder = tmp_path_factory.mktemp("report")
    rest = ("--only", "baselines,timeline,pair", "--pair", str(DEMO_PAIR))
    for command, more in (("gpu_kit/first.py", ()), ("gpu_report.py", rest)):
        line = [sys.executable, str(TOOLS / command), "--smoke", "--out", str(folder), *more]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=TOOLS.parent)
        assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    return SimpleNamespace(folder=folder, report=report, parts=report["parts"], text=(folder / "report.md").read_text())


def test_every_part_has_run_and_earlier_ones_are_kept(smoke):
    assert list(smoke.parts) == [*FIRST_NAMES, "baselines", "timeline", "pair"]
    assert {piece["status"] for piece in smoke.parts.values()} == {"done"}
    assert list(complaints(smoke.report)) == []
    for name, piece in smoke.parts.items():
        assert piece["commit"]
        assert piece["date"].endswith("UTC")
        assert ("first.py" if name in FIRST_NAMES else "gpu_report.py") in piece["command"]
        assert (piece["compiled"], piece["found"]) == (0, 0), "the interpreter compiles nothing"


def test_figures_of_a_cpu_say_so(smoke):
    assert smoke.report["gpu"] is None
    assert smoke.report["label"] == SMOKE_LABEL
    assert f"**{SMOKE_LABEL}**" in smoke.text
    for name in ("kernels", "decode", "timeline", "pair"):
        assert (smoke.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({SMOKE_LABEL})]({name}.png)" in smoke.text


def test_tests_and_benchmarks_are_counted(smoke):
    for name, passed in (("operations", 7), ("launches", 1), ("loop", 2), ("tests", 55)):
        counted = smoke.parts[name]
        assert (counted["passed"], counted["collected"], counted["not_run"]) == (passed, passed, 0)
    measured = smoke.parts["kernels"]
    assert measured["not_run"] == 0
    assert {cell["op"] for cell in measured["cells"]} == {"gate_up", "attention"}
    assert all(cell["us"]["p50"] > 0 and cell["relative_error"] < 1e-5 for cell in measured["cells"])


def test_decodes_are_measured(smoke):
    cells = [cell["way"] for cell in smoke.parts["decode"]["cells"]]
    assert cells == ["plain", "plain, chained", "Kangaroo, unforced", "Kangaroo, synthetic acceptance"]
    assert [cell["way"] for cell in smoke.parts["baselines"]["cells"]] == [
        "transformers, eager",
        "transformers, static, compiled",
    ]
    assert all(cell["tokens_per_second"] > 0 for cell in smoke.parts["decode"]["cells"])
    ways = [(step["drafts"], step["drafting"]) for step in smoke.parts["decode"]["steps"]]
    stagewise = [(drafts, way) for drafts in (1, 2, 6) for way in ("kernel by kernel", "kernel by kernel, chained")]
    assert ways == [*stagewise, *((drafts, "in one kernel") for drafts in (1, 2, 6))], "what may do harm comes last"
    assert "synthetic" in smoke.parts["decode"]["synthetic"]["assumption"]
    assert [row["stage"] for row in smoke.parts["timeline"]["stages"]][-1] == "iteration"


def test_the_pair_is_the_real_thing_and_stands_beside_transformers(smoke):
    found = smoke.parts["pair"]
    assert found["total"]["identical"]
    assert found["total"]["mean_acceptance_length"] > 1.3
    assert [total["prompts"] for total in found["baselines"]] == [2, 2]
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
    assert "| timeline | interrupted |" in (tmp_path / "report.md").read_text()


# ---- the command line


def invoke(*arguments, main=gpu_report.main):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments, terminal_width=200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0; it must be a finite number above 0."),
        (["--only", "decode,tset"], "there is no part called tset; there are environment, tests, "),
        (["--only", ""], "there is no part called"),
        (["--only", "pair"], "the part pair needs --pair DIR"),
        (["--pair", "DIR", "--only", "decode"], "--only leaves the part pair out"),
        (["--pair", "DIR"], "which has no target and no adapter and no prompts.json;"),
        (["--smoke"], "--smoke needs --out"),
        (["--smoke", "--out", "DIR/file/inside"], "cannot be written: Not a directory."),
        ([], "--smoke --out DIR runs it without one."),
    ],
)
def test_a_mistake_gets_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    done = invoke(*(argument.replace("DIR", str(tmp_path)) for argument in arguments))
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("gpu_report: ")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "DIR", "--seconds", "nan"], "first: --seconds is nan; it must be a finite number above 0.\n"),
        (
            ["--out", "DIR", "--only", "loops"],
            "first: there is no part called loops; there are environment, ",
        ),
        (["--out", "DIR"], "first: this needs a CUDA GPU and there is none here; --smoke"),
    ],
)
def test_the_kit_refuses_likewise(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(TOOLS / "gpu_kit"))
    done = invoke(*(argument.replace("DIR", str(tmp_path)) for argument in arguments), main=import_module("first").main)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(message)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(*arguments)`` with parts that are over at once; ``command.found`` has what they find, by name."""
    given, found = [], {}

    def run_part(part, seconds, folder, **named):
        given.append((part.name, seconds))
        what = found.get(part.name, {})
        if isinstance(what, BaseException):
            raise what
        return {"status": "done", "seconds": 0.0, "limit": seconds, **what}

    monkeypatch.setattr(gpu_report, "run_part", run_part)

    def call(*arguments):
        given.clear()
        done = invoke("--smoke", "--out", str(tmp_path), *arguments)
        report = json.loads((tmp_path / "report.json").read_text())
        return SimpleNamespace(code=done.exit_code, errors=done.stderr, report=report, given=list(given))

    call.found = found
    return call


def test_what_one_part_leaves_the_next_ones_have(command):
    given = command("--minutes", "10").given
    assert [name for name, _ in given] == NAMES
    assert given[0][1] == pytest.approx(budgets(PARTS, 580)[0], abs=5)
    assert given[-1][1] == pytest.approx(580, abs=10), "the last part may have all that is left"
    assert sum(budgets(PARTS, 500)) == pytest.approx(500)
    assert budgets(PARTS, -3) == [0] * len(PARTS)


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
        (
            {"status": "stopped", "limit": 85.0, "at": "7 of 300"},
            1,
            len(NAMES),
            "within its 85 s and was stopped (at: 7",
        ),
        ({"status": "interrupted", "cells": []}, 130, 5, "interrupted"),
        (KeyboardInterrupt(), 130, 4, "wrote"),
    ],
)
def test_a_part_that_ends_badly_takes_nothing_along(ending, code, kept, said, command):
    command.found["decode"] = ending
    done = command()
    assert (done.code, list(done.report["parts"])) == (code, NAMES[:kept])
    assert said in done.errors


def test_without_time_nothing_is_begun(command):
    done = command("--minutes", "0.04")
    assert done.given == []
    assert {piece["status"] for piece in done.report["parts"].values()} == {"skipped"}


@pytest.mark.parametrize("how", ["no matplotlib", "a figure that no axis takes"])
def test_a_picture_that_cannot_be_drawn_spoils_no_page(how, command, tmp_path, monkeypatch):
    if how == "no matplotlib":
        monkeypatch.setitem(sys.modules, "report.plots", None)
    else:
        monkeypatch.setitem(plots.PLOTS, "decode", lambda piece, path, title: 1 / 0)
    done = command()
    assert done.code == 1
    assert ("no plots: " if how == "no matplotlib" else "decode.png could not be drawn: ") in done.errors
    assert (tmp_path / "report.md").is_file()


def test_the_commit_is_the_sources(tmp_path, monkeypatch):
    """Results are no change of it; without git there is a digest of the sources, by name and content."""

    def git(*arguments):
        settings = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    results, source = tmp_path / "bench" / "results" / "report.json", tmp_path / "tools" / "a.py"
    for file in (results, source):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "m")
    results.write_text("2")
    assert len(gpu_report.commit()) == 12
    before = gpu_report.digest_of_sources(tmp_path)
    source.write_text("2")
    assert gpu_report.commit().endswith(" with changes")
    digests = {before, gpu_report.digest_of_sources(tmp_path)}
    digests.add(gpu_report.digest_of_sources(source.rename(tmp_path / "tools" / "b.py").parents[1]))
    assert len(digests) == 3
    monkeypatch.setattr(gpu_report, "git", lambda *arguments: "")
    assert gpu_report.commit() == f"unknown, sources {gpu_report.digest_of_sources()}"


# ---- a part's process

SCRIPT = """
import json, os, pathlib, signal, subprocess, sys, time
piece = pathlib.Path(sys.argv[sys.argv.index("--piece") + 1])
piece.write_text(json.dumps({"half": 1, "doing": "something"}))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(script)``: what becomes of a part that does that."""
    monkeypatch.setattr(runner, "GRACE", 0.5)

    def run(script, seconds=30.0, **more):
        return run_part(
            Part("decode", 1, ""), seconds, tmp_path, command=(sys.executable, "-c", SCRIPT + script), **more
        )

    return run


def test_a_part_that_ends_is_done(run):
    told = []
    found = run("time.sleep(1)", update=told.append)
    assert (found["status"], found["half"], told[-1]) == ("done", 1, "something")
    assert not {"doing", "at"} & found.keys()


def test_ctrl_c_ends_a_part_and_keeps_what_it_found(run):
    def interrupt(doing):
        if doing:
            raise KeyboardInterrupt

    found = run("time.sleep(300)", 60, update=interrupt)
    assert (found["status"], found["half"], found["at"]) == ("interrupted", 1, "something")


def test_a_crash_keeps_what_was_found_and_the_last_words(run):
    found = run("print('on stdout', flush=True); raise SystemExit('CUDA error: out of luck')")
    assert (found["status"], found["half"], found["exit_status"]) == ("failed", 1, 1)
    assert found["output"] == ["on stdout", "CUDA error: out of luck"]
    assert list(complaints(report_of(decode=found))) == ["decode failed (at: something): CUDA error: out of luck"]
    found = run("os.kill(os.getpid(), signal.SIGKILL)")
    assert (found["status"], found["exit_status"]) == ("failed", -signal.SIGKILL)


@pytest.mark.parametrize("ignore", ["", "signal.signal(signal.SIGINT, signal.SIG_IGN);"])
def test_a_part_that_hangs_is_ended_with_its_children(ignore, run, tmp_path):
    script = f"""
{ignore}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(300)
"""
    found = run(script, 3)
    assert (found["status"], found["half"]) == ("stopped", 1)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # the system takes a moment
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupted_part_may_write_what_it_has(run):
    script = "try: time.sleep(300)\nexcept KeyboardInterrupt: piece.write_text(json.dumps({'half': 2}))"
    found = run(script, 2)
    assert (found["status"], found["half"]) == ("stopped", 2)


def test_a_smoke_run_sees_no_gpu_and_a_part_is_no_worker_of_another_pytest(run, monkeypatch):
    """pytest-benchmark refuses to measure in a worker."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script = "piece.write_text(json.dumps(dict(os.environ)))"
    found = run(script, smoke=True)
    assert (found["CUDA_VISIBLE_DEVICES"], found["TRITON_INTERPRET"]) == ("", "1")
    assert not [name for name in found if name.startswith("PYTEST_")]
    assert "TRITON_INTERPRET" not in run(script)


def test_a_part_hears_the_interrupt_where_the_report_does_not(tmp_path):
    """Started by nohup or in a shell's background, all of them would ignore it."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); from report import environment, worker\n"
        "environment.run = lambda job: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        f"sys.argv[1:] = ['environment', '--piece', {str(tmp_path / 'p')!r}, '--folder', '.', '--seconds', '9']\n"
        "worker.main()"
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
import pytest
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_right(record_property): record_property("us_a_launch", 7.5)
def test_wrong(): assert 1 == 2, "one is not two"
def test_unready(broken): pass
def test_left_out(): pytest.skip("so")
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


@pytest.mark.parametrize("more", [[], ["-n", "2"]], ids=["alone", "workers"])
def test_outcomes_are_counted(more, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    command = [sys.executable, "-c", COUNT, str(tmp_path), str(tmp_path), *more]
    done = subprocess.run(command, env=runner.environment_of(True), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "piece.json").read_text())
    assert [found[count] for count in ("passed", "failed", "skipped", "collected", "not_run")] == [1, 2, 1, 4, 0]
    reasons = {failure["test"].rpartition("test_")[2]: failure["reason"] for failure in found["failures"]}
    assert reasons["broken.py"] == "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert reasons["wrong"].startswith("AssertionError: one is not two")
    assert reasons["unready"] == "ValueError: no fixture"
    assert [each["us_a_launch"] for each in found["noted"]] == [7.5]


def test_no_tests_is_a_failure(job, monkeypatch):
    monkeypatch.setattr(tests.pytest, "main", lambda *arguments, **named: 5)
    with pytest.raises(RuntimeError, match="pytest found no tests and ended with 5"):
        tests.run(job, Part("tests", 1, "", ("tests",)))


def test_benchmarks_come_in_order_and_end_with_the_time(job):
    def item(way, rows):
        return SimpleNamespace(callspec=SimpleNamespace(params={"way": way, "rows": rows}))

    items = [item(way, rows) for rows in (1, 16, 8) for way in ("kernel", "chained", "eager", "compiled")]
    collector, session = kernels.Collector(job), SimpleNamespace(shouldstop=False)
    collector.pytest_collection_modifyitems(items)
    ordered = [(item.callspec.params["way"], item.callspec.params["rows"]) for item in items]
    assert ordered[:4] == [("kernel", 1), ("eager", 1), ("kernel", 8), ("eager", 8)]
    assert ordered[6:] == [*(("chained", rows) for rows in (1, 8, 16)), *(("compiled", rows) for rows in (1, 8, 16))]
    collector.pytest_sessionstart(session)
    collector.pytest_runtest_logfinish("", ())
    assert not session.shouldstop
    job.deadline = 0
    collector.pytest_runtest_logfinish("", ())
    assert session.shouldstop


# ---- the page


def piece(**values):
    return {"status": "done", "seconds": 1.0, "limit": 2.0, "date": "today", "commit": "abc", **values}


def report_of(**found):
    return {"gpu": "NVIDIA H200", "smoke": False, "command": "c", "date": "today", "commit": "abc", "parts": found}


@pytest.mark.parametrize("name", [*dict.fromkeys((*FIRST_NAMES, *NAMES)), PAIR.name])
def test_a_part_that_found_nothing_spoils_no_page(name, tmp_path):
    report = report_of(**{name: piece(status="failed", output=["Traceback", "RuntimeError: boom", ""])})
    assert list(complaints(report)) == [f"{name} failed: RuntimeError: boom"]
    assert draw(report, tmp_path) == ({}, [])
    text = page(report, {})
    assert f"- {name} failed: RuntimeError: boom" in text
    assert text.startswith("# NVIDIA H200\n")
    assert SMOKE_LABEL not in text


def test_everything_wrong_is_told():
    found = report_of(
        tests=piece(failures=[{"test": "tests/x.py::test_y", "reason": "E  1 != 2"}]),
        decode=piece(
            cells=[{"model": "m", "context": 8, "way": "plain", "error": "OutOfMemoryError"}],
            steps=[{"model": "m", "context": 8, "drafts": 6, "drafting": "in one kernel", "error": "lost"}],
        ),
        pair=piece(total={"identical": False}),
    )
    assert list(complaints(found)) == [
        "tests: tests/x.py::test_y failed: E  1 != 2",
        "decode, m, 8, plain: OutOfMemoryError",
        "decode, m, 8, 6, in one kernel: lost",
        "pair: Kangaroo's tokens differ from plain decoding's.",
    ]
    assert state_of(piece(status="stopped", not_run=3)) == "stopped at its limit of 2 s, 3 not reached"
    assert state_of(piece(cells=[{"skipped": "no time left"}, {"us": 1}])) == "done, 1 not reached"


def test_decodes_are_set_against_plain_decoding_and_the_ceiling():
    cells = [
        {"model": "m|n", "context": 128, "way": "plain", "tokens_per_second": 100.0, "bytes_per_token": 2 * 10**10},
        {"model": "m|n", "context": 128, "way": "kangaroo", "tokens_per_second": 150.0, "joules_per_token": 2.0},
    ]
    text = page(report_of(environment=piece(ceiling={"read": 4000.0}), decode=piece(cells=cells)), {})
    assert r"| m\|n | 128 | plain | 100.0 | 1.00 | 50.0 % | - | - |" in text, "a bar in a name ends no column"
    assert r"| m\|n | 128 | kangaroo | 150.0 | 1.50 | - | - | 2.00 |" in text


def test_times_of_pytorch_are_set_against_the_kernel(tmp_path):
    cell = {"model": "m", "op": "attention", "role": "kv", "length": 2048, "gigabytes_per_second": 900.0}
    cells = [
        cell | {"rows": 1, "way": "kernel", "us": {"p50": 10.0}, "share_of_ceiling": 0.9},
        cell | {"rows": 8, "way": "kernel", "us": {"p50": 11.0}, "share_of_ceiling": 0.8},
        cell | {"rows": 1, "way": "eager", "us": {"p50": 25.0}, "share_of_ceiling": 0.4},
    ]
    report = report_of(kernels=piece(cells=cells))
    assert "| m | attention 2048 | 10.0 | 900 | 90.0 % | 11.0 | - | 2.50 | - |" in page(report, {})
    assert draw(report, tmp_path) == ({"kernels": "kernels.png"}, [])


# ---- on a GPU


@pytest.mark.gpu
def test_one_part_on_the_card(tmp_path):
    command = [sys.executable, str(TOOLS / "gpu_report.py"), "--only", "environment", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["gpu"] == torch.cuda.get_device_name()
    assert report["parts"]["environment"]["ceiling"]["read"] > 50
    assert "label" not in report
