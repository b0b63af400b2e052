"""``kangaroo calibrate``: what it measures, what it writes, and what it refuses before it loads anything."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair
from pairs import make_adapter

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.commands import cli
from kangaroo_kernels.model.drafters.ways import CHAINS
from kangaroo_kernels.model.evaluation.calibrate import (
    Calibration,
    Tried,
    calibrate,
    kind_of,
    measure,
    write_defaults,
)


def test_the_best_are_measured_again_and_it_ends_in_time(pair: Pair) -> None:
    kangaroo = Kangaroo.from_pretrained(pair.target, pair.adapter, device="cpu")
    plan = Calibration(lengths=(2, 3), thresholds=(0.5, 0.1), trees=(4,), max_new_tokens=8, finalists=2)
    reports: list[Any] = []
    rows = calibrate(kangaroo, ["ABCabc"], plan, report=lambda stage, *_: reports.append(stage))
    settings = {kind: [tuple(row.values())[2:4] for row in rows if kind_of(row) == kind] for kind in map(kind_of, rows)}
    assert sorted(settings["chains"]) == [(2, 0.1), (2, 0.5), (3, 0.1), (3, 0.5)]
    (length,), thresholds = ({*column} for column in zip(*settings["chains and lookup"], strict=True))
    assert max(thresholds) in (0.5, 0.1) and min(thresholds) == max(thresholds) / 2
    assert sorted(settings["trees"]) == sorted((each, least) for each in {length, 3} for least in thresholds)
    assert sorted(settings["trees and lookup"]) == sorted(settings["trees"])
    others = len(rows) - len(settings["chains"])
    assert reports == ["calibrating"] * 4 + ["other ways"] * others + ["the best again"] * 2
    for part in (rows[:2], rows[2:]):
        speeds = [row["mean_speedup"] for row in part]
        assert speeds == sorted(speeds, reverse=True)
    assert not calibrate(kangaroo, ["ABCabc"], plan, deadline=time.perf_counter() - 1)


def test_a_block_is_tried_with_the_drafts_that_it_has(pair: Pair, tmp_path: Path) -> None:
    """And in no other way than its own."""
    adapter = make_adapter(tmp_path / "block", pair.target, exit_layer=2, draft_block=3)
    kangaroo = Kangaroo.from_pretrained(pair.target, adapter, device="cpu")
    plan = Calibration(lengths=(2, 3, 4), thresholds=(0.1,), trees=(4,), max_new_tokens=8, finalists=1)
    rows = calibrate(kangaroo, ["ABC"], plan)
    assert sorted(row["num_speculative_tokens"] for row in rows) == [2, 3]
    assert not any(row["draft_tree"] or row["prompt_lookup"] for row in rows)


def test_both_ways_are_warm_before_they_are_timed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a first text captures graphs, and every setting has new memory."""
    kangaroo, asked = Kangaroo.from_pretrained(pair.target, pair.adapter, device="cpu"), list[bool]()
    generate = Kangaroo.generate

    def note(self: Kangaroo, prompt: Any, settings: Any = None, **keywords: Any) -> Any:
        asked.append(keywords.get("plain", settings is not None and settings.plain))
        return generate(self, prompt, *([] if settings is None else [settings]), **keywords)

    monkeypatch.setattr(Kangaroo, "generate", note)
    measure(kangaroo, ["ABC", "BCA"], Tried(CHAINS, 3, 0.5), 4)
    assert asked == [True, False] + 2 * [True, False]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command, which measures two settings of chains and two with lookup here."""
    monkeypatch.setattr(Calibration.__init__, "__defaults__", ((2, 3), (0.5,), (), 128, 1))
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
    assert run(monkeypatch, *command, "--max-new-tokens", 6, "--dtype", "float16", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert (adapter / "config.json").read_text() == before
    assert run(monkeypatch, *command, "--max-new-tokens", 6, "--write", "--picture", tmp_path / "frontier.png") == 0
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    table, after = (json.loads((adapter / name).read_text()) for name in ("calibration.json", "config.json"))
    best = {name: table[0][name] for name in ("num_speculative_tokens", "draft_confidence_threshold")}
    best |= {"prompt_lookup": True} if table[0]["prompt_lookup"] else {}
    assert after == json.loads(before) | best | {"calibrated": True}
    assert out.count("\n") >= 4 and f"{table[0]['mean_speedup']:g}" in out


def test_what_wins_becomes_the_default(pair: Pair, tmp_path: Path) -> None:
    """The adapter then drafts so on either loop, unless a caller says otherwise."""
    adapter = shutil.copytree(pair.adapter, tmp_path / "adapter")
    row = {"num_speculative_tokens": 3, "draft_confidence_threshold": 0.25, "draft_tree": 0, "prompt_lookup": False}

    def drafter(**given: Any) -> str:
        return type(Kangaroo.from_pretrained(pair.target, adapter, device="cpu", **given).drafter).__name__

    for found, name, other in (
        ({"prompt_lookup": True}, "KangarooWithLookup", {"prompt_lookup": False}),
        ({"draft_tree": 7}, "TreeDrafter", {"draft_tree": 0}),
        ({"draft_tree": 7, "prompt_lookup": True}, "TreeWithLookup", {"draft_tree": 0, "prompt_lookup": False}),
        ({}, "KangarooDrafter", {"prompt_lookup": True}),
    ):
        write_defaults(adapter, [row | found])
        assert drafter() == name
        assert drafter(**other) == ("KangarooDrafter" if found else "KangarooWithLookup")
    write_defaults(adapter, [row | {"draft_tree": 7}])
    assert drafter(prompt_lookup=True) == "TreeWithLookup"
    assert drafter(persistent=True) == "KangarooDrafter"
    write_defaults(adapter, [row | {"prompt_lookup": True}])
    assert drafter(kernels="triton", dtype="float32") == "KangarooWithLookup"
    assert drafter(persistent=True) == "KangarooDrafter"
    values = json.loads((adapter / "config.json").read_text())
    for wrong, words in (
        ({"draft_tree": 16}, "from 1 to 15"),
        ({"prompt_lookup": 1}, "true"),
    ):
        (adapter / "config.json").write_text(json.dumps(values | wrong))
        with pytest.raises(KangarooError, match=words):
            drafter()


def test_defaults_are_for_a_folder_and_come_behind_their_table(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.json").write_text('["ABC"]')
    command = ["--model", "nowhere", "--adapter", "owner/name", "--prompts", tmp_path / "prompts.json", "--write"]
    assert run(monkeypatch, *command) == 2
    assert "'owner/name' is none" in capsys.readouterr().err, "hours of measuring would be lost"
    adapter = shutil.copytree(pair.adapter, tmp_path / "adapter")
    command[3] = adapter
    for place, sentence in (("p.foo", "must end in .png, .svg or .pdf"), ("gone/p.png", "there is no folder")):
        assert run(monkeypatch, *command, "--picture", tmp_path / place) == 2
        assert sentence in capsys.readouterr().err
    before, replace = (adapter / "config.json").read_text(), os.replace

    def killed(source: Path, to: Path) -> None:
        replace(source, to) if to.name == "calibration.json" else pytest.fail("killed")

    monkeypatch.setattr(os, "replace", killed)
    row = {"num_speculative_tokens": 3, "draft_confidence_threshold": 0.25, "draft_tree": 0, "prompt_lookup": False}
    with pytest.raises(pytest.fail.Exception):
        write_defaults(adapter, [row])
    assert (adapter / "config.json").read_text() == before
    assert json.loads((adapter / "calibration.json").read_text()) == [row]


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
