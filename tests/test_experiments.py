"""``tools/experiments.py``: the points of each experiment, a record that goes on where it stopped, and a picture."""

import json
import random
from pathlib import Path
from typing import Any

import experiment_adapters
import experiment_pictures
import experiments
import pytest
import typer
from conftest import Pair
from typer.testing import CliRunner

from kangaroo_kernels.model.drafters.parts import Parts
from kangaroo_kernels.model.evaluation.plan import find_shapes
from kangaroo_kernels.model.evaluation.statistics import Row

POINTS = {"drafting": 4, "positions": 2, "temperature": 4, "domains": 2}


@pytest.fixture
def run(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the tool with a small grid and two questions; gives its exit code, its record, and whether it drew."""
    monkeypatch.setattr(experiments, "LENGTHS", (1, 3))
    monkeypatch.setattr(experiments, "THRESHOLDS", (0.0, 0.6))
    monkeypatch.setattr(experiments, "TEMPERATURES", (0.0, 1.0))
    questions = tmp_path / "question.jsonl"
    lines = [{"question_id": each, "category": each, "turns": ["ABC" + each]} for each in "xy"]
    questions.write_text("\n".join(map(json.dumps, lines)))

    def call(experiment: str, *more: object) -> tuple[int, Any, bool]:
        app = typer.Typer()
        app.command()(experiments.main)
        given = ["--out", tmp_path / "out", "--model", pair.target, "--questions", questions, "--max-new-tokens", 8]
        adapters = [] if {"--adapter", "--data"} & {*more} else ["--adapter", pair.adapter]
        done = CliRunner().invoke(app, [experiment, *map(str, [*given, *adapters, *more])])
        record, picture = (tmp_path / "out" / f"{experiment}.{kind}" for kind in ("json", "png"))
        drew = picture.exists() and picture.read_bytes().startswith(b"\x89PNG")
        return done.exit_code, json.loads(record.read_text()) if record.exists() else done.stderr, drew

    return call


@pytest.mark.parametrize(("experiment", "count"), POINTS.items())
def test_every_point_is_measured_and_drawn(experiment: str, count: int, run: Any) -> None:
    code, record, drew = run(experiment)
    assert (code, drew, len({each["category"] for each in record["rows"]})) == (0, True, count)
    for each in record["rows"]:
        greedy_or_coupled = each["settings"].get("acceptance") != "rejection" or not each["settings"]["temperature"]
        assert each["identical"] == each["texts"] or not greedy_or_coupled
        assert set(Row.__dataclass_fields__) | {"settings"} == each.keys()
    if experiment == "drafting":
        fixed = [each for each in record["rows"] if each["settings"]["draft_confidence_threshold"] == 0]
        drafts = {
            each["settings"]["num_speculative_tokens"]: each["num_draft_tokens"] / each["num_spec_steps"]
            for each in fixed
        }
        assert drafts[1] == 1 and drafts[3] > 2  # the last steps of a text have room for fewer
    if experiment == "temperature":
        assert [each["questions"] for each in record["rows"]] == [2, 4, 2, 4]  # two seeds where they matter


def test_adapters_stand_beside_each_other(pair: Pair, run: Any) -> None:
    again = pair.adapter / ".." / "adapter"
    code, record, drew = run("adapters", "--adapter", pair.adapter, "--adapter", again)
    assert (code, drew) == (0, True)
    first, second = record["rows"]
    assert [first["category"], second["category"]] == [str(pair.adapter), str(again)]
    assert first["acceptance_histogram"] == second["acceptance_histogram"]


def test_a_form_that_the_target_has_already_is_left_out() -> None:
    """The bundled target has as many key-value heads as heads; SmolLM2 and the pairs of tests have fewer."""
    assert "key-value heads of its own" not in experiment_adapters.forms(find_shapes("demo").shape)


def test_adapters_are_trained_and_compared(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same data; what is trained already is not trained again."""
    data, trained = tmp_path / "data.txt", []
    data.write_text("".join(random.Random(0).choices("ABCDEFGHIJ", k=4000)))
    train = experiment_adapters.train_adapters
    monkeypatch.setattr(
        experiment_adapters, "train_adapters", lambda runs, report: (trained.append(len(runs)), train(runs, report))
    )
    more = ("--data", data, "--steps", 2, "--per-category", 1)
    code, exits, drew = run("exits", *more)
    assert (code, drew, [each["category"] for each in exits["rows"]]) == (0, True, ["exit 1", "exit 2"])
    code, forms, drew = run("forms", *more)
    assert (code, drew, len(forms["rows"])) == (0, True, 8)
    configs = [json.loads(file.read_text()) for file in sorted((tmp_path / "out" / "forms").glob("*/config.json"))]
    found = [
        {
            name: each[name]
            for name in ("draft_vocab_size", *Parts._fields, "mlp", "num_key_value_heads")
            if each.get(name) and (name, each[name]) != ("num_key_value_heads", 2)
        }
        for each in configs
    ]
    assert found == [
        {"deep_state_size": 48},
        {"draft_head_rank": 12},
        {"draft_vocab_size": 16},
        {"trained_confidence": True},
        {"mlp": True},
        {},
        {"draft_block": 4},
        {"num_key_value_heads": 4},
    ]
    assert {each["exit_layer"] for each in configs} == {2}
    assert trained == [2, *[1] * 8]  # the exits in one run
    code, ablation, drew = run("ablation", *more)
    assert (code, drew, len(ablation["rows"])) == (0, True, 10)
    assert all(each["identical"] == each["texts"] and each["num_draft_tokens"] for each in ablation["rows"])
    (tmp_path / "out" / "exits.json").unlink()
    assert run("exits", *more)[0] == 0 and len(trained) == 9
    data.write_text(data.read_text()[1:])
    assert run("exits", *more)[0] == 2  # the record is of other data


def test_pictures_of_what_cannot_be_said() -> None:
    """One question has no interval; where every step is in a loop, nothing is fresh."""
    file = Path(experiments.__file__).parents[1] / "bench" / "results" / "cpu" / "experiment_temperature.json"
    points = json.loads(file.read_text())["rows"]
    for place, point in enumerate(points):
        point["category"] = f"exit {place}"
        for figure in ("mean_acceptance_length", "speedup"):
            point[figure] |= {"low": None, "high": None}
        point["fresh_acceptance_length"] = {"value": None, "low": None, "high": None}
    for name in ("temperature", "domains", "exits"):
        assert experiment_pictures.PICTURES[name](points, "speedup")


def test_a_stopped_experiment_goes_on(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, seen = experiments.measure, []

    def stop_at_the_second(kangaroo: Any, point: Any, *rest: Any) -> Any:
        seen.append(point.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(kangaroo, point, *rest)

    monkeypatch.setattr(experiments, "measure", stop_at_the_second)
    code, record, drew = run("positions")
    assert (code, drew, len(record["rows"])) == (130, False, 1)
    kept = record["rows"][0]
    code, record, drew = run("positions")
    assert (code, drew, record["rows"][0] == kept, seen) == (
        0,
        True,
        True,
        ["threshold 0", "threshold 0.6", "threshold 0.6"],
    )
    assert run("positions", "--per-category", 1)[0] == 0  # both categories have one question
    code, _, _ = run("positions", "--max-new-tokens", 9)
    assert code == 2
    questions, record = tmp_path / "question.jsonl", tmp_path / "out" / "positions.json"
    questions.write_text(questions.read_text().replace("ABC", "ABD"))
    assert run("positions")[0] == 2, "the figures are of other questions"
    for damaged in ("null", "[1]"):
        record.write_text(damaged)
        assert run("positions")[0] == 2


def test_the_bundled_pair_has_prompts_of_its_own() -> None:
    held_out = experiments.read(None, "demo", "drafting", None)
    assert {question.category for question in held_out} == {"held-out code"} and len(held_out) == 8
    ours = experiments.read(None, "demo", "domains", 1)
    assert [question.category for question in ours] == [
        "code", "maths", "medicine", "law", "german", "french", "chinese", "unlike"
    ]  # fmt: skip
    assert experiments.read(None, "smollm2", "drafting", 1) == ours
