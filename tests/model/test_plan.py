"""``kangaroo plan``: held to every measured figure that exists, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model.commands import cli
from kangaroo_kernels.model.evaluation.plan import (
    CPU,
    PAPER,
    Plan,
    Profile,
    find_machine,
    find_shape,
    read_profile,
)

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu"
TEXT = 200
"""Tokens of the records' texts, prompt included, about."""


def record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def demo() -> Any:
    return find_shape("demo")


def plain(shape: Any, **more: Any) -> float:
    return 1 / Plan(shape, CPU, length=TEXT, **more).seconds(shape.layers, 0, 1)


def test_plain_decoding_as_recorded(demo):
    """Two figures were fitted to the medians of the first two groups; the others are what came of it."""
    bench, smollm2 = record("decode")["benchmarks"], record("smollm2")["benchmarks"]
    small = [each["extra_info"]["decode_tokens_per_second"] for each in bench if each["param"].endswith("-plain")]
    large = {
        dtype: [each["extra_info"]["tokens_per_second"] for each in smollm2 if each["param"].endswith(dtype)]
        for dtype in ("-plain", "32")
    }
    assert len(small) == 8 and [len(group) for group in large.values()] == [4, 4]
    shape = find_shape("SmolLM2-135M")
    for measured, planned, off in (
        (small, plain(demo), 0.15),
        (large["-plain"], plain(shape), 0.15),
        (large["32"], plain(shape, itemsize=4), 0.35),
        ([each["plain_tokens_per_second"] for each in record("demo_pair")["prompts"]], plain(demo), 0.26),
        ([each["plain_tokens_per_second"] for each in record("demo_smollm2")["prompts"]], plain(shape), 0.15),
    ):
        for speed in measured:
            assert speed == pytest.approx(planned, rel=off)


def test_speedups_as_recorded(demo):
    """With each prompt's own acceptance, the plan is above what was measured by at most an eighth."""
    for each in record("demo_pair")["prompts"]:
        plan = Plan(demo, CPU, read_profile({"total": each}, "a record"), length=TEXT)
        found = plan.predict(4, 6)
        assert found.tokens_per_step == pytest.approx(each["mean_acceptance_length"], rel=0.12)
        assert 1.0 < found.speedup / each["speedup"] < 1.125
        assert found.speedup == pytest.approx(found.tokens_per_step / found.break_even_tokens_per_step)


def test_a_profile_gives_back_what_it_was_read_from():
    accepted, drafts = [0.8, 0.6, 0.3], 2.6
    profile = Profile.of(accepted, drafts, "a test")
    shares, made = profile.first(3)
    assert shares == accepted
    assert sum(made) == pytest.approx(drafts)
    assert profile.first(2)[1] == made[:2]
    assert profile.first(4)[0][3] == pytest.approx(0.15)  # half as often, as the third after the second
    assert 1 + sum(PAPER.first(6)[0]) == pytest.approx(1.93)
    assert Profile.of([0.0], 1.0, "never right").first(3) == ([0.0] * 3, [1.0, 0.0, 0.0])


def test_reports_that_hold_a_profile():
    rates = {"acceptance_rate_per_position": [0.5, 0.25], "draft_acceptance_rate": 0.5}
    counts = {"acceptance_histogram": [2, 1, 1], "num_spec_steps": 4, "num_draft_tokens": 6}
    found = [read_profile(report, "x") for report in ({"total": rates}, {"comparison": rates}, rates)]
    assert found == [read_profile({"categories": [{}, counts]}, "x")] * 3
    assert found[0].accepted == (0.5, 0.25)
    for report in ([], {}, {"total": {"draft_acceptance_rate": 0}}, {"acceptance_rate_per_position": []}):
        with pytest.raises(KangarooError, match="x has no acceptance rates"):
            read_profile(report, "x")


def test_cards_that_share_a_model():
    shape = find_shape("llama-3.1-70b")
    alone, shared = (Plan(shape, find_machine("H100"), cards=cards) for cards in (1, 4))
    assert shared.bytes_per_card == alone.bytes_per_card / 4
    exchanges = (2 * shape.layers + 1) * shared.machine.exchange
    operations = (5 * shape.layers + 1) * shared.machine.seconds_per_operation
    assert shared.seconds(80, 0, 1) - exchanges - operations == pytest.approx(
        (alone.seconds(80, 0, 1) - operations) / 4
    )
    assert sum("cards share" in sentence for sentence in shared.assumptions()) == 1


def test_every_gpu_is_named_an_assumption():
    for name in ("a100", "H100", "H200"):
        plan = Plan(find_shape("Vicuna-7B"), find_machine(name))
        assert plan.assumptions()[0].startswith(f"{name.upper()}: assumed, not measured")
    assert "assumed" not in Plan(find_shape("Vicuna-7B"), CPU).assumptions()[0]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["kangaroo", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


def test_the_command(pair, tmp_path, monkeypatch, capsys):
    picture, profile = tmp_path / "plan.png", tmp_path / "profile.json"
    profile.write_text(json.dumps({"acceptance_rate_per_position": [0.5], "draft_acceptance_rate": 0.5}))
    command = ("--model", pair.target / "config.json", "--card", "H100", "--profile", profile, "--exit-layer", 2)
    assert run(monkeypatch, *command, "--picture", picture, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["speedup"] == pytest.approx(found["speedup_by_exit_layer"]["2"][5])
    assert set(found["speedup_by_exit_layer"]) == {"1", "2"}
    assert run(monkeypatch, *command) == 0
    out = capsys.readouterr().out
    assert "planned, not measured" in out and "assumed, not measured" in out
    assert f"{found['kangaroo_tokens_per_second']:,.2f}" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--card", "H900"), "known are A100, H100, H200, CPU"),
        (("--card", "H100", "--tensor-parallel", 3), "tensor_parallel is 3; it must divide the 32 attention heads"),
        (("--card", "CPU", "--tensor-parallel", 2), "give a GPU"),
        (("--card", "H100", "--exit-layer", 32), "allows 1 to 31"),
        (("--card", "H100", "--num-speculative-tokens", 16), "from 1 to 15"),
        (("--card", "H100", "--length", 0), "at least 1"),
        (("--card", "H100", "--profile", __file__), "is no JSON"),
    ],
)
def test_what_it_refuses(arguments, said, monkeypatch, capsys):
    assert run(monkeypatch, "--model", "Vicuna-7B", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("kangaroo: ") and said in " ".join(error.split()) and error.count("\n") == 1
