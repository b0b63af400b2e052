"""The report on a rented GPU: each part runs (tiny, on the CPU), none spoils the others, it says what it saw."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gpu_report
import typer
from iteration_profile import Event, StageRun
from random_model import config_of, exit_layer_of, random_drafter, random_target
from report import baselines, decode, energy, equality, kernels, pair, plots, runner, worker
from report.decode import bytes_a_token
from report.job import SMOKE, Job
from report.page import SMOKE_LABEL, complaints, page, state_of, table
from report.parts import PAIR, PARTS, Part, budgets, choose
from report.plots import draw
from report.runner import run_part
from report.timeline import events_of
from synthetic import MAX_DRAFTS, Trace, conditional_rate, paper_trace, with_synthetic_acceptance

from kangaroo_kernels import DecodeStats, Kangaroo
from kangaroo_kernels.contract import Top1
from kangaroo_kernels.model import generate
from kangaroo_kernels.model.backend import REFERENCES
from kangaroo_kernels.model.demo import PAIR as DEMO_PAIR
from kangaroo_kernels.workloads import MODELS, TINY, workloads

TOOLS = Path(__file__).resolve().parent.parent / "tools"
NAMES = [part.name for part in PARTS]
CPU = torch.device("cpu")
RESIDENT = replace(REFERENCES, kernels="triton")
"""The loop of the kernels on the references: quick."""


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "piece.json", tmp_path, 60.0, smoke=True)


# ---- the whole command


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder in which the command has run twice: all parts, then a pair."""
    folder = tmp_path_factory.mktemp("report")
    command = [sys.executable, str(TOOLS / "gpu_report.py"), "--smoke", "--out", str(folder)]
    runs = [
        subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        for more in ([], ["--pair", str(DEMO_PAIR)])
    ]
    for run in runs:
        assert run.returncode == 0, run.stderr
    return SimpleNamespace(folder=folder, errors=[run.stderr for run in runs])


@pytest.fixture(scope="module")
def report(smoke):
    return json.loads((smoke.folder / "report.json").read_text())


def test_every_part_has_run(report):
    assert list(report["parts"]) == [*NAMES, "pair"]
    assert {name: piece["status"] for name, piece in report["parts"].items()} == dict.fromkeys([*NAMES, "pair"], "done")
    assert complaints(report) == []


def test_the_plan_comes_first(smoke):
    plan, done, _ = smoke.errors[0].partition(" s  done")
    assert done
    assert all(f"{part.name} " in plan for part in PARTS)


def test_figures_of_a_cpu_say_so(smoke, report):
    assert report["label"] == SMOKE_LABEL
    assert report["gpu"] is None
    text = (smoke.folder / "report.md").read_text()
    assert f"**{SMOKE_LABEL}**" in text
    assert text.count(f"({SMOKE_LABEL})](") == 4


def test_pictures_are_there(smoke):
    text = (smoke.folder / "report.md").read_text()
    for name in ("roofline.png", "decode.png", "timeline.png", "pair.png"):
        assert (smoke.folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_pieces_say_where_they_come_from(report):
    for name, piece in report["parts"].items():
        assert piece["commit"]
        assert piece["date"].endswith("UTC")
        assert piece["command"].startswith("python tools/gpu_report.py --smoke --out")
        assert ("--pair" in piece["command"]) == (name in ("environment", "pair")), (
            "the other parts are kept as they were"
        )


def test_decodes_are_measured(report):
    cells = {cell["way"]: cell for cell in report["parts"]["decode"]["cells"]}
    assert set(cells) == {"plain", "kangaroo", "kangaroo, synthetic"}
    assert all(cell["tokens_per_second"] > 0 for cell in cells.values())
    assert cells["kangaroo, synthetic"]["drafted_per_step"] > 0
    assert "synthetic" in report["parts"]["decode"]["synthetic"]["assumption"]
    steps = [(step["drafts"], step["drafting"]) for step in report["parts"]["decode"]["steps"]]
    ways = ("kernel by kernel", "kernel by kernel, chained", "in one kernel")
    assert steps == [
        *((drafts, way) for drafts in (1, 2, 6) for way in ways[:2]),
        *((drafts, ways[2]) for drafts in (1, 2, 6)),
    ]
    assert all(step["us_per_step"] > 0 for step in report["parts"]["decode"]["steps"])
    theirs = [cell["way"] for cell in report["parts"]["baselines"]["cells"]]
    assert theirs == ["eager", "assisted", "static, compiled"]


def test_tests_and_benchmarks_are_counted(report):
    counted, measured = report["parts"]["tests"], report["parts"]["kernels"]
    assert counted["passed"] == counted["collected"] > 20
    assert counted["not_run"] == measured["not_run"] == 0
    assert {cell["op"] for cell in measured["cells"]} == {"gate_up", "attention"}
    assert all(cell["us"] > 0 and cell["relative_error"] < 1e-5 for cell in measured["cells"])


def test_the_pair_is_the_real_thing(report):
    total = report["parts"]["pair"]["total"]
    assert total["identical"]
    assert total["mean_acceptance_length"] > 1.3
    assert len(total["acceptance_rate_per_position"]) >= 2


def test_the_pair_stands_beside_transformers(smoke, report):
    found = report["parts"]["pair"]
    assert found["ways"] == [baselines.EAGER, baselines.COMPILED]
    assert [total["prompts"] for total in found["baselines"]] == [2, 2]
    for cell in found["cells"]:
        assert cell["agreeing_tokens"] == cell["new_tokens"] == 24, "float32 on a CPU: the same text"
        assert cell["tokens_per_second"] > 0
    assert "transformers, static, compiled" in (smoke.folder / "report.md").read_text()


def test_equality_compares_each_kind(report):
    assert [cell["what"] for cell in report["parts"]["equality"]["cells"]] == [
        "operations",
        "rows of a verification",
        "decodes",
        "decodes, drafting in one kernel",
    ]
    assert all("equal" in cell for cell in report["parts"]["equality"]["cells"])


def test_a_stage_of_every_kind_is_in_the_timeline(report):
    lanes = {event["lane"] for event in report["parts"]["timeline"]["events"]}
    assert {"draft 1", f"draft {MAX_DRAFTS}", "last row", "verify", "commit"} <= lanes


# ---- the command's errors


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
    ],
)
def test_a_mistake_gets_one_sentence(arguments, message, tmp_path):
    (tmp_path / "file").touch()
    app = typer.Typer()
    app.command()(gpu_report.main)
    done = CliRunner().invoke(app, [argument.replace("DIR", str(tmp_path)) for argument in arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("gpu_report: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_help_names_the_parts():
    app = typer.Typer()
    app.command()(gpu_report.main)
    said = CliRunner().invoke(app, ["--help"], terminal_width=200).stdout
    assert all(name in said.partition("--only")[2].partition("--pair")[0] for name in (*NAMES, "pair"))


def test_without_a_gpu_it_says_what_helps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(gpu_report.main)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2
    assert "--smoke --out DIR runs it without one." in done.stderr


# ---- what the command makes of its parts


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
    app = typer.Typer()
    app.command()(gpu_report.main)

    def call(*arguments):
        given.clear()
        done = CliRunner().invoke(app, ["--smoke", "--out", str(tmp_path), *arguments])
        report = json.loads((tmp_path / "report.json").read_text())
        return SimpleNamespace(code=done.exit_code, errors=done.stderr, report=report, given=list(given))

    call.found = found
    return call


def test_what_one_part_leaves_the_next_ones_have(command):
    given = command("--minutes", "10").given
    assert [name for name, _ in given] == NAMES
    assert given[0][1] == pytest.approx(budgets(PARTS, 580)[0], abs=5)
    assert given[-1][1] == pytest.approx(580, abs=10), "the last part may have all that is left"


def test_parts_that_are_not_run_again_are_kept(command):
    command.found["tests"] = {"failures": [{"test": "t", "reason": "r"}]}
    assert command().code == 1
    command.found["decode"] = {"ways": ["new"]}
    again = command("--only", "decode")
    assert list(again.report["parts"]) == NAMES
    assert again.report["parts"]["tests"]["failures"]
    assert again.report["parts"]["decode"]["ways"] == ["new"]
    assert again.code == 0, "what was wrong before is no news"


def test_another_gpus_parts_are_not_kept(command, tmp_path):
    command()
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gpu": "another"}))
    assert list(command("--only", "decode").report["parts"]) == ["decode"]


def test_a_failure_ends_with_a_sentence_and_status_1(command):
    command.found["equality"] = {"status": "failed", "output": ["Killed"]}
    done = command()
    assert done.code == 1
    assert [name for name, _ in done.given] == NAMES
    assert "gpu_report: equality failed: Killed\n" in done.errors


def test_ctrl_c_keeps_what_was_found(command):
    command.found["equality"] = KeyboardInterrupt()
    done = command()
    assert done.code == 130
    assert list(done.report["parts"]) == NAMES[:2]


def test_ctrl_c_in_a_part_keeps_what_that_found(command):
    command.found["decode"] = {"status": "interrupted", "cells": [], "at": "m, 128, plain"}
    done = command()
    assert done.code == 130
    assert list(done.report["parts"]) == NAMES[: NAMES.index("decode") + 1]


def test_a_part_that_was_stopped_is_told(command):
    command.found["tests"] = {"status": "stopped", "limit": 85.0, "at": "7 of 300"}
    done = command("--only", "tests")
    assert done.code == 1
    assert "gpu_report: tests did not end within its 85 s and was stopped (at: 7 of 300).\n" in done.errors


def test_a_picture_that_cannot_be_drawn_spoils_no_page(command, tmp_path, monkeypatch):
    def broken(report, path):
        raise ValueError("an axis with no end\nand more")

    monkeypatch.setitem(plots.PLOTS, "decode", ("decode.png", broken))
    done = command()
    assert done.code == 1
    assert "gpu_report: decode.png could not be drawn: ValueError: an axis with no end.\n" in done.errors
    assert (tmp_path / "report.md").is_file()


def test_results_are_no_change_of_the_commit(tmp_path, monkeypatch):
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
    source.write_text("2")
    assert gpu_report.commit().endswith(" with changes")


def test_without_git_the_sources_are_named_by_a_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "git", lambda *arguments: "")
    digests = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2"), ("b.txt", "")):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        digests.append(gpu_report.digest_of_sources(tmp_path))
    assert len(set(digests)) == 3
    assert digests[3] == digests[2]
    assert gpu_report.commit() == f"unknown, sources {gpu_report.digest_of_sources()}"


def test_a_report_that_is_ended_writes_what_it_has(tmp_path):
    """As ``timeout`` ends it: by SIGTERM."""
    command = [sys.executable, str(TOOLS / "gpu_report.py"), "--smoke", "--out", str(tmp_path), "--only", "equality"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "equality" not in process.stderr.readline():  # the plan, just before the part begins
            assert process.poll() is None
        time.sleep(3)  # while the part still imports PyTorch
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert json.loads((tmp_path / "report.json").read_text())["parts"]["equality"]["status"] == "interrupted"
    assert "| equality | interrupted |" in (tmp_path / "report.md").read_text()


def test_without_time_nothing_is_begun(command):
    done = command("--minutes", "0.04")
    assert done.given == []
    assert {piece["status"] for piece in done.report["parts"].values()} == {"skipped"}
    assert "no time left" in done.errors


def test_without_matplotlib_there_are_no_plots(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "report.plots", None)
    done = command()
    assert done.code == 1
    assert "no plots: " in done.errors
    assert (tmp_path / "report.md").is_file()


# ---- parts and their time


def test_parts_keep_their_order():
    assert [part.name for part in choose(["decode", "environment"], False)] == ["environment", "decode"]
    assert [part.name for part in choose(None, False)] == NAMES
    assert [part.name for part in choose(None, True)] == ["environment", "pair"]
    assert choose(["pair"], True) == [PAIR]


def test_the_time_is_shared_out_and_what_is_left_goes_on():
    shares = budgets(PARTS, 500)
    assert sum(shares) == pytest.approx(500)
    assert shares[4] / shares[0] == pytest.approx(PARTS[4].share / PARTS[0].share)
    assert budgets(PARTS[-1:], 70) == [70]
    assert budgets(PARTS, -3) == [0] * len(PARTS)


def test_every_part_has_a_module():
    for part in (*PARTS, PAIR):
        assert (TOOLS / "report" / f"{part.name}.py").is_file()


# ---- a part's process


SCRIPT = """
import json, pathlib, signal, subprocess, sys, time
piece = pathlib.Path(sys.argv[sys.argv.index("--piece") + 1])
piece.write_text(json.dumps({"half": 1, "doing": "something"}))
"""


def run(script, tmp_path, monkeypatch, seconds=0.5, **more):
    monkeypatch.setattr(runner, "GRACE", 0.5)
    command = (sys.executable, "-c", SCRIPT + script)
    return run_part(Part("decode", 1, ""), seconds, tmp_path, command=command, **more)


def test_a_part_that_ends_is_done(tmp_path, monkeypatch):
    found = run("", tmp_path, monkeypatch, seconds=30)
    assert (found["status"], found["half"]) == ("done", 1)
    assert "doing" not in found
    assert "at" not in found


def test_ctrl_c_ends_a_part_and_keeps_what_it_found(tmp_path, monkeypatch):
    def interrupt(doing):
        if doing:
            raise KeyboardInterrupt

    found = run("time.sleep(300)", tmp_path, monkeypatch, seconds=60, update=interrupt)
    assert (found["status"], found["half"], found["at"]) == ("interrupted", 1, "something")


def test_a_crash_keeps_what_was_found_and_the_last_words(tmp_path, monkeypatch):
    found = run(
        "print('on stdout', flush=True); raise SystemExit('CUDA error: out of luck')", tmp_path, monkeypatch, 30
    )
    assert (found["status"], found["half"], found["exit_status"]) == ("failed", 1, 1)
    assert found["output"] == ["on stdout", "CUDA error: out of luck"]
    assert found["at"] == "something"
    wanted = "decode failed (at: something): CUDA error: out of luck"
    assert complaints(report_of(decode=found)) == [wanted]


def test_a_killed_part_has_failed(tmp_path, monkeypatch):
    found = run("import os; os.kill(os.getpid(), signal.SIGKILL)", tmp_path, monkeypatch, 30)
    assert (found["status"], found["exit_status"]) == ("failed", -signal.SIGKILL)


@pytest.mark.parametrize("ignore", ["", "signal.signal(signal.SIGINT, signal.SIG_IGN);"])
def test_a_part_that_hangs_is_ended_with_its_children(ignore, tmp_path, monkeypatch):
    script = f"""
{ignore}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(300)
"""
    found = run(script, tmp_path, monkeypatch, seconds=3)
    assert (found["status"], found["half"]) == ("stopped", 1)
    assert "output" not in found
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


def test_an_interrupted_part_may_write_what_it_has(tmp_path, monkeypatch):
    script = """
try:
    time.sleep(300)
except KeyboardInterrupt:
    piece.write_text(json.dumps({"half": 2}))
"""
    found = run(script, tmp_path, monkeypatch, seconds=2)
    assert (found["status"], found["half"]) == ("stopped", 2)


def test_a_part_hears_the_interrupt_where_the_report_does_not(tmp_path, monkeypatch):
    """Started by nohup or in a shell's background, all of them would ignore it."""
    heard = []
    part = SimpleNamespace(run=lambda job: heard.append(signal.getsignal(signal.SIGINT)))
    monkeypatch.setitem(sys.modules, "report.listening", part)
    arguments = ["listening", "--piece", str(tmp_path / "piece"), "--folder", str(tmp_path), "--seconds", "9"]
    monkeypatch.setattr(sys, "argv", ["worker", *arguments])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.default_int_handler]


def test_a_part_is_no_worker_of_another_pytest(tmp_path, monkeypatch):
    """pytest-benchmark refuses to measure in a worker."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    script = """
import os
piece.write_text(json.dumps({"names": [name for name in os.environ if name.startswith("PYTEST_")]}))
"""
    assert run(script, tmp_path, monkeypatch, seconds=30)["names"] == []


def test_a_smoke_run_sees_no_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script = """
import os
piece.write_text(json.dumps({name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")}))
"""
    found = run(script, tmp_path, monkeypatch, seconds=30, smoke=True)
    assert (found["CUDA_VISIBLE_DEVICES"], found["TRITON_INTERPRET"]) == ("", "1")
    assert run(script, tmp_path, monkeypatch, seconds=30)["TRITON_INTERPRET"] is None


def test_progress_is_told(tmp_path, monkeypatch):
    told = []
    run("time.sleep(1)", tmp_path, monkeypatch, seconds=30, update=told.append)
    assert told[-1] == "something"


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


# ---- the page


def piece(**values):
    return {"status": "done", "seconds": 1.0, "limit": 2.0, "date": "today", "commit": "abc", **values}


def report_of(**found):
    return {"gpu": "NVIDIA H200", "smoke": False, "command": "c", "date": "today", "commit": "abc", "parts": found}


@pytest.mark.parametrize("name", [*NAMES, "pair"])
def test_a_part_that_found_nothing_spoils_no_page(name, tmp_path):
    broken = piece(status="failed", output=["Traceback", "RuntimeError: boom", ""])
    report = report_of(**{name: broken})
    assert complaints(report) == [f"{name} failed: RuntimeError: boom"]
    assert draw(report, tmp_path) == ({}, [])
    text = page(report, {})
    assert f"- {name} failed: RuntimeError: boom" in text
    assert text.startswith("# NVIDIA H200\n")
    assert SMOKE_LABEL not in text


def test_everything_wrong_is_told():
    found = report_of(
        tests=piece(failures=[{"test": "tests/x.py::test_y", "reason": "E  1 != 2"}]),
        equality=piece(cells=[{"model": "m", "what": "decodes", "equal": False, "differing": ["6 drafts"]}]),
        decode=piece(
            cells=[{"model": "m", "context": 8, "way": "plain", "error": "OutOfMemoryError"}],
            steps=[{"model": "m", "context": 8, "drafts": 6, "drafting": "in one kernel", "error": "lost"}],
        ),
        pair=piece(total={"identical": False}),
    )
    assert complaints(found) == [
        "tests: tests/x.py::test_y failed: E  1 != 2",
        "equality, m, decodes: not equal: 6 drafts",
        "decode, m, 8, plain: OutOfMemoryError",
        "decode, m, 8, 6, in one kernel: lost",
        "pair: Kangaroo's tokens differ from plain decoding's.",
    ]
    found["smoke"] = True  # the interpreter's rows may differ
    assert len(complaints(found)) == 4


def test_a_state_says_what_is_missing():
    assert state_of(piece()) == "done"
    assert state_of(piece(status="stopped", not_run=3)) == "stopped at its limit of 2 s, 3 not reached"
    assert state_of(piece(cells=[{"skipped": "no time left"}, {"us": 1}])) == "done, 1 not reached"


def test_a_bar_in_a_figure_ends_no_column():
    cells = [{"model": "m", "what": "decodes", "equal": False, "differing": ["a | b"]}]
    assert "| not equal: a \\| b |" in page(report_of(equality=piece(cells=cells)), {})


def test_figures_are_aligned_right_and_texts_left():
    cells = [{"model": "m", "context": 128, "way": "plain", "tokens_per_second": 9.5, "joules_per_token": None}]
    cells += [{"model": "m2", "context": 2048, "way": "plain", "tokens_per_second": None}]
    text = page(report_of(decode=piece(ways=["plain"], cells=cells, status="failed", output=["boom"])), {})
    assert "| part | state | seconds | date | commit |\n| --- | --- | ---: | --- | --- |\n" in text
    assert "| model | context | plain | of the ceiling |\n| --- | ---: | ---: | ---: |\n" in text
    assert table(("share", "same"), [("5.0 %", "7 of 24"), ("-", "-")])[1] == "| ---: | ---: |"
    assert table(("", ""), [("driver", "570.1"), ("CPU", "Zen 4")])[1] == "| --- | --- |"


@pytest.mark.parametrize("smoke", [False, True])
def test_a_smoke_run_has_no_figures_for_ways_that_are_the_same_references(smoke):
    ways = ("kernel by kernel", "kernel by kernel, chained", "in one kernel")
    steps = [
        {"model": "m", "context": 128, "drafts": 6, "drafting": way, "us_per_step": 5.0 + index}
        for index, way in enumerate(ways)
    ]
    text = page(report_of(decode=piece(ways=["plain"], steps=steps)) | {"smoke": smoke}, {})
    assert all(f"us a step, drafting {way} |" in text for way in ways)
    assert ("| m | 128 | 6 | 5.0 | - | - |" if smoke else "| m | 128 | 6 | 5.0 | 6.0 | 7.0 |") in text
    assert ("the same references" in text) == smoke


def test_texts_are_not_compared_in_vain_unseen():
    runs = [{"settings": "s", "mean_acceptance_length": length} for length in (2.5, 1.0)]
    cells = [
        {"model": "m", "what": "operations", "equal": True, "compared": 7},
        {"model": "m", "what": "decodes", "equal": True, "compared": 2, "runs": runs},
    ]
    text = page(report_of(equality=piece(cells=cells)), {})
    assert "| m | operations | 7 | equal | - |" in text
    assert "| m | decodes | 2 | equal | 1.00 to 2.50 |" in text


def test_figures_say_what_they_are():
    """Assumed acceptance, the context of the steps, what stands for a kernel on a CPU, and energy's roughness."""
    cells = [
        {"model": "m", "context": 128, "way": "kangaroo, synthetic", "tokens_per_second": 9.0, "joules_per_token": 2.0}
    ]
    steps = [{"model": "m", "context": 128, "drafts": 6, "drafting": "in one kernel", "us_per_step": 5.0}]
    kernel = {"model": "m", "op": "gate_up", "role": "gate_up", "length": 8, "rows": 1, "way": "reference", "us": 3.0}
    ways = ["plain", "kangaroo", "kangaroo, synthetic"]
    found = report_of(decode=piece(ways=ways, cells=cells, steps=steps), kernels=piece(cells=[kernel]))
    text = page(found, {})
    assert (
        "| model | context | plain | of the ceiling | Kangaroo, unforced | x plain | Kangaroo, synthetic acceptance |"
        in text
    )
    assert text.index("Tokens a second of the steps") < text.index("| model | context | plain")
    assert "| m | 128 | 6 | 5.0 |" in text
    assert "| m | 128 | Kangaroo, synthetic acceptance | 2.00 |" in text
    assert "rough for short decodes" in text
    assert "The PyTorch references at small shapes" in text
    kernel["way"] = "kernel"
    assert "references" not in page(found, {})


@pytest.mark.parametrize("smoke", [False, True])
def test_a_picture_says_where_it_comes_from(smoke, monkeypatch, tmp_path):
    titles = []
    monkeypatch.setattr(plots.plt.Figure, "suptitle", lambda figure, text, **style: titles.append(text))
    events = [{"lane": "draft 1", "name": "gate_up", "start": 0.0, "us": 2.0, "skipped": False}]
    cells = [{"model": "m", "context": 8, "way": "plain", "tokens_per_second": 9.0, "slowest": 8.0, "fastest": 9.5}]
    report = report_of(
        decode=piece(ways=["plain"], cells=cells),
        timeline=piece(events=events, us=2.0, busy_us=2.0, model="m", context=8),
        pair=pair_piece(),
    )
    drawn, trouble = draw(report | {"smoke": smoke}, tmp_path)
    assert trouble == []
    assert list(drawn) == ["decode", "timeline", "pair"]
    if smoke:
        assert titles == [SMOKE_LABEL] * 3
    else:
        assert all(title.startswith("NVIDIA H200: ") for title in titles)
        assert "random weights" in titles[0]
        assert "synthetic acceptance" in titles[1]
        assert "held-out prompts" in titles[2]


def test_the_share_of_the_ceiling_is_that_of_the_bytes():
    cells = [
        {"model": "m", "context": 128, "way": "plain", "tokens_per_second": 100.0, "bytes_per_token": 2 * 10**10},
        {"model": "m", "context": 128, "way": "kangaroo", "tokens_per_second": 150.0},
    ]
    found = report_of(
        environment=piece(ceilings={"read_gigabytes_per_second": 4000.0}),
        decode=piece(ways=["plain", "kangaroo"], cells=cells),
    )
    assert "| m | 128 | 100.0 | 50.0 % | 150.0 | 1.50 |" in page(found, {})


def test_times_of_pytorch_are_set_against_the_kernel():
    cell = {"model": "m", "op": "attention", "role": "kv", "length": 2048, "gigabytes_per_second": 900.0}
    cells = [
        cell | {"rows": 1, "way": "kernel", "us": 10.0, "share_of_ceiling": 0.9},
        cell | {"rows": 8, "way": "kernel", "us": 11.0, "share_of_ceiling": 0.8},
        cell | {"rows": 1, "way": "eager", "us": 25.0, "share_of_ceiling": 0.4},
    ]
    wanted = "| m | attention 2048 | 10.0 | 900 | 90.0 % | 11.0 | 2.50 | - |"
    assert wanted in page(report_of(kernels=piece(cells=cells)), {})


# ---- synthetic acceptance


def test_the_rate_gives_the_mean():
    assert conditional_rate(1.93, 6) == pytest.approx(0.485, abs=5e-4)
    for mean, drafts in ((1.0, 6), (1.93, 6), (2.5, 3), (4.0, 3)):
        rate = conditional_rate(mean, drafts)
        assert sum(rate**position for position in range(drafts + 1)) == pytest.approx(mean, abs=1e-6)
    with pytest.raises(ValueError, match="is not between 1 and 4"):
        conditional_rate(4.1, 3)


def test_the_trace_has_the_papers_mean():
    trace = paper_trace()
    assert trace.mean_acceptance_length == pytest.approx(1.93, abs=1e-3)
    for position in range(1, MAX_DRAFTS + 1):
        share = float((trace.agreed >= position).double().mean())
        assert share == pytest.approx(conditional_rate(1.93, 6) ** position, abs=0.5 / len(trace.agreed))
    assert torch.equal(trace.drafted, (trace.agreed + 1).clamp(max=MAX_DRAFTS))
    assert torch.equal(trace.agreed, paper_trace().agreed)
    neighbours = torch.corrcoef(torch.stack((trace.agreed[1:], trace.agreed[:-1])).double())[0, 1]
    assert abs(float(neighbours)) < 0.2, "the steps are shuffled"
    assert trace.tokens == int((trace.agreed + 1).sum())


@pytest.mark.parametrize(
    ("operations", "lag"), [(RESIDENT, 0), (RESIDENT, 2), (None, 0)], ids=["references", "host lags", "kernels"]
)
def test_a_decode_follows_the_trace(operations, lag, device, monkeypatch):
    """Also across its end, across decodes, and into the limit, which cuts the last step short.

    A host that reads late launches iterations beyond the limit; they take no step of the trace.
    """
    loop = generate.device_steps
    monkeypatch.setattr(generate, "device_steps", lambda *args, **named: loop(*args, **named, lag=lag))
    agreed = torch.tensor([0, 3, 1, 2, 0])
    trace = Trace((agreed + 1).clamp(max=3), agreed)
    target = random_target(SMOKE, device if operations is None else CPU, torch.float32, operations=operations)
    forced = with_synthetic_acceptance(target, trace, 3)
    kangaroo = Kangaroo(forced, random_drafter(forced, 1))

    def steps(tokens):
        progress = kangaroo.progress([5, 6, 7], max_new_tokens=tokens, num_speculative_tokens=3)
        return [(len(step.commit.tokens), step.commit.agreed, step.commit.drafted) for step in progress]

    whole = [(1, 0, 1), (4, 3, 3), (2, 1, 2), (3, 2, 3), (1, 0, 1)]
    rounds = 2 if operations is not None else 1
    assert steps(11 * rounds)[:-1] == (whole * rounds)[:-1]
    assert steps(4) == [(1, 0, 1), (3, 2, 2)], "the trace begins again, and the limit cuts"


def test_a_step_that_is_skipped_leads_to_no_other():
    target = random_target(SMOKE, CPU, torch.float32, operations=RESIDENT)
    forced = with_synthetic_acceptance(target, Trace(torch.tensor([3]), torch.tensor([2])), 3)
    weights, state = target.weights, torch.ones(1, SMOKE.hidden)
    for active in (1, 0):
        flags = torch.tensor([active, 7], dtype=torch.int32)
        settings = {"eps": 1e-5, "threshold": 1.0, "active": flags[:1], "sure": flags[1:]}
        forced.operations.top1_head(state, weights.norm, weights.head, **settings)
        assert flags[1] == active


def test_plain_decoding_is_left_alone():
    target = random_target(SMOKE, CPU, torch.float32, operations=RESIDENT)
    forced = with_synthetic_acceptance(target, paper_trace())
    runs = [Kangaroo(one).generate([5, 6, 7], max_new_tokens=9, plain=True) for one in (target, forced)]
    assert runs[0].tokens == runs[1].tokens
    assert len(runs[0].tokens) == 9


# ---- random models


def test_states_stay_near_one_through_many_layers():
    shape = TINY._replace(layers=32)
    target = random_target(shape, CPU, torch.bfloat16, operations=REFERENCES)
    assert {tensor.dtype for tensor in (target.weights.embedding, target.weights.head.rows)} == {torch.bfloat16}
    cache = target.new_cache()
    cache.reserve(64)
    with torch.inference_mode():
        hidden = target.run(target.embed(list(range(64))), cache, 0, 0, shape.layers)
        logits = target.logits(hidden)
    assert 0.5 < float(hidden.float().std()) < 4
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3


def test_a_random_model_has_its_shape():
    for shape in MODELS:
        config = config_of(shape, torch.bfloat16)
        assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
            shape.hidden,
            shape.layers,
            shape.vocab_size,
        )
        assert config.eos_token_ids == ()
    assert [exit_layer_of(shape) for shape in MODELS] == [2, 2, 1]
    ours, again, other = (
        random_target(SMOKE, CPU, torch.float32, operations=REFERENCES, seed=seed).weights for seed in (0, 0, 1)
    )
    assert torch.equal(ours.layers[1].down.rows, again.layers[1].down.rows)
    assert not torch.equal(ours.layers[1].down.rows, other.layers[1].down.rows)
    assert not torch.equal(ours.layers[0].down.rows, ours.layers[1].down.rows)


def test_quiet_layers_let_drafts_be_right():
    lengths = []
    for quiet in (0.05, 1.0):
        shape = TINY._replace(layers=8, vocab_size=300)
        target = random_target(shape, CPU, torch.float32, operations=RESIDENT, quiet=quiet)
        kangaroo = Kangaroo(target, random_drafter(target, 1))
        stats = kangaroo.generate([1, 2, 3], max_new_tokens=60, draft_confidence_threshold=0.0).stats
        lengths.append(stats.mean_acceptance_length)
    assert lengths[0] > max(2.0, 1.3 * lengths[1])


def test_bytes_of_a_token_are_those_of_the_weights():
    target = random_target(SMOKE, CPU, torch.float32, operations=REFERENCES)
    weights = target.weights
    matrices = [weights.head.rows]
    for layer in weights.layers:
        matrices += [layer.attention.qkv.rows, layer.attention.output.rows, layer.gate_up.rows, layer.down.rows]
    cache = target.new_cache()
    cache.reserve(64)
    cached = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    assert bytes_a_token(target, 64) == sum(matrix.nbytes for matrix in matrices) + cached


# ---- bit-equality


@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_a_row_that_depends_on_its_neighbours_is_found(shift, job, monkeypatch):
    def written(op, kernel, arguments):
        x = arguments[0][0]
        rows = 2 * x + shift * len(x) * (op == "gate_up")
        if op != "qkv_rope":
            return (rows,)
        appended = x[None, :, :3].expand(2, -1, -1).contiguous()  # [H_kv, M, D]
        return rows, appended, appended

    monkeypatch.setattr(equality, "written", written)
    found = equality.operations_are_equal(job, SMOKE)
    assert found["compared"] == 7
    assert found["differing"] == (["gate_up (gate_up), 2 rows"] if shift else [])
    assert found["equal"] is not bool(shift)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_text_that_differs_is_found(wrong, job):
    def generate(prompt, max_new_tokens, plain=False, **settings):
        tokens = [1] * (max_new_tokens - 1) + [2 if wrong and not plain else 1]
        return SimpleNamespace(tokens=tokens, stats=DecodeStats(8, 4))

    found = equality.decodes_are_equal(job, SimpleNamespace(generate=generate), [1])
    assert found["equal"] is not wrong
    assert found["differing"] == (["temperature 0, 6 drafts, threshold 0"] if wrong else [])
    assert found["runs"][0]["mean_acceptance_length"] == 2


@pytest.mark.parametrize("wrong", ["", "states", "confidences"])
def test_a_verified_row_that_differs_is_found(wrong, job):
    def run(hidden, *where):
        return 2 * hidden + (wrong == "states") * len(hidden)

    def top1_head(hidden, *weights, eps):
        return Top1(hidden.argmax(dim=1), hidden.amax(dim=1) + (wrong == "confidences") * len(hidden))

    target = SimpleNamespace(
        config=config_of(SMOKE, torch.float32),
        weights=SimpleNamespace(norm=None, head=None),
        operations=SimpleNamespace(top1_head=top1_head),
        new_cache=lambda: SimpleNamespace(reserve=lambda length: None),
        embed=lambda tokens: torch.ones(len(tokens), SMOKE.hidden),
        run=run,
        logits=lambda hidden: hidden[:, :5],
    )
    kangaroo = SimpleNamespace(target=target, drafter=SimpleNamespace(exit_layer=1))
    found = equality.rows_are_equal(job, kangaroo, [1, 2, 3])
    differing = {"": [], "states": ["hidden states", "confidences", "logits"], "confidences": ["confidences"]}
    assert found == {"equal": not wrong, "compared": 3, "differing": differing[wrong]}


def test_what_may_take_all_down_comes_last(job, monkeypatch):
    """Drafting in one kernel, behind the last model's other comparisons and steps."""
    monkeypatch.setattr(Job, "models", (SMOKE, SMOKE._replace(name="other")))
    for name in ("operations_are_equal", "rows_are_equal", "decodes_are_equal"):
        monkeypatch.setattr(equality, name, lambda *arguments: {"equal": True})
    monkeypatch.setattr(decode, "measure", lambda *arguments: {})
    monkeypatch.setattr(decode, "measure_step", lambda *arguments: {})
    equality.run(job)
    drafting = [cell["what"].endswith("drafting in one kernel") for cell in job.values.pop("cells")]
    assert drafting == [False] * 6 + [True] * 2
    decode.run(job)
    drafting = [step["drafting"] == "in one kernel" for step in job.values["steps"]]
    assert drafting == [False] * 12 + [True] * 6


# ---- tests, benchmarks and baselines


def test_every_model_is_measured_eagerly_before_anything_is_compiled(job, monkeypatch):
    monkeypatch.setattr(Job, "models", (SMOKE, SMOKE._replace(name="other")))
    monkeypatch.setattr(baselines, "contexts_of", lambda job: (8, 16))
    monkeypatch.setattr(baselines, "transformers_model", lambda shape, job: shape.name)
    monkeypatch.setattr(baselines, "measure", lambda model, prompt, job, **how: {"asked": (model, sorted(how))})
    baselines.run(job)
    cells = [(cell["way"], cell["context"], *cell["asked"]) for cell in job.values["cells"]]
    assert [way for way, *_ in cells] == ["eager"] * 4 + ["assisted"] * 2 + ["static, compiled"] * 4 + ["assisted"] * 2
    assert [context for _, context, *_ in cells[4:]] == [8] * 4 + [16] * 4
    assert cells[0] == ("eager", 8, "smoke", [])
    assert cells[4] == ("assisted", 8, "smoke", ["assistant_model"])
    assert cells[6] == ("static, compiled", 8, "smoke", ["cache_implementation", "disable_compile"])


TESTS = """
import pytest

@pytest.fixture
def broken():
    raise ValueError("no fixture")

def test_right(): pass
def test_wrong():
    assert 1 == 2, "one is not two"
def test_unready(broken): pass
@pytest.mark.skip
def test_left_out(): pass
"""

COUNT = """
import sys
from pathlib import Path
from report import tests
from report.job import Job

tests.SMOKE_TESTS = sys.argv[2:]
tests.run(Job(Path(sys.argv[1]) / "piece.json", Path(sys.argv[1]), 60.0, smoke=True))
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
    assert reasons.keys() == {"broken.py", "wrong", "unready"}
    assert reasons["broken.py"] == "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert reasons["wrong"].startswith("AssertionError: one is not two")
    assert reasons["unready"] == "ValueError: no fixture"


def test_no_tests_is_a_failure(tmp_path):
    command = [sys.executable, "-c", COUNT, str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, env=runner.environment_of(True), capture_output=True, text=True, check=False)
    assert "RuntimeError: pytest found no tests and ended with 5." in done.stderr


class SlowAtFirst:
    """Decodes 300 tokens a second, but for the first time, in which something is compiled."""

    def __init__(self):
        self.asked = []

    def progress(self, prompt, max_new_tokens, plain):
        self.asked.append(max_new_tokens)
        speed = 0.5 if len(self.asked) == 1 else 300.0
        stats = DecodeStats(max_new_tokens, max_new_tokens, decode_seconds=max_new_tokens / speed)
        for tokens in ([1], [1] * max_new_tokens):
            yield SimpleNamespace(generation=SimpleNamespace(tokens=tokens, stats=stats))


@pytest.mark.parametrize(
    ("way", "seconds", "tokens"),
    [("kangaroo", 4, 128), ("kangaroo, synthetic", 4, 247), ("kangaroo", 0.8, 60), ("kangaroo", 0.1, 32)],
)
def test_a_decode_is_as_long_as_the_time_affords(way, seconds, tokens, monkeypatch):
    """A synthetic one sees the whole trace; what the first compilation took counts for nothing."""
    monkeypatch.setattr(decode, "EnergyMeter", lambda device: energy.EnergyMeter(None))
    kangaroo = SlowAtFirst()
    found = decode.measure(kangaroo, [1], way, seconds, SimpleNamespace(smoke=False, device=None))
    assert kangaroo.asked == [16, 16, *[tokens] * 4]
    assert found["new_tokens"] == tokens
    assert found["tokens_per_second"] == pytest.approx(300)
    assert found["us_per_step"] == pytest.approx(1e6 / 300)


def test_flops_of_the_products():
    by_op = {(workload.op, workload.role): workload for workload in workloads(MODELS[0])}
    assert kernels.flops(MODELS[0], by_op["gate_up", "gate_up"], 8, 256) == 2 * 8 * 4096 * 2 * 11008
    assert kernels.flops(MODELS[0], by_op["attention", "kv"], 2, 100) == 2 * (2 * 2 * 100 * 4096)


def test_what_must_be_compiled_comes_last(job):
    def item(way, rows):
        return SimpleNamespace(callspec=SimpleNamespace(params={"way": way, "rows": rows}))

    items = [item(way, rows) for rows in (1, 8, 16) for way in ("kernel", "eager", "compiled")]
    kernels.Collector(job).pytest_collection_modifyitems(items)
    ordered = [(item.callspec.params["way"], item.callspec.params["rows"]) for item in items]
    assert ordered[:3] == [("kernel", 1), ("eager", 1), ("kernel", 8)]
    assert ordered[-3:] == [("compiled", rows) for rows in (1, 8, 16)]


def test_benchmarks_end_with_the_time(job):
    collector, session = kernels.Collector(job), SimpleNamespace(shouldstop=False)
    collector.pytest_sessionstart(session)
    collector.pytest_runtest_logfinish("", ())
    assert not session.shouldstop
    job.deadline = 0
    collector.pytest_runtest_logfinish("", ())
    assert session.shouldstop


class Timepiece:
    """Stands in for a model and for its clock: a call takes 100 seconds, so do the first tokens, each later one 0.5."""

    def __init__(self, monkeypatch, slow_tokens, ends_after=None):
        self.now, self.slow_tokens, self.ends_after = 0.0, slow_tokens, ends_after
        monkeypatch.setattr(baselines.time, "perf_counter", lambda: self.now)

    def generate(self, prompt, attention_mask, max_new_tokens, do_sample, stopping_criteria, **settings):
        assert not do_sample
        self.now += 100
        for new in range(1, (self.ends_after or max_new_tokens) + 1):
            self.now += 100 if new <= self.slow_tokens else 0.5
            prompt = torch.cat([prompt, torch.full_like(prompt[:, :1], new)], dim=1)
            assert not stopping_criteria(prompt, None).any()
        return prompt


@pytest.mark.parametrize(("tokens", "slow"), [(64, 8), (32, 8), (12, 3), (6, 1), (2, 1)])
def test_a_baselines_clock_starts_behind_prefill_and_first_tokens(tokens, slow, job, monkeypatch):
    timed = baselines.timed(Timepiece(monkeypatch, slow), [1, 2, 3], tokens, job)
    assert timed == (list(range(1, tokens + 1)), pytest.approx(2.0))


def test_a_forward_that_was_not_compiled_is_no_compiled_way(job, monkeypatch):
    """On a CPU ``generate`` compiles nothing, whatever it is asked for."""
    from torch._dynamo import utils

    asked = baselines.compiled(SimpleNamespace(smoke=False))
    monkeypatch.setattr(utils, "counters", {"frames": Counter()})
    baselines.require_compiled({})
    baselines.require_compiled(baselines.compiled(SimpleNamespace(smoke=True)))
    with pytest.raises(RuntimeError, match="generate compiled nothing"):
        baselines.timed(Timepiece(monkeypatch, 8), [1], 64, job, **asked)
    monkeypatch.setattr(utils, "counters", {"frames": Counter(ok=1)})
    baselines.require_compiled(asked)


@pytest.mark.parametrize("ends_after", [3, 8])
def test_a_text_that_ends_in_them_has_no_speed(ends_after, job, monkeypatch):
    timed = baselines.timed(Timepiece(monkeypatch, 8, ends_after), [1, 2, 3], 64, job)
    assert timed == (list(range(1, ends_after + 1)), None)


# ---- a trained pair beside transformers


def test_tokens_agree_until_the_first_difference():
    assert pair.agreeing([1, 2, 3], [1, 2, 3]) == 3
    assert pair.agreeing([1, 2, 3], [1, 9, 3]) == 1
    assert pair.agreeing([1, 2, 3], [1, 2]) == 2
    assert pair.agreeing([1], [2]) == 0


@pytest.fixture
def beside(job, monkeypatch):
    """``beside(timed)``: the cells of two prompts; ``timed(tokens, compiled)`` stands for transformers."""

    def run(timed):
        monkeypatch.setattr(baselines, "trained_model", lambda folder, job, dtype: (folder, dtype))

        def called(model, prompt, tokens, job, **how):
            assert model == ("TARGET", torch.bfloat16)
            return baselines.Timed(*timed(prompt, tokens, "cache_implementation" in how))

        monkeypatch.setattr(baselines, "timed", called)
        texts = [pair.Decoded("short", [5], [1, 2, 3], 90.0), pair.Decoded("long", [5] * 8, [1, 2, 3, 4], 60.0)]
        kangaroo = SimpleNamespace(target=SimpleNamespace(dtype=torch.bfloat16))
        pair.beside_transformers(job, SimpleNamespace(target="TARGET"), kangaroo, texts)
        return json.loads(job.piece.read_text())

    return run


def test_a_pair_is_set_beside_transformers(beside):
    calls = []

    def timed(prompt, tokens, compiled):
        calls.append((len(prompt), tokens, compiled))
        speed = 10.0 + 10 * compiled if len(calls) % 2 == 0 else 1.0  # the first time, something compiles
        return [1, 2, 9, 4][:tokens], speed

    found = beside(timed)
    once = [(8, 4, False), (8, 4, True), (1, 3, False), (1, 3, True)]
    assert calls == [call for call in once for _ in range(2)], "the longest text makes the static cache long enough"
    assert found["cells"][1] == {
        "prompt": "long",
        "way": "static, compiled",
        "tokens_per_second": 20.0,
        "kangaroo_speedup": 3.0,
        "new_tokens": 4,
        "agreeing_tokens": 2,
    }
    assert found["baselines"][0] == {
        "way": "eager",
        "prompts": 2,
        "tokens_per_second": 10.0,
        "kangaroo_speedup": 7.5,
        "new_tokens": 7,
        "agreeing_tokens": 4,
    }


def test_a_way_of_transformers_that_fails_is_left_and_told(beside):
    def timed(prompt, tokens, compiled):
        if compiled:
            raise RuntimeError("no C compiler")
        return [], None

    found = beside(timed)
    assert [(cell["prompt"], cell["way"]) for cell in found["cells"]] == [
        ("long", "eager"),
        ("long", "static, compiled"),
        ("short", "eager"),
    ]
    assert [total["prompts"] for total in found["baselines"]] == [2, 0]
    assert found["baselines"][0]["tokens_per_second"] is None
    report = report_of(pair=piece(**found))
    assert complaints(report) == ["pair, long, static, compiled: RuntimeError: no C compiler"]


def test_transformers_has_its_share_of_the_time(job):
    job.pair, job.deadline = DEMO_PAIR, time.monotonic() + 0.39 * job.seconds
    pair.run(job)
    assert job.values["not_run"] == 2
    assert "total" not in job.values


def test_transformers_begins_nothing_without_time(beside, job):
    job.deadline = 0
    found = beside(lambda *arguments: pytest.fail("called"))
    assert [cell["skipped"] for cell in found["cells"]] == ["no time left"] * 4
    assert state_of(piece(**found)) == "done, 4 not reached"


def pair_piece(**found):
    """A pair's figures as its part leaves them."""
    row = {"speedup": 1.5, "mean_acceptance_length": 2.0, "draft_acceptance_rate": 0.5, "identical": True}
    row |= {"plain_tokens_per_second": 100.0, "kangaroo_tokens_per_second": 150.0}
    row |= {"acceptance_rate_per_position": [0.5, 0.25]}
    about = {"name": "p", "layers": 2, "hidden": 32, "exit_layer": 1, "num_speculative_tokens": 2, "dtype": "float32"}
    about |= {"draft_confidence_threshold": 0.6, "kernels": "triton", "compiled": True}
    return piece(
        prompts=[row | {"name": name} for name in ("a.py", "b.py")], total=row | {"name": "all"}, **about, **found
    )


def test_the_page_has_the_pair_beside_transformers(tmp_path):
    cell = {"tokens_per_second": 50.0, "kangaroo_speedup": 3.0, "new_tokens": 8, "agreeing_tokens": 7}
    ended = {"tokens_per_second": None, "kangaroo_speedup": None, "new_tokens": 2, "agreeing_tokens": 2}
    ways = ["eager", "static, compiled"]
    cells = [
        {"prompt": "b.py", "way": "eager", **cell},
        {"prompt": "b.py", "way": "static, compiled", "error": "RuntimeError: no"},
        {"prompt": "a.py", "way": "eager", **ended},
    ]
    found = pair_piece(ways=ways, cells=cells, baselines=[pair.total_of(cells, way) for way in ways])
    text = page(report_of(pair=found), {})
    assert "| a.py | - | - | 2 of 2 | - | - | - |" in text
    assert "| b.py | 50.0 | 3.00 | 7 of 8 | - | - | - |" in text
    assert "| all that were reached | 50.0 | 3.00 | 9 of 10 | - | - | - |" in text
    assert "smoke" not in text
    assert draw(report_of(pair=found), tmp_path) == ({"pair": "pair.png"}, [])
    assert "transformers" not in page(report_of(pair=pair_piece()), {}), "an earlier report has none"
    assert draw(report_of(pair=pair_piece()), tmp_path) == ({"pair": "pair.png"}, [])


def test_energy_is_counted_between_beginning_and_end(monkeypatch):
    counter = iter([0, 1000, 5000, 90000, 93000])
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setattr(energy, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u"))
    meter = energy.EnergyMeter(torch.device("cuda"))
    for begin, end in ((1, 5), (2, 12)):
        meter.begin(begin)
        meter.end(end)
    assert meter.joules_per_token == pytest.approx(7 / 14)
    idle = energy.EnergyMeter(None)
    idle.begin(0)
    idle.end(9)
    assert idle.joules_per_token is None


def test_lanes_of_an_iteration():
    def stage(name, start, skipped=False):
        return StageRun(f"kangaroo/{name}", start, 1.0, skipped, [Event(f"{name} kernel", start + 0.5, 0.25)])

    iteration = [
        stage("draft/shallow", 10.0),
        stage("draft/step", 11.0),
        stage("draft/shallow", 12.0, skipped=True),
        stage("verify", 13.0),
    ]
    events = list(events_of(iteration, 1))
    assert [(event["lane"], event["start"], event["skipped"]) for event in events] == [
        ("draft 1", 0.5, False),
        ("draft 1", 1.5, False),
        ("last row", 2.5, True),
        ("verify", 3.5, False),
    ]


# ---- on a GPU


@pytest.mark.gpu
def test_a_captured_decode_follows_the_trace():
    """Replayed graphs go through the trace: the same counts at every visit."""
    agreed = torch.tensor([0, 3, 1, 2, 0])
    target = random_target(MODELS[2]._replace(layers=4), torch.device("cuda"), torch.bfloat16)
    forced = with_synthetic_acceptance(target, Trace((agreed + 1).clamp(max=3), agreed), 3)
    kangaroo = Kangaroo(forced, random_drafter(forced, 1))
    for _ in range(3):  # launched, captured, replayed; 88 tokens are eight times the trace
        steps = kangaroo.progress([5, 6, 7], max_new_tokens=88, num_speculative_tokens=3)
        assert [step.commit.agreed for step in steps][:-1] == (agreed.tolist() * 8)[:-1]


@pytest.mark.gpu
def test_one_part_on_the_card(tmp_path):
    command = [sys.executable, str(TOOLS / "gpu_report.py"), "--only", "environment", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["gpu"] == torch.cuda.get_device_name()
    assert report["parts"]["environment"]["ceilings"]["read_gigabytes_per_second"] > 50
    assert "label" not in report
