"""The tuner: what it tries, what it refuses, when it stops, and that its files say what it found."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import tune
import typer
from accuracy import launcher
from gpu_card import Card
from report.job import write_json
from tune import HEADS, Case, Found, Workbench, find_candidates, find_cases, merge_rules, search
from typer.testing import CliRunner

from kangaroo_kernels import launch_config
from kangaroo_kernels.launch_config import LaunchConfig
from kangaroo_kernels.workloads import MODELS, TINY, Settings, workloads

H100 = Card("A GPU", 132, 50 << 20, 90)
DEFAULT = LaunchConfig(4, 4, 32)
OTHERS = [LaunchConfig(4, stages, 32) for stages in (5, 6)]


def case(op="gate_up", n=64, k=32):
    return Case(op, n, k, workloads(TINY)[0])


# ---- what is tried


def test_every_shape_of_the_models_is_a_case_once():
    cases = find_cases(MODELS)
    assert len({case[:3] for case in cases}) == len(cases) == 20
    assert {case[1:3] for case in cases if case.op == "gate_up"} == {(11008, 4096), (14336, 4096), (8192, 2048)}
    assert {case[1:3] for case in cases if case.op == "attention"} == {(128, 16), (128, 64), (64, 64)}


@pytest.mark.parametrize("capability", [80, 90])
def test_candidates_begin_with_the_default(capability):
    for found in find_cases(MODELS):
        default, *others = find_candidates(found, H100._replace(capability=capability))
        assert default == launch_config.pick((f"sm_{capability}.json",), found.op, found.n, found.k, "bfloat16")
        assert len({default, *others}) == 1 + len(others) > 3
        assert {config.block_n for config in others} <= ({0} if found.op == "attention" else {16, 32, 64, 128})
        assert {config.num_warps for config in others} == ({4} if "head" in found.op else {4, 8})
        distances = [config.num_warps != default.num_warps for config in others]
        assert distances == sorted(distances)  # as many warps as the default's come first


# ---- the search


@pytest.mark.parametrize("seconds", [1, 3, 100])
def test_every_case_takes_its_turn_until_the_time_is_over(seconds, monkeypatch):
    """A candidate takes a second here."""
    timed = []
    bench = SimpleNamespace(is_right=lambda *_: True, time=lambda case, config: timed.append((case.n, config)) or 1.0)
    monkeypatch.setattr(tune.time, "monotonic", lambda: len(timed))
    search({case(n=n): [DEFAULT, *OTHERS[:n]] for n in (1, 2)}, bench, seconds, {})
    assert timed == [(1, DEFAULT), (2, DEFAULT), (1, OTHERS[0]), (2, OTHERS[0]), (2, OTHERS[1])][:seconds]


@pytest.mark.parametrize(("us", "best"), [(9.8, OTHERS[0]), (9.95, DEFAULT), (11.0, DEFAULT)])
def test_a_tie_is_the_defaults(us, best):
    assert Found(DEFAULT, {DEFAULT: 10.0, OTHERS[0]: us}).best == best
    assert Found(DEFAULT, {OTHERS[0]: us}).best is None


# ---- the check

OPERATIONS = ["qkv_rope 64", "attention 16", "linear_residual 64", "gate_up 64", "top1_head 64", "sample_head 64"]


@pytest.fixture
def check(monkeypatch, device):
    """``check(name, spoil)``: whether a candidate passes whose results ``spoil(positional, result)`` has changed."""
    monkeypatch.setattr(tune, "CACHE_LENGTH", 130)  # two splits
    shape = TINY._replace(hidden=64, inner=64, heads=2, kv_heads=1, head_dim=32, vocab_size=100)
    cases = {f"{case.op} {case.k}": case for case in find_cases([shape], torch.float32)}

    def verdict(name, spoil=lambda positional, result: None, also_default=False):
        found = cases[name]
        default = find_candidates(found, H100._replace(capability=80))[0]
        candidate = default._replace(num_stages=default.num_stages + 1)  # the default's bits on every machine

        def almost(*positional, **named):
            result = launcher(found.op)(*positional, **named)
            if also_default or launch_config.launch_config(found.op, found.n, found.k, positional[0]) == candidate:
                spoil(positional, result)
            return result

        monkeypatch.setattr(tune, "launcher", lambda op: almost)
        arguments = found.workload.make(Settings(16, 130 if found.op == "attention" else 32, torch.float32, device))
        monkeypatch.setattr(Workbench, "sets", lambda self, case: [arguments])
        with torch.inference_mode():
            return Workbench(device, H100).is_right(found, candidate, default)

    return verdict


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_check_passes_what_is_right(name, check):
    """A confidence is summed tile by tile and may differ in its last digit; a head's tokens are what is fixed."""
    assert check(name, lambda _, result: "head" in name and result.confidence.view(torch.int32)[:1].bitwise_xor_(1))


@pytest.mark.parametrize(("name", "rows"), [*((name, 16) for name in OPERATIONS), ("gate_up 64", 1), ("gate_up 64", 5)])
def test_the_check_sees_one_other_bit(name, rows, check):
    def spoil(positional, result):
        if len(positional[0]) == rows:
            fixed = result[0] if isinstance(result, tuple) else result  # a head's token
            fixed.view(-1)[-1:].view(torch.int32)[0] ^= 1

    assert not check(name, spoil)


def test_the_check_sees_another_row_of_the_cache_and_a_default_that_is_wrong(check):
    def cached(positional, result):
        positional[5][-1, int(positional[6]), -1] *= 1.5

    assert not check("qkv_rope 64", cached)
    assert not check("gate_up 64", lambda positional, result: result.mul_(1.001), also_default=True)


# ---- the file and the command


def test_the_file_has_what_was_found_and_keeps_other_rules(tmp_path):
    exact = {"n": 64, "k": 32, "num_warps": 1, "num_stages": 1, "block_n": 16}
    general = [{"max_n": 100, "num_warps": 16, "num_stages": 2, "block_n": 16}, {"num_warps": 1, "num_stages": 7}]
    existing = {"gate_up": [{**exact, "dtype": "bfloat16"}, {**exact, "dtype": "float16"}, *general]}
    rules = merge_rules(existing, {case(): LaunchConfig(4, 6, 64), case("attention", 128, 64): LaunchConfig(8, 2)})
    path = tmp_path / "GPU.json"
    write_json(path, rules)
    launch_config.rules.cache_clear()
    for op, n, k, dtype, wanted in (
        ("gate_up", 64, 32, "bfloat16", LaunchConfig(4, 6, 64)),  # took the old rule's place
        ("gate_up", 64, 32, "float16", LaunchConfig(1, 1, 16)),
        ("gate_up", 99, 32, "bfloat16", LaunchConfig(16, 2, 16)),  # the general ones stand behind, in their order
        ("gate_up", 999, 32, "bfloat16", LaunchConfig(1, 7)),
        ("attention", 128, 64, "bfloat16", LaunchConfig(8, 2)),
    ):
        assert launch_config.pick((str(path), "sm_80.json"), op, n, k, dtype) == wanted
    launch_config.rules.cache_clear()
    assert len(merge_rules(existing, {case(): None})["gate_up"]) == 3, "the default is as fast"


def command(*arguments):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(tune.main)
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def card(monkeypatch):
    """A card that is not here: 8 warps are faster but for attention, 2 stages fail, 16 columns have other bits."""

    class FakeBench(Workbench):
        def is_right(self, case, config, default):
            if config.num_stages == 2:
                raise RuntimeError("out of resource")
            return config.block_n != 16 or config == default

        def time(self, case, config):
            return (9.0 if config.num_warps == 8 and case.op != "attention" else 10.0) + config.block_n / 100

    monkeypatch.setattr(tune, "Workbench", FakeBench)
    monkeypatch.setattr(tune, "read_card", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return FakeBench


def test_a_whole_run(card, tmp_path):
    """Rules are written where the default was beaten, and nowhere else; what has other bits or fails beats nothing."""
    path = tmp_path / "GPU.json"
    kept = {"n": 1, "k": 1, "dtype": "float32", "num_warps": 1, "num_stages": 1, "block_n": 16}
    write_json(path, {"gate_up": [kept]})
    done = command("--out", path)
    assert done.exit_code == 0, done.output
    assert done.stderr == f"tune: 11 of 20 shapes are faster than by default; {path} says how.\n"
    rules = json.loads(path.read_text())
    assert kept in rules["gate_up"]
    written = {(op, rule["n"], rule["k"]): rule for op, lines in rules.items() for rule in lines if rule != kept}
    assert set(written) == {case[:3] for case in find_cases(MODELS) if case.op not in {"attention", *HEADS}}
    assert {(rule["num_warps"], rule["block_n"]) for rule in written.values()} == {(8, 32)}
    said = "(4, 4, 32) 10.3 us -> (8, 4, 32) 9.3 us, +10.7% (56 tried, 12 rejected, 8 failed by RuntimeError)"
    assert f"qkv_rope n=12288 k=4096: {said}\n" in done.stdout


@pytest.mark.parametrize(
    ("is_right", "code", "said"),
    [
        (Mock(return_value=False), 1, "nothing (1 tried, 1 rejected)"),  # nothing to hold the others against
        (Mock(side_effect=RuntimeError), 1, "nothing (1 tried, 1 failed by RuntimeError)"),
        (Mock(side_effect=KeyboardInterrupt), 130, "not reached; more --minutes may"),
    ],
)
def test_nothing_found_writes_nothing(is_right, code, said, card, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "is_right", is_right)
    done = command("--out", tmp_path / "GPU.json")
    assert done.exit_code == code
    assert f"gate_up n=11008 k=4096: {said}\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_was_found(card, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "is_right", Mock(side_effect=[*[True] * 800, KeyboardInterrupt]))
    done = command("--out", tmp_path / "GPU.json")
    assert (done.exit_code, len(done.stdout.splitlines())) == (130, 20)
    assert json.loads((tmp_path / "GPU.json").read_text())["gate_up"]


@pytest.mark.parametrize("content", ["{", "[]", '{"gate_up": 3}', None])
def test_a_file_that_cannot_serve_is_refused_before_any_work(content, card, tmp_path):
    path = tmp_path / ("GPU.json" if content else "no/GPU.json")
    if content:
        path.write_text(content)
    done = command("--out", path)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"tune: {path} {'does not map' if content else 'cannot be written'}")


@pytest.mark.gpu
def test_tuning_a_real_card(tmp_path, monkeypatch):
    """A few candidates of one model, in seconds: every one launches, and every other bit was refused."""
    monkeypatch.setattr(tune, "MODELS", MODELS[2:])
    monkeypatch.setattr(tune, "find_candidates", lambda case, card: find_candidates(case, card)[:3])
    done = command("--minutes", "3", "--out", tmp_path / "GPU.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("->") == len(find_cases(MODELS[2:]))
