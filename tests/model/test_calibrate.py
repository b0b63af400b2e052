"""``kangaroo calibrate``: what it measures, what it writes, and what it refuses before it loads anything."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.commands import cli
from kangaroo_kernels.model.evaluation.calibrate import Calibration, calibrate


def test_the_best_are_measured_again_and_it_ends_in_time(pair: Pair) -> None:
    kangaroo = Kangaroo.from_pretrained(pair.target, pair.adapter, device="cpu")
    plan = Calibration(lengths=(2, 3), thresholds=(0.5, 0.1), max_new_tokens=8, finalists=2)
    reports: list[Any] = []
    rows = calibrate(kangaroo, ["ABCabc"], plan, report=lambda stage, *_: reports.append(stage))
    assert reports == ["calibrating"] * 4 + ["the best again"] * 2
    settings = [(row["num_speculative_tokens"], row["draft_confidence_threshold"]) for row in rows]
    assert sorted(settings) == [(2, 0.1), (2, 0.5), (3, 0.1), (3, 0.5)]
    for part in (rows[:2], rows[2:]):
        assert part[0]["mean_speedup"] >= part[1]["mean_speedup"]
    assert not calibrate(kangaroo, ["ABCabc"], plan, deadline=time.perf_counter() - 1)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command, which measures two settings here."""
    monkeypatch.setattr(Calibration.__init__, "__defaults__", ((2, 3), (0.5,), 128, 1))
    monkeypatch.setattr("sys.argv", ["kangaroo", "calibrate", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


def test_the_command(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(pair.adapter, tmp_path / "adapter")
    before = (adapter / "config.json").read_text()
    (tmp_path / "prompts.json").write_text('["ABCabc"]')
    command = ["--model", pair.target, "--adapter", adapter, "--prompts", tmp_path / "prompts.json"]
    assert run(monkeypatch, *command, "--max-new-tokens", 6, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert (adapter / "config.json").read_text() == before
    assert run(monkeypatch, *command, "--max-new-tokens", 6, "--write") == 0
    out = capsys.readouterr().out
    table, after = (json.loads((adapter / name).read_text()) for name in ("calibration.json", "config.json"))
    best = {name: table[0][name] for name in ("num_speculative_tokens", "draft_confidence_threshold")}
    assert after == json.loads(before) | best | {"calibrated": True}
    assert out.count("\n") >= 4 and f"{table[0]['mean_speedup']:g}" in out


@pytest.mark.parametrize("content", ["[]", "{}", "[1]", "no JSON", None])
def test_prompts_that_are_none(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.json"
    if content is not None:
        prompts.write_text(content)
    assert run(monkeypatch, "--model", "nowhere", "--adapter", "nowhere", "--prompts", prompts) == 2
    said = capsys.readouterr().err
    assert said.startswith("kangaroo: ") and "prompts.json" in said and said.count("\n") == 1
