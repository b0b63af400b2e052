"""``kangaroo eval``: what it prints and writes, how it ends, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair

from kangaroo_kernels.model.commands import cli
from kangaroo_kernels.model.evaluation import evaluate

LINES = [
    {"question_id": 1, "category": "writing", "turns": ["ABC", "DEF"]},
    {"question_id": 2, "category": "maths", "turns": ["GHI"]},
    {"question_id": 3, "category": "maths", "turns": ["JKL"]},
]


@pytest.fixture
def command(pair: Pair, tmp_path: Path) -> list[object]:
    questions = tmp_path / "question.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return ["--model", pair.target, "--questions", questions, "--out", tmp_path / "out", "--max-new-tokens", 12]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command; gives its exit code, and what it said on stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kangaroo", "eval", "--device", "cpu", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


def test_it_reports_and_goes_on(pair: Pair, command: list[object], tmp_path: Path, run: Any) -> None:
    command += ["--adapter", pair.adapter]
    code, out, err = run(*command, "--per-category", 1)
    assert code == 0 and "answering 100%" in err
    assert all(
        word in out for word in ("writing", "maths", "all", "2 of 2", "3 of 3", str(tmp_path / "out").split("/")[-1])
    )
    code, out, err = run(*command, "--json")
    record = json.loads(out)
    assert (code, record["answered"]) == (0, 3)
    assert record["environment"]["versions"]["torch"]
    assert record == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"plain.jsonl", "kangaroo.jsonl", "report.md"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_prompt_lookup_drafts_without_an_adapter(command: list[object], run: Any) -> None:
    code, out, _ = run(*command, "--json", "--temperature", 0.7, "--seed", 3)
    record = json.loads(out)
    assert (code, record["settings"]["adapter"], record["settings"]["temperature"]) == (0, None, 0.7)
    assert record["categories"][-1]["identical"] == 4


def test_how_much_is_drafted_may_be_said(pair: Pair, command: list[object], run: Any) -> None:
    limits = ("--num-speculative-tokens", 1, "--draft-confidence-threshold", 0)
    code, out, _ = run(*command, "--adapter", pair.adapter, "--json", *limits)
    record = json.loads(out)
    assert (code, record["settings"]["num_speculative_tokens"]) == (0, 1)
    counts = record["categories"][-1]
    assert len(counts["acceptance_histogram"]) == 2  # none or one accepted
    assert counts["num_draft_tokens"] > 0.9 * counts["num_spec_steps"]  # but where a text ends


def test_transformers_beside_us(pair: Pair, command: list[object], run: Any) -> None:
    code, out, err = run(*command, "--against", "transformers")
    assert code == 0 and "There is no assisted generation, which needs an adapter." in err
    assert "prefill included" in out and "4 of 4" in out.split("transformers")[1]


def test_ctrl_c_keeps_what_is_there(command: list[object], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = evaluate.answer, []

    def interrupted(kangaroo: Any, question: Any, *rest: Any) -> Any:
        asked.append(question.question_id)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(kangaroo, question, *rest)

    monkeypatch.setattr(evaluate, "answer", interrupted)
    code, out, err = run(*command)
    assert code == 130 and "2 of 3 questions are left. The same command goes on" in err
    assert "writing" in out and "maths" not in out
    assert run(*command)[0] == 0 and asked == [1, 2, 2, 3]


def test_ctrl_c_before_the_first_question(
    command: list[object], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.Run, "keep_those_that_fit", interrupted)
    assert run(*command)[:2] == (130, "")
    assert not (tmp_path / "out").exists()


def test_a_text_that_differs_is_an_error(command: list[object], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = evaluate.answer_both

    def wrong(*given: Any) -> Any:
        turns = both(*given)
        turns["kangaroo"] = replace(turns["kangaroo"], tokens=turns["kangaroo"].tokens[:-1])
        return turns

    monkeypatch.setattr(evaluate, "answer_both", wrong)
    code, out, _ = run(*command)
    assert code == 1 and "Question 1, turn 1: kangaroo differs from plain decoding from token 12 on" in out
    assert "0 of 2" in out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--against", "vllm"], "--against is 'vllm'; it must be 'transformers'."),
        (["--against", "transformers", "--temperature", 1], "--against compares greedy texts"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_refusals(command: list[object], tmp_path: Path, more: list[object], sentence: str, run: Any) -> None:
    code, out, err = run(*command, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("kangaroo: ") and sentence in err
    assert not (tmp_path / "out").exists()
