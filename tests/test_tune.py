"""The tuner: what it tries, what it refuses, when it stops, and that its files say what it found."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import tune
import tuning
from tune import SUPPOSED, merge_rules, read_rules, write_rules
from tuning import Case, Trial, Workbench, default_of, faster, find_candidates, find_cases, search, stage_bytes

from kangaroo_kernels import launch_config
from kangaroo_kernels.launch_config import LaunchConfig
from kangaroo_kernels.workloads import MODELS, TINY, workloads

TOOLS = Path(__file__).resolve().parent.parent / "tools"
WORKLOAD = workloads(TINY)[0]
DEFAULT = LaunchConfig(4, 4, 32)
OTHERS = [LaunchConfig(4, stages, 32) for stages in (5, 6, 7)]


def case(op="gate_up", n=64, k=32, dtype="bfloat16"):
    return Case(op, n, k, dtype, WORKLOAD)


# ---- what is tried


def test_every_shape_of_the_models_is_a_case_once_and_nothing_is_launched():
    """On meta tensors there is nothing to launch on, with or without the interpreter."""
    code = (
        "import torch, tuning; from kangaroo_kernels.workloads import MODELS\n"
        "print([case[:4] for case in tuning.find_cases(MODELS, torch.bfloat16)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=TOOLS, env=environment, capture_output=True, text=True, check=False)
    cases = find_cases(MODELS, torch.bfloat16)
    assert done.stdout.strip() == str([case[:4] for case in cases]), done.stderr
    assert len({case[:3] for case in cases}) == len(cases) == 20
    shapes = {op: {case[1:3] for case in cases if case.op == op} for op in ("gate_up", "attention")}
    assert shapes == {
        "gate_up": {(11008, 4096), (14336, 4096), (8192, 2048)},
        "attention": {(128, 16), (128, 64), (64, 64)},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90])
def test_candidates_begin_with_the_default_and_fit_into_shared_memory(dtype, capability):
    for shared_bytes in (SUPPOSED.shared_bytes, 100 << 10):
        card = SUPPOSED._replace(capability=capability, shared_bytes=shared_bytes)
        for found in find_cases(MODELS, dtype):
            default, *others = find_candidates(found, card)
            assert default == launch_config.pick((f"sm_{capability}.json",), *found[:4])
            assert len({default, *others}) == 1 + len(others) > 3
            assert {config.block_n for config in others} <= ({0} if found.op == "attention" else {16, 32, 64, 128})
            used = [(config.num_stages - 1) * stage_bytes(found, config.block_n) for config in others]
            assert max(used) <= shared_bytes
            distances = [config.num_warps != default.num_warps for config in others]
            assert distances == sorted(distances)  # as many warps as the default's come first


@pytest.mark.parametrize(
    ("op", "wanted"),
    # rows of the weight and of x, 512 bytes of each; twice the rows; 64 keys and values
    [("qkv_rope", (32 + 16) * 512), ("gate_up", (2 * 32 + 16) * 512), ("attention", 2 * 64 * 128 * 2)],
)
def test_bytes_of_a_stage(op, wanted):
    found = next(case for case in find_cases(MODELS, torch.bfloat16) if case.op == op)
    assert stage_bytes(found, 32) == wanted


# ---- the search


class Bench:
    """Answers for candidates instead of a card: times and refusals by configuration, and a clock that it moves on."""

    def __init__(self, times, refused=(), broken=(), again=None):
        self.times, self.refused, self.broken, self.again = times, refused, broken, again or {}
        self.now, self.timed = 0.0, []

    def check(self, case, config):
        self.now += 1
        if config in self.broken:
            raise RuntimeError("out of resources: shared memory\nand a long story")
        return "other bits" if config in self.refused else ""

    def time(self, case, config, rounds):
        self.timed.append((case.n, config.num_stages, rounds))
        one = self.again.get(config, self.times[config]) if rounds > 11 else self.times[config]
        return one if isinstance(one, tuple) else (one, one)


def run(bench, candidates, seconds=1e9):
    found = {}
    search(candidates, bench, seconds, found, lambda: bench.now)
    return found


@pytest.mark.parametrize("seconds", [1, 3, 5, 100])
def test_every_case_takes_its_turn_until_the_time_is_over(seconds):
    bench = Bench(dict.fromkeys([DEFAULT, *OTHERS], 1.0))
    run(bench, {case(n=n): [DEFAULT, *OTHERS[:n]] for n in (1, 2)}, seconds)
    assert bench.timed == [(n, stages, 11) for n, stages in ((1, 4), (2, 4), (1, 5), (2, 5), (2, 6))][:seconds]


def test_other_bits_are_never_timed_and_what_fails_stops_nothing():
    bench = Bench({DEFAULT: 10.0, OTHERS[1]: 9.0}, refused=[OTHERS[0]], broken=[OTHERS[2]])
    found = run(bench, {case(): [DEFAULT, *OTHERS]})[case()]
    assert {stages for _, stages, _ in bench.timed} == {4, 6}
    assert (found.best.config, found.default.config, found.tried) == (OTHERS[1], DEFAULT, 4)
    assert found.refused[OTHERS[0]] == "rejected: other bits"
    assert found.refused[OTHERS[2]] == "failed: RuntimeError: out of resources: shared memory"


@pytest.mark.parametrize("how", ["refused", "broken"])
def test_without_a_default_there_is_nothing_to_hold_the_others_against(how):
    found = run(Bench({DEFAULT: 1.0, OTHERS[0]: 0.5}, **{how: [DEFAULT]}), {case(): [DEFAULT, OTHERS[0]]})[case()]
    assert (found.default, found.best, found.tried) == (None, None, 1)


def test_who_seems_faster_must_be_so_side_by_side():
    lucky = Bench({DEFAULT: 10.0, OTHERS[0]: 8.0}, again={DEFAULT: 7.0, OTHERS[0]: 7.5})
    found = run(lucky, {case(): [DEFAULT, OTHERS[0]]})[case()]
    assert lucky.timed == [(64, 4, 11), (64, 5, 11), (64, 4, 30), (64, 5, 30)]
    assert found.best == found.default == Trial(DEFAULT, (7.0, 7.0))
    steady = Bench({DEFAULT: 10.0, OTHERS[0]: 8.0, OTHERS[1]: 6.0})
    assert run(steady, {case(): [DEFAULT, *OTHERS[:2]]})[case()].best == Trial(OTHERS[1], (6.0, 6.0))


def test_ties_at_one_row_are_broken_at_eight():
    default = Trial(DEFAULT, (10.0, 20.0))
    for us, wanted in (((9.8, 99), 1), ((9.95, 19), 1), ((9.95, 20), 0), ((10.05, 19), 1), ((10.2, 1), 0)):
        assert faster(Trial(OTHERS[0], us), default) == bool(wanted), us


def test_ctrl_c_is_not_a_failing_candidate():
    bench, found = Bench({DEFAULT: 1.0}), {}
    bench.check = lambda case, config: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        search({case(): [DEFAULT]}, bench, 9, found, lambda: 0.0)


# ---- the check

OPERATIONS = ["qkv_rope 64", "attention 16", "linear_residual 64", "gate_up 64", "top1_head 64", "sample_head 64"]


@pytest.fixture
def check(monkeypatch, device):
    """``check(name, spoil)``: the verdict on a candidate whose results ``spoil(positional, result)`` has changed."""
    monkeypatch.setattr(tuning, "CACHE_LENGTH", 130)  # two splits
    shape = TINY._replace(hidden=64, inner=64, heads=2, kv_heads=1, head_dim=32, vocab_size=100)
    cases = {f"{case.op} {case.k}": case for case in find_cases([shape], torch.float32)}
    kernel_of = tuning.launcher

    def verdict(name, spoil=lambda positional, result: None, also_default=False):
        found = cases[name]
        default = default_of(found, 80)
        candidate = default._replace(num_stages=default.num_stages + 1)  # the default's bits on every machine
        kernel = kernel_of(found.op)

        def almost(*positional, **named):
            result = kernel(*positional, **named)
            used = launch_config.launch_config(found.op, found.n, found.k, positional[0])
            if also_default or used == candidate:
                spoil(positional, result)
            return result

        monkeypatch.setattr(tuning, "launcher", lambda op: almost)
        with torch.inference_mode():
            return Workbench(device, None, 80).check(found, candidate)

    return verdict


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_check_passes_what_is_right(name, check):
    assert check(name) == ""


@pytest.mark.parametrize(("name", "rows"), [*((name, 16) for name in OPERATIONS), ("gate_up 64", 1), ("gate_up 64", 5)])
def test_the_check_sees_one_other_bit(name, rows, check):
    def spoil(positional, result):
        if len(positional[0]) == rows:
            fixed = result[0] if isinstance(result, tuple) else result  # a head's token
            fixed.view(-1)[-1:].view(torch.int32)[0] ^= 1

    assert check(name, spoil) == f"other bits than the default's at {rows} rows"


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "head" in name])
def test_a_confidence_may_differ_in_its_last_digit(name, check):
    """It is summed tile by tile; a head's tokens are what is fixed."""

    def spoil(positional, result):
        result.confidence.view(torch.int32)[0] ^= 1

    assert check(name, spoil) == ""


def test_the_check_sees_another_row_of_the_cache_and_a_default_that_is_wrong(check):
    def cached(positional, result):
        positional[5][-1, int(positional[6]), -1] *= 1.5

    assert check("qkv_rope 64", cached) == "other bits than the default's at 1 rows"
    wrong = check("gate_up 64", lambda positional, result: result.mul_(1.001), also_default=True)
    assert wrong == "relative error 1.0e-03 at 1 rows", "equal bits are not enough"


# ---- the file

EXISTING = {
    "gate_up": [
        {"max_n": 100, "num_warps": 16, "num_stages": 2, "block_n": 16},
        {"num_warps": 1, "num_stages": 7, "block_n": 16},
        {"n": 64, "k": 32, "dtype": "bfloat16", "num_warps": 1, "num_stages": 1, "block_n": 16},
        {"n": 64, "k": 32, "dtype": "float16", "num_warps": 2, "num_stages": 2, "block_n": 16},
    ],
    "top1_head": [{"num_warps": 1, "num_stages": 3, "block_n": 16}],
}


def test_the_file_has_what_was_found_and_keeps_other_rules(tmp_path):
    path = tmp_path / "GPU.json"
    found = {case(): LaunchConfig(4, 6, 64), case(n=300): LaunchConfig(8, 3, 32)}
    rules = merge_rules(EXISTING, found | {case("attention", 128, 64): LaunchConfig(8, 2)})
    assert EXISTING["gate_up"][2]["num_warps"] == 1, "not written to"
    write_rules(path, rules)
    assert read_rules(path) == rules
    assert (len(rules["gate_up"]), path.read_text().count("\n")) == (5, 1 + 7 + 3 + 3 + 1), "a rule a line"
    launch_config.rules.cache_clear()
    for n, dtype, wanted in (
        (64, "bfloat16", LaunchConfig(4, 6, 64)),  # took the old rule's place
        (300, "bfloat16", LaunchConfig(8, 3, 32)),
        (64, "float16", LaunchConfig(2, 2, 16)),
        (99, "bfloat16", LaunchConfig(16, 2, 16)),  # the general ones stand behind, in the order they had
        (999, "bfloat16", LaunchConfig(1, 7, 16)),
    ):
        assert launch_config.pick((str(path), "sm_80.json"), "gate_up", n, 32, dtype) == wanted
    assert launch_config.pick((str(path), "sm_80.json"), "attention", 128, 64, "bfloat16") == LaunchConfig(8, 2)
    launch_config.rules.cache_clear()
    assert len(merge_rules(EXISTING, {case(): None})["gate_up"]) == 3, "the default is as fast"
    assert read_rules(tmp_path / "none.json") == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"gate_up": 3}'])
def test_a_file_that_is_none_of_these_is_refused(text, tmp_path):
    (tmp_path / "GPU.json").write_text(text)
    with pytest.raises(ValueError, match="another --out"):
        read_rules(tmp_path / "GPU.json")


# ---- the command


def command(*arguments):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(tune.main)
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "tuning needs a CUDA GPU and there is none here; --dry-run lists the candidates without one."),
        (["--dtype", "int8"], "--dtype is int8; it must be one of bfloat16, float16, float32."),
        (["--minutes", "nan"], "--minutes is nan; it must be a finite number above 0."),
        (["--dry-run", "--model", "gpt"], "no model is called gpt; there are Vicuna-7B, Llama-3.1-8B, Llama-3.2-1B."),
    ],
)
def test_mistakes_get_one_sentence(arguments, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = command(*arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"tune: {sentence}\n")


def test_dry_run_lists_the_candidates():
    said = command("--dry-run", "--model", "3.2-1b").stdout
    assert "n=128256" in said
    assert "k=4096" not in said  # another model's
    listed = json.loads(command("--dry-run", "--model", "3.2-1b", "--dtype", "float16", "--json").stdout)
    assert {one["op"] for one in listed["cases"]} == {workload.op for workload in workloads(TINY)}
    assert all(one["dtype"] == "float16" and len(one["candidates"]) > 10 for one in listed["cases"])


@pytest.fixture
def card(monkeypatch):
    """A card that is not here: 8 warps are faster but for attention, 2 stages fail, 16 columns have other bits."""

    class FakeBench(Workbench):
        interrupt_after, asked = 10**9, 0

        def check(self, case, config):
            FakeBench.asked += 1
            if FakeBench.asked > FakeBench.interrupt_after:
                raise KeyboardInterrupt
            if config.num_stages == 2:
                raise RuntimeError("out of resource")
            return "other bits" if config.block_n == 16 and config != default_of(case, 90) else ""

        def time(self, case, config, rounds):
            return (9.0 if config.num_warps == 8 and case.op != "attention" else 10.0), 20.0 + config.block_n

    monkeypatch.setattr(tune, "Workbench", FakeBench)
    monkeypatch.setattr(tune, "read_card", lambda device: SUPPOSED._replace(name="A GPU"))
    monkeypatch.setattr(tune, "snapshot", lambda device: {"name": "A GPU"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return FakeBench


def test_a_whole_run(card, tmp_path):
    """Rules are written where the default was beaten, and nowhere else."""
    path = tmp_path / "GPU.json"
    kept = {"n": 1, "k": 1, "dtype": "float32", "num_warps": 1, "num_stages": 1, "block_n": 16}
    write_rules(path, {"gate_up": [kept]})
    done = command("--out", path, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["file"], report["interrupted"], report["unreached"]) == (str(path), False, [])
    rules = read_rules(path)
    assert kept in rules["gate_up"]
    written = {(op, rule["n"], rule["k"]): rule for op, lines in rules.items() for rule in lines if rule != kept}
    assert len(report["cases"]) == 20
    for one in report["cases"]:
        if one["op"] == "attention":
            assert one["best"] == one["default"]
            assert one["op"] not in rules
        else:
            rule = written[one["op"], one["n"], one["k"]]
            assert (rule["num_warps"], rule["block_n"]) == (8, 32) == (one["best"]["num_warps"], one["best"]["block_n"])
            assert one["failed"] >= 2
            assert one["rejected"] > 5


def test_lines_for_people(card, tmp_path):
    done = command("--out", tmp_path / "GPU.json", "--model", "vicuna")
    assert done.exit_code == 0
    assert "us, +11.1% (" in done.stdout
    assert done.stderr == f"tune: 6 of 7 shapes are faster than by default; {tmp_path / 'GPU.json'} says how.\n"


def test_ctrl_c_keeps_what_was_found(card, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "interrupt_after", 60)
    done = command("--out", tmp_path / "GPU.json", "--json")
    assert done.exit_code == 130
    report = json.loads(done.stdout)
    assert report["interrupted"]
    assert len(report["cases"]) == 20
    assert [one["tried"] for one in report["cases"]] == [4] + [3] * 19


@pytest.mark.parametrize("how", ["all refused", "no time"])
def test_nothing_found_writes_nothing(how, card, tmp_path, monkeypatch):
    if how == "all refused":
        monkeypatch.setattr(card, "check", lambda self, case, config: "other bits")
    else:
        ticks = itertools.count(0, 1000)
        monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(ticks)))
    done = command("--out", tmp_path / "GPU.json", "--model", "vicuna")
    assert done.exit_code == 1
    assert "tune: nothing was timed for gate_up n=11008 k=4096; more --minutes may reach it.\n" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_gets_one_sentence(card, tmp_path):
    done = command("--out", tmp_path / "no" / "GPU.json", "--model", "vicuna")
    sentence = f"tune: {tmp_path / 'no' / 'GPU.json'} cannot be written: No such file or directory.\n"
    assert (done.exit_code, done.stderr) == (2, sentence)


@pytest.mark.gpu
def test_tuning_a_real_card(tmp_path, monkeypatch):
    """A few candidates of one model, in seconds: every one launches, and every other bit was refused."""
    real = tune.find_candidates
    monkeypatch.setattr(tune, "find_candidates", lambda case, card: real(case, card)[:3])
    done = command("--minutes", "3", "--model", "3.2-1b", "--out", tmp_path / "GPU.json", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["unreached"] == []
    assert all(one["best"]["us"]["1"] > 0 for one in report["cases"])
