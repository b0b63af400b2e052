"""The report on a rented GPU: each part runs (tiny, on the CPU), none spoils the others, it says what it saw."""

import json
import signal
import subprocess
import sys
import time
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
from report import baselines, decode, energy, equality, kernels, runner
from report.decode import bytes_a_token
from report.job import SMOKE, Job
from report.page import SMOKE_LABEL, complaints, page, state_of
from report.parts import PAIR, PARTS, Part, budgets, choose
from report.plots import draw
from report.runner import run_part
from report.timeline import events_of
from synthetic import MAX_DRAFTS, Trace, conditional_rate, paper_trace, with_synthetic_acceptance

from kangaroo_kernels import DecodeStats, Kangaroo
from kangaroo_kernels.model import generate
from kangaroo_kernels.model.demo import PAIR as DEMO_PAIR
from kangaroo_kernels.model.operations import REFERENCES
from kangaroo_kernels.top1_head_ref import Top1
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
    assert steps == [(drafts, way) for drafts in (1, 2, 6) for way in ways]
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
        (["--minutes", "0"], "--minutes is 0; it must be above 0."),
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


def test_a_crash_keeps_what_was_found_and_the_last_words(tmp_path, monkeypatch):
    found = run(
        "print('on stdout', flush=True); raise SystemExit('CUDA error: out of luck')", tmp_path, monkeypatch, 30
    )
    assert (found["status"], found["half"], found["exit_status"]) == ("failed", 1, 1)
    assert found["output"] == ["on stdout", "CUDA error: out of luck"]


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
    assert draw(report, tmp_path) == {}
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
    target.rotary.reserve(64, 64)
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
        rotary=SimpleNamespace(reserve=lambda *lengths: None),
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


# ---- tests, benchmarks and baselines


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


def test_a_baselines_clock_starts_behind_the_prefill(job, monkeypatch):
    """The prefill takes 100 seconds and every later token 0.5."""
    now = [0.0]
    monkeypatch.setattr(baselines.time, "perf_counter", lambda: now[0])

    class Model:
        def generate(self, prompt, max_new_tokens, stopping_criteria, **settings):
            assert not settings["do_sample"]
            now[0] += 100
            for _ in range(max_new_tokens):
                prompt = torch.cat([prompt, prompt[:, :1]], dim=1)
                assert not stopping_criteria(prompt, None).any()
                now[0] += 0.5 if prompt.shape[1] < 3 + max_new_tokens else 0
            return prompt

    assert baselines.timed(Model(), torch.tensor([[1, 2, 3]]), 9, job) == pytest.approx(2.0)


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
