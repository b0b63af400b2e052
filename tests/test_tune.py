"""The tuner: what it tries, what it refuses, when it stops, and that its files say what it found."""

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
from gpu_measure import Quantiles
from tune import (
    SUPPOSED,
    Case,
    Speed,
    Trial,
    Workbench,
    fastest,
    finalists,
    find_candidates,
    find_cases,
    merge_rules,
    read_rules,
    report_of,
    rule_of,
    stage_bytes,
    sweep,
    time_again,
    write_rules,
)

from kangaroo_kernels import launch_config
from kangaroo_kernels.launch_config import LaunchConfig
from kangaroo_kernels.workloads import MODELS, TINY, workloads

TOOLS = Path(__file__).resolve().parent.parent / "tools"
WORKLOAD = workloads(TINY)[0]
DEFAULT = LaunchConfig(4, 4, 32)
OTHERS = [LaunchConfig(4, stages, 32) for stages in (5, 6, 7)]


def case(op="gate_up", n=64, k=32, dtype="bfloat16"):
    return Case(op, n, k, dtype, WORKLOAD)


def speed(one, eight=None):
    return Speed(Quantiles(one, one, one), Quantiles(*[one if eight is None else eight] * 3))


class Bench:
    """Answers for candidates instead of a card: times and refusals by configuration, and a clock that it moves on."""

    def __init__(self, times, refused=(), broken=(), seconds=1.0):
        self.times, self.refused, self.broken, self.seconds = times, refused, broken, seconds
        self.now, self.checked, self.timed = 0.0, [], []

    def clock(self):
        return self.now

    def check(self, case, config):
        self.now += self.seconds
        self.checked.append((case, config))
        if config in self.broken:
            raise RuntimeError("out of resources: shared memory\nand a long story")
        return "other bits" if config in self.refused else ""

    def time(self, case, config):
        self.timed.append((case, config))
        return speed(self.times[config])


def run(bench, candidates, deadline=1e9):
    tried = {}
    for case, trial in sweep(candidates, bench.check, bench.time, deadline, bench.clock):
        tried.setdefault(case, []).append(trial)
    return tried


# ---- what is tried


def test_every_shape_of_the_models_is_a_case_once():
    cases = find_cases(MODELS, torch.bfloat16)
    keys = [(case.op, case.n, case.k) for case in cases]
    assert len(keys) == len(set(keys)) == 20
    assert {key for key in keys if key[0] == "gate_up"} == {
        ("gate_up", 11008, 4096),
        ("gate_up", 14336, 4096),
        ("gate_up", 8192, 2048),
    }
    assert {key for key in keys if key[0] == "attention"} == {
        ("attention", 128, 16),
        ("attention", 128, 64),
        ("attention", 64, 64),
    }
    assert ("linear_residual", 4096, 4096) in keys  # of two models
    assert {case.dtype for case in cases} == {"bfloat16"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_case_is_what_the_launcher_asks_for(dtype):
    """The rule written for a case is the rule that its launch finds."""
    name = str(dtype).removeprefix("torch.")
    for found in find_cases([TINY], dtype):
        rule = merge_rules({}, {found: LaunchConfig(8, 7, 128)})
        assert rule[found.op][0] == rule_of(found, LaunchConfig(8, 7, 128))
        assert (found.key["n"], found.key["k"], found.dtype) == (found.n, found.k, name)


def test_finding_cases_launches_nothing(monkeypatch):
    """On meta tensors there is nothing to launch on, with or without the interpreter."""
    code = "import torch, tune; print(len(tune.find_cases(tune.MODELS, torch.float16)))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TOOLS, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "20"), done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90])
def test_candidates(dtype, capability):
    card = SUPPOSED._replace(capability=capability)
    for found in find_cases(MODELS, dtype):
        candidates = find_candidates(found, card)
        assert candidates[0] == launch_config.pick((f"sm_{capability}.json",), *found[:4])
        assert len(candidates) == len(set(candidates)) > 10
        assert {config.num_warps for config in candidates} == {4, 8}
        assert {config.num_stages for config in candidates} <= set(range(2, 9))
        blocks = {config.block_n for config in candidates}
        assert blocks == ({0} if found.op == "attention" else {16, 32, 64, 128})
        distances = [config.num_warps != candidates[0].num_warps for config in candidates]
        assert distances == sorted(distances)  # as many warps as the default's come first


def test_candidates_fit_into_shared_memory():
    found = next(case for case in find_cases(MODELS, torch.bfloat16) if case.op == "qkv_rope")
    assert stage_bytes(found, 32) == (32 + 16) * 512  # rows of the weight and of x, 512 bytes of each
    small = find_candidates(found, SUPPOSED._replace(shared_bytes=100 << 10))
    assert set(small) < set(find_candidates(found, SUPPOSED))
    assert all((config.num_stages - 1) * (config.block_n + 16) * 512 <= 100 << 10 for config in small[1:])
    assert LaunchConfig(4, 5, 32) in small
    assert LaunchConfig(4, 6, 32) not in small
    gate_up = next(case for case in find_cases(MODELS, torch.bfloat16) if case.op == "gate_up")
    assert stage_bytes(gate_up, 32) == (2 * 32 + 16) * 512
    attention = next(case for case in find_cases(MODELS, torch.bfloat16) if case.op == "attention")
    assert stage_bytes(attention, 0) == 2 * 64 * 128 * 2  # 64 keys and values


# ---- the search


def test_every_case_takes_its_turn():
    cases = [case(n=n) for n in (1, 2, 3)]
    bench = Bench(dict.fromkeys([DEFAULT, *OTHERS], 1.0))
    run(bench, {one: [DEFAULT, *OTHERS[: one.n]] for one in cases})
    assert [(one.n, config.num_stages) for one, config in bench.timed] == [
        (1, 4),
        (2, 4),
        (3, 4),
        (1, 5),
        (2, 5),
        (3, 5),
        (2, 6),
        (3, 6),
        (3, 7),
    ]
    assert bench.checked == bench.timed


@pytest.mark.parametrize("deadline", range(8))
def test_nothing_is_begun_after_the_deadline(deadline):
    candidates = {case(n=n): [DEFAULT, *OTHERS] for n in (1, 2)}
    bench = Bench(dict.fromkeys([DEFAULT, *OTHERS], 1.0))  # a trial a second
    tried = run(bench, candidates, deadline)
    assert len(bench.checked) == deadline == sum(map(len, tried.values()))
    assert bench.now == deadline
    if deadline >= 2:
        assert all(trials[0].config == DEFAULT and trials[0].speed for trials in tried.values())


def test_other_bits_are_never_timed_and_never_win():
    times = {DEFAULT: 10.0, OTHERS[0]: 1.0, OTHERS[1]: 9.0, OTHERS[2]: 11.0}
    bench = Bench(times, refused=[OTHERS[0]])
    trials = run(bench, {case(): [DEFAULT, *OTHERS]})[case()]
    assert OTHERS[0] not in [config for _, config in bench.timed]
    assert trials[1] == Trial(OTHERS[0], None, "rejected: other bits")
    assert fastest(trials).config == OTHERS[1]
    assert OTHERS[0] not in finalists(trials)
    report = report_of(case(), trials, [])
    assert (report["best"]["num_stages"], report["tried"], report["rejected"], report["failed"]) == (6, 4, 1, 0)


def test_a_failing_candidate_does_not_stop_the_sweep():
    bench = Bench({DEFAULT: 10.0, OTHERS[2]: 5.0}, broken=[OTHERS[0]])  # and OTHERS[1] fails when it is timed
    trials = run(bench, {case(): [DEFAULT, *OTHERS]})[case()]
    assert [trial.config for trial in trials] == [DEFAULT, *OTHERS]
    assert trials[1].reason == "failed: RuntimeError: out of resources: shared memory"
    assert trials[2].reason.startswith("failed: KeyError")
    assert fastest(trials).config == OTHERS[2]
    assert report_of(case(), trials, [])["failed"] == 2


@pytest.mark.parametrize("how", ["refused", "broken"])
def test_without_a_default_there_is_nothing_to_hold_the_others_against(how):
    bench = Bench({DEFAULT: 1.0, OTHERS[0]: 1.0}, **{how: [DEFAULT]})
    good = case(n=2)
    bench_of_good = Bench({DEFAULT: 1.0, OTHERS[0]: 0.5})

    def check(one, config):
        return (bench_of_good if one == good else bench).check(one, config)

    tried = dict.fromkeys([case(), good], ())
    for one, trial in sweep({key: [DEFAULT, OTHERS[0]] for key in tried}, check, bench.time, 1e9, bench.clock):
        tried[one] += (trial,)
    assert [len(trials) for trials in tried.values()] == [1, 2]
    report = report_of(case(), tried[case()], [])
    assert report["default"] is report["best"] is None


def test_ctrl_c_is_not_a_failing_candidate():
    def stop(case, config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(sweep({case(): [DEFAULT]}, stop, stop, 1e9, lambda: 0.0))


def test_ties_at_one_row_are_broken_at_eight():
    trials = [
        Trial(DEFAULT, speed(10.0, 30.0)),
        Trial(OTHERS[0], speed(9.91, 20.0)),
        Trial(OTHERS[1], speed(9.9, 25.0)),
        Trial(OTHERS[2], speed(10.5, 5.0)),  # not a tie
    ]
    assert fastest(trials).config == OTHERS[0]
    assert fastest(trials[::3]).config == DEFAULT
    assert fastest([Trial(DEFAULT, speed(1.0)), Trial(OTHERS[0], speed(1.0))]).config == DEFAULT  # of equals the first
    assert fastest([Trial(DEFAULT, None, "failed: x")]) is None


def test_finalists_are_the_default_and_the_best_few():
    trials = [Trial(DEFAULT, speed(10.0)), *(Trial(config, speed(9.0 - i)) for i, config in enumerate(OTHERS))]
    assert finalists(trials) == [DEFAULT, *reversed(OTHERS)]
    slow = [Trial(DEFAULT, speed(1.0)), *(Trial(config, speed(2.0 + i)) for i, config in enumerate(OTHERS))]
    assert finalists(slow) == [DEFAULT, *OTHERS[:2]]


def test_finals_overrule_the_sweep():
    first, second = case(n=1), case(n=2)
    trials = [Trial(DEFAULT, speed(10.0)), Trial(OTHERS[0], speed(8.0)), Trial(OTHERS[1], speed(9.0))]
    bench = Bench({DEFAULT: 7.0, OTHERS[0]: 7.5, OTHERS[1]: 6.0})
    finals = dict(time_again({first: trials}, bench.time, 1e9, bench.clock))
    assert [config for _, config in bench.timed] == [DEFAULT, OTHERS[0], OTHERS[1]]
    assert report_of(first, trials, finals[first])["best"]["num_stages"] == OTHERS[1].num_stages
    assert report_of(first, trials, [])["best"]["num_stages"] == OTHERS[0].num_stages

    class Slow(Bench):
        def time(self, case, config):
            self.now += 1
            return super().time(case, config)

    slow = Slow(bench.times)
    finals = dict(time_again({first: trials, second: trials}, slow.time, 5, slow.clock))
    assert list(finals) == [first]  # the deadline fell into the second
    assert dict(time_again({first: [Trial(DEFAULT, None, "failed: x")]}, slow.time, 1e9, slow.clock)) == {}


# ---- the check


@pytest.fixture
def tiny_cases(monkeypatch):
    monkeypatch.setattr(tune, "CACHE_LENGTH", 130)  # two splits
    shape = TINY._replace(hidden=64, inner=64, heads=2, kv_heads=1, head_dim=32, vocab_size=100)
    return {f"{case.op} {case.k}": case for case in find_cases([shape], torch.float32)}


OPERATIONS = ["qkv_rope 64", "attention 16", "linear_residual 64", "gate_up 64", "top1_head 64", "sample_head 64"]


def with_a_stage_more(case):
    """A candidate that gives the default's bits on every machine."""
    default = tune.default_of(case, 80)
    return default._replace(num_stages=default.num_stages + 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_check_passes_what_is_right(name, tiny_cases, device):
    with torch.inference_mode():
        assert Workbench(device, None, 80).check(tiny_cases[name], with_a_stage_more(tiny_cases[name])) == ""


@pytest.mark.parametrize(("name", "rows"), [*((name, 16) for name in OPERATIONS), ("gate_up 64", 1), ("gate_up 64", 5)])
def test_the_check_sees_one_other_bit(name, rows, tiny_cases, device, monkeypatch):
    found = tiny_cases[name]
    candidate = with_a_stage_more(found)
    kernel = tune.launcher(found.op)

    def almost(*positional, out=None, **named):
        result = kernel(*positional, **named) if out is None else kernel(*positional, **named, out=out)
        config = launch_config.launch_config(found.op, found.n, found.k, positional[0])
        if config == candidate and len(positional[0]) == rows:
            fixed = result[0] if isinstance(result, tuple) else result  # a head's token
            fixed.view(-1)[-1:].view(torch.int32)[0] ^= 1
        return result

    monkeypatch.setattr(tune, "launcher", lambda op: almost)
    with torch.inference_mode():
        assert Workbench(device, None, 80).check(found, candidate) == f"other bits than the default's at {rows} rows"


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "head" in name])
def test_a_confidence_may_differ_in_its_last_digit(name, tiny_cases, device, monkeypatch):
    """It is summed tile by tile; a head's tokens are what is fixed."""
    found = tiny_cases[name]
    candidate = with_a_stage_more(found)
    kernel = tune.launcher(found.op)

    def almost(*positional, **named):
        result = kernel(*positional, **named)
        if launch_config.launch_config(found.op, found.n, found.k, positional[0]) == candidate:
            result.confidence.view(torch.int32)[0] ^= 1
        return result

    monkeypatch.setattr(tune, "launcher", lambda op: almost)
    with torch.inference_mode():
        assert Workbench(device, None, 80).check(found, candidate) == ""


def test_the_check_sees_another_row_of_the_cache(tiny_cases, device, monkeypatch):
    found = tiny_cases["qkv_rope 64"]
    candidate = with_a_stage_more(found)
    kernel = tune.launcher("qkv_rope")

    def almost(*positional, **named):
        result = kernel(*positional, **named)
        if launch_config.launch_config("qkv_rope", found.n, found.k, positional[0]) == candidate:
            positional[5][-1, int(positional[6]), -1] *= 1.5
        return result

    monkeypatch.setattr(tune, "launcher", lambda op: almost)
    with torch.inference_mode():
        assert Workbench(device, None, 80).check(found, candidate) == "other bits than the default's at 1 rows"


def test_the_check_sees_a_default_that_is_wrong(tiny_cases, device, monkeypatch):
    """Equal bits are not enough."""
    kernel = tune.launcher("gate_up")

    def wrong(*positional, out=None, **named):
        result = kernel(*positional, **named) if out is None else kernel(*positional, **named, out=out)
        return result.mul_(1.001)

    monkeypatch.setattr(tune, "launcher", lambda op: wrong)
    with torch.inference_mode():
        found = tiny_cases["gate_up 64"]
        reason = Workbench(device, None, 80).check(found, with_a_stage_more(found))
    assert reason == "relative error 1.0e-03 at 1 rows"


def test_inputs_are_fresh_at_every_check(tiny_cases, device, monkeypatch):
    found, seen = tiny_cases["linear_residual 64"], []
    monkeypatch.setattr(tune, "written", lambda op, kernel, arguments: seen.append([x.clone() for x in arguments[0]]))
    monkeypatch.setattr(tune, "fixed_bits", lambda results: results)
    monkeypatch.setattr(tune, "same_bits", lambda ours, theirs: False)
    bench = Workbench(device, None, 80)
    with torch.inference_mode():
        for _ in range(2):
            bench.check(found, DEFAULT)
    default, candidate, again, _ = seen
    assert all(torch.equal(one, other) for one, other in zip(default, candidate, strict=True))
    assert [torch.equal(one, other) for one, other in zip(default, again, strict=True)] == [False, True, False]


# ---- the file

EXISTING = {
    "gate_up": [
        {"n": 64, "k": 32, "dtype": "bfloat16", "num_warps": 1, "num_stages": 1, "block_n": 16},
        {"n": 64, "k": 32, "dtype": "float16", "num_warps": 2, "num_stages": 2, "block_n": 16},
        {"max_n": 100, "num_warps": 16, "num_stages": 2, "block_n": 16},
        {"num_warps": 1, "num_stages": 7, "block_n": 16},
    ],
    "top1_head": [{"num_warps": 1, "num_stages": 3, "block_n": 16}],
}


@pytest.fixture
def picked(tmp_path):
    """A file written by the tuner, as ``launch_config.pick`` reads it: an absolute name stands for itself."""
    path = tmp_path / "GPU.json"

    def pick(rules, op, n, k, dtype):
        write_rules(path, rules)
        launch_config.rules.cache_clear()
        return launch_config.pick((str(path), "sm_80.json"), op, n, k, dtype)

    yield pick
    launch_config.rules.cache_clear()


def test_pick_reads_back_what_was_written(picked):
    found = {
        case(): LaunchConfig(4, 6, 64),
        case(n=128): LaunchConfig(8, 3, 16),
        case(op="attention", n=128, k=64): LaunchConfig(8, 2),
    }
    rules = merge_rules({}, found)
    for one, config in found.items():
        assert picked(rules, *one[:4]) == config
    assert picked(rules, "gate_up", 64, 33, "bfloat16") == launch_config.pick(
        ("sm_80.json",), "gate_up", 64, 33, "bfloat16"
    )


def test_other_rules_are_kept(picked):
    rules = merge_rules(EXISTING, {case(): LaunchConfig(4, 6, 64), case(n=300): LaunchConfig(8, 3, 32)})
    assert picked(rules, "gate_up", 64, 32, "bfloat16") == LaunchConfig(4, 6, 64)  # took the old rule's place
    assert picked(rules, "gate_up", 300, 32, "bfloat16") == LaunchConfig(8, 3, 32)
    assert picked(rules, "gate_up", 64, 32, "float16") == LaunchConfig(2, 2, 16)
    assert picked(rules, "gate_up", 99, 32, "bfloat16") == LaunchConfig(16, 2, 16)
    assert picked(rules, "gate_up", 999, 32, "bfloat16") == LaunchConfig(1, 7, 16)
    assert picked(rules, "top1_head", 999, 32, "bfloat16") == LaunchConfig(1, 3, 16)
    assert len(rules["gate_up"]) == 5
    assert EXISTING["gate_up"][0]["num_warps"] == 1  # not written to


def test_exact_rules_come_before_the_others():
    general_first = {"gate_up": EXISTING["gate_up"][::-1]}
    rules = merge_rules(general_first, {case(op="top1_head"): DEFAULT})
    assert [len(rule) for rule in rules["gate_up"]] == [6, 6, 3, 4]
    assert rules["gate_up"][2:] == general_first["gate_up"][:2]  # in the order they had


def test_the_file_has_a_rule_a_line(tmp_path):
    path = tmp_path / "GPU.json"
    write_rules(path, EXISTING)
    assert read_rules(path) == EXISTING
    assert path.read_text().count("\n") == 1 + 6 + 3 + 1  # braces and brackets on lines of their own
    assert list(tmp_path.iterdir()) == [path]
    assert read_rules(tmp_path / "none.json") == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"gate_up": 3}'])
def test_a_file_that_is_none_of_these_is_refused(text, tmp_path):
    path = tmp_path / "GPU.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="another --out"):
        read_rules(path)


# ---- the command


@pytest.fixture
def command():
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(tune.main)
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "tune: tuning needs a CUDA GPU and there is none here; --dry-run lists the candidates without one.\n"),
        (["--dtype", "int8"], "tune: --dtype is int8; it must be one of bfloat16, float16, float32.\n"),
        (["--minutes", "0"], "tune: --minutes is 0; it must be a finite number above 0.\n"),
        (["--minutes", "nan"], "tune: --minutes is nan; it must be a finite number above 0.\n"),
        (["--minutes", "inf"], "tune: --minutes is inf; it must be a finite number above 0.\n"),
        (
            ["--dry-run", "--model", "gpt"],
            "tune: no model is called gpt; there are Vicuna-7B, Llama-3.1-8B, Llama-3.2-1B.\n",
        ),
    ],
)
def test_mistakes_get_one_sentence(command, no_gpu, arguments, sentence):
    done = command(*arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", sentence)


def test_dry_run_lists_the_candidates(command, no_gpu):
    done = command("--dry-run", "--model", "3.2-1b")
    assert done.exit_code == 0
    assert "128256" in done.stdout
    assert "4096" not in done.stdout  # another model's
    listed = json.loads(command("--dry-run", "--model", "3.2-1b", "--dtype", "float16", "--json").stdout)
    assert {one["op"] for one in listed["cases"]} == {workload.op for workload in workloads(TINY)}
    assert all(one["dtype"] == "float16" and len(one["candidates"]) > 10 for one in listed["cases"])


@pytest.fixture
def card(monkeypatch):
    """A card that is not here: 8 warps are a little faster, 2 stages fail, 16 columns have other bits."""

    class FakeBench(Workbench):
        interrupt_after = 10**9
        asked = 0

        def check(self, case, config):
            FakeBench.asked += 1
            if FakeBench.asked > FakeBench.interrupt_after:
                raise KeyboardInterrupt
            if config.num_stages == 2:
                raise RuntimeError("out of resource")
            return "other bits" if config.block_n == 16 and config != tune.default_of(case, 90) else ""

        def time(self, case, config, rounds=11):
            return speed(9.0 if config.num_warps == 8 else 10.0, 20.0 + config.num_stages + config.block_n)

    monkeypatch.setattr(tune, "Workbench", FakeBench)
    monkeypatch.setattr(tune, "read_card", lambda device: SUPPOSED._replace(name="A GPU"))
    monkeypatch.setattr(tune, "snapshot", lambda device: {"name": "A GPU"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return FakeBench


def test_a_whole_run(command, card, tmp_path):
    path = tmp_path / "GPU.json"
    kept = {"n": 1, "k": 1, "dtype": "float32", "num_warps": 1, "num_stages": 1, "block_n": 16}
    write_rules(path, {"gate_up": [kept]})
    done = command("--out", str(path), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["file"] == str(path)
    assert not report["interrupted"]
    assert report["without_a_rule"] == []
    assert len(report["cases"]) == 20
    rules = read_rules(path)
    assert kept in rules["gate_up"]
    written = {(op, rule["n"], rule["k"]): rule for op, lines in rules.items() for rule in lines if rule != kept}
    assert len(written) == 20
    for one in report["cases"]:
        rule = written[one["op"], one["n"], one["k"]]
        assert (rule["num_warps"], rule["num_stages"]) == (8, 3)
        assert rule.get("block_n", 0) == one["best"]["block_n"] == (0 if one["op"] == "attention" else 32)
        assert one["timed_again"]
        assert one["failed"] >= 2
        assert (one["rejected"] > 5) == (one["op"] != "attention")


def test_a_table_for_people(command, card, tmp_path):
    done = command("--out", str(tmp_path / "GPU.json"), "--model", "vicuna")
    assert done.exit_code == 0
    assert "+11.1%" in done.stdout
    assert done.stderr == f"tune: wrote {tmp_path / 'GPU.json'}.\n"


def test_ctrl_c_keeps_what_was_found(command, card, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "interrupt_after", 3)
    done = command("--out", str(tmp_path / "GPU.json"), "--json")
    assert done.exit_code == 130
    report = json.loads(done.stdout)
    assert report["interrupted"]
    assert len(report["cases"]) == 3
    assert len(report["without_a_rule"]) == 17
    assert sum(map(len, read_rules(tmp_path / "GPU.json").values())) == 3


def test_nothing_found_writes_nothing(command, card, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "check", lambda self, case, config: "other bits")
    done = command("--out", str(tmp_path / "GPU.json"), "--model", "vicuna")
    assert done.exit_code == 1
    assert "nothing was timed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_time_runs_out(command, card, tmp_path, monkeypatch):
    """With the limit passed after a few trials, the rest is told and not written."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(ticks)))
    done = command("--out", str(tmp_path / "GPU.json"), "--minutes", "0.25", "--model", "vicuna")
    assert done.exit_code == 0
    assert "no rule for" in done.stderr
    assert 0 < sum(map(len, read_rules(tmp_path / "GPU.json").values())) < 7


def test_a_file_that_cannot_be_written_gets_one_sentence(command, card, tmp_path):
    done = command("--out", str(tmp_path / "no" / "GPU.json"), "--model", "vicuna")
    assert done.exit_code == 2
    assert done.stderr == f"tune: {tmp_path / 'no' / 'GPU.json'} cannot be written: No such file or directory.\n"


# ---- on a GPU


@pytest.mark.gpu
def test_tuning_a_real_card(command, tmp_path, monkeypatch):
    """A few candidates of one model, in seconds: every rule launches, and every other bit was refused."""
    real = tune.find_candidates
    monkeypatch.setattr(tune, "find_candidates", lambda case, card: real(case, card)[:3])
    path = tmp_path / "GPU.json"
    done = command("--minutes", "3", "--model", "3.2-1b", "--out", str(path), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["without_a_rule"] == []
    assert all(one["best"]["us"]["1"]["p50"] > 0 for one in report["cases"])
    assert sum(map(len, read_rules(path).values())) == len(report["cases"]) == 7
