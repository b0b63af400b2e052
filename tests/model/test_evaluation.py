"""``kangaroo eval``: its questions, its answers, how it keeps them, and the figures that it makes of them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Pair
from pairs import CHAT_TEMPLATE, make_adapter, make_target, make_tokenizer

from kangaroo_kernels import Kangaroo, KangarooError, Settings
from kangaroo_kernels.model.demo import bundled_pair
from kangaroo_kernels.model.evaluation import plots
from kangaroo_kernels.model.evaluation import questions as questions_module
from kangaroo_kernels.model.evaluation.answers import Answer, Turn
from kangaroo_kernels.model.evaluation.evaluate import KANGAROO, PLAIN, Run, answer, evaluate, first_difference
from kangaroo_kernels.model.evaluation.others import ASSISTED, TRANSFORMERS, steps_of, transformers_ways
from kangaroo_kernels.model.evaluation.questions import Question, in_turns, read_questions
from kangaroo_kernels.model.evaluation.report import Report, describe
from kangaroo_kernels.model.evaluation.statistics import Estimate, row, rows

SETTINGS = Settings(max_new_tokens=24, draft_confidence_threshold=0.0)
QUESTIONS = [Question(1, "writing", ("ABC", "DEF")), Question("two", "maths", ("GHI",)), Question(3, "maths", ("J",))]


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def as_line(question: Question) -> dict[str, Any]:
    return {**vars(question), "source": "SPEED-Bench has more fields"}


def silent(*_: Any) -> None:
    pass


# ---- questions


def test_a_file_of_questions(tmp_path: Path) -> None:
    lines = [as_line(question) for question in QUESTIONS]
    assert read_questions(write(tmp_path / "question.jsonl", lines[0], "", *lines[1:])) == QUESTIONS
    odd = replace(QUESTIONS[0], turns=("a\u2028b",))
    (tmp_path / "odd.jsonl").write_text(json.dumps(as_line(odd), ensure_ascii=False), encoding="utf-8")
    assert read_questions(tmp_path / "odd.jsonl") == [odd]  # the character ends a line for Python, not for JSON


GOOD = '{"question_id": 1, "category": "a", "turns": ["b"]}'
BAD_LINES = {
    "no JSON": "line 2 is no JSON",
    "[1]": "line 2 must be an object",
    "[" * 100_000: "line 2 is no JSON",
    '{"question_id": 2, "category": "all", "turns": ["b"]}': "line 2: category is 'all', as reports call all",
    r'{"question_id": 2, "category": "a", "turns": ["\ud83d"]}': "line 2 holds a lone surrogate",
    '{"question_id": 1.5, "category": "a", "turns": ["b"]}': "line 2: question_id is 1.5",
    '{"question_id": 2, "turns": ["b"]}': "line 2: category is None",
    '{"question_id": 2, "category": "a", "turns": []}': "line 2: turns must be",
    '{"question_id": 2, "category": "a", "turns": ["b", ""]}': "line 2: turns must be",
    GOOD: "line 2: the question_id 1 stands twice",
    GOOD.replace("1", "2").replace(
        '"b"', '"FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE x"'
    ): "line 2: the text",
}


@pytest.mark.parametrize(("line", "sentence"), BAD_LINES.items())
def test_a_line_that_is_no_question(line: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(KangarooError, match="question.jsonl, " + sentence.replace("[", r"\[")):
        read_questions(write(tmp_path / "question.jsonl", GOOD, line))


def test_a_mark_of_byte_order_is_no_part_of_a_question(tmp_path: Path) -> None:
    assert [each.turns for each in read_questions(write(tmp_path / "question.jsonl", "\ufeff" + GOOD))] == [("b",)]


def test_a_file_that_holds_none(tmp_path: Path) -> None:
    with pytest.raises(KangarooError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    with pytest.raises(KangarooError, match="not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


SPEED_BENCH = {"sub_category": "x", "source": "y", "src_id": "z", "difficulty": None, "multiturn": True}
"""Columns of SPEED-Bench's that are not read; its question_id is a text."""


def test_speed_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set's Parquet, and the JSON lines that NeMo Skills makes of it, which have messages for turns."""
    from pyarrow import Table
    from pyarrow.parquet import write_table

    questions = [replace(question, question_id=f"q{number}") for number, question in enumerate(QUESTIONS)]
    rows = [{**vars(question), "turns": list(question.turns), **SPEED_BENCH} for question in questions]
    write_table(Table.from_pylist(rows), tmp_path / "test.parquet")
    assert read_questions(tmp_path / "test.parquet") == questions
    lines = [row | {"messages": [{"role": "user", "content": turn} for turn in row.pop("turns")]} for row in rows]
    assert read_questions(write(tmp_path / "qualitative.jsonl", *lines)) == questions

    lines[1]["messages"].insert(0, {"role": "system", "content": "S"})
    with pytest.raises(KangarooError, match="line 2: messages must be a list of the user's"):
        read_questions(write(tmp_path / "qualitative.jsonl", *lines))
    write_table(Table.from_pylist([{"question_id": "q", "turns": ["x"]}]), tmp_path / "test.parquet")
    with pytest.raises(KangarooError, match=r"test.parquet, row 1: category is None"):
        read_questions(tmp_path / "test.parquet")
    (tmp_path / "test.parquet").write_text("no Parquet")
    with pytest.raises(KangarooError, match="is damaged or no Parquet file"):
        read_questions(tmp_path / "test.parquet")
    monkeypatch.setattr(questions_module, "find_spec", lambda _: None)
    with pytest.raises(KangarooError, match="pip install pyarrow"):
        read_questions(tmp_path / "test.parquet")


def test_categories_take_turns() -> None:
    questions = [Question(number, category, ("x",)) for number, category in enumerate("aaabbc")]
    assert "".join(question.category for question in in_turns(questions)) == "abcaba"
    assert [question.question_id for question in in_turns(questions, 1)] == [0, 3, 5]


# ---- answers


def test_both_ways_get_the_prompts_of_a_conversation(tmp_path: Path) -> None:
    """By the chat template where there is one, else the texts in a row; a later turn sees the answers before it."""
    target = make_tokenizer(make_target(tmp_path / "t", quiet_from=2, quiet=0.2), chat_template=CHAT_TEMPLATE)
    adapter = make_adapter(tmp_path / "a", target, exit_layer=2, copy_layer=2)
    kangaroo = Kangaroo.from_pretrained(target, adapter, device="cpu")
    found = answer(kangaroo, QUESTIONS[0], SETTINGS, {})
    first = kangaroo.chat([{"role": "user", "content": "ABC"}], SETTINGS)
    talk = [("user", "ABC"), ("assistant", first.text), ("user", "DEF")]
    second = kangaroo.chat([{"role": role, "content": text} for role, text in talk], SETTINGS)
    for way in (PLAIN, KANGAROO):
        assert [turn.tokens for turn in found[way].turns] == [first.tokens, second.tokens]
        assert [turn.text for turn in found[way].turns] == [first.text, second.text]
        assert not found[way].differences
    for turn, wanted in zip(found[KANGAROO].turns, (first, second), strict=True):
        stats = wanted.stats
        assert (sum(turn.drafted), sum(turn.accepted)) == (stats.drafted, stats.accepted)
        assert sum(turn.draft_steps) == stats.draft_steps > 0
        assert (sum(turn.lengths), len(turn.lengths)) == (stats.new_tokens, stats.verification_steps)
    assert {count for turn in found[PLAIN].turns for count in turn.drafted} == {0}
    assert all(turn.processor_seconds > 0 for each in found.values() for turn in each.turns)

    kangaroo.tokenizer.chat_template = None
    found = answer(kangaroo, QUESTIONS[0], SETTINGS, {})
    first = kangaroo.generate("ABC", SETTINGS)
    assert found[KANGAROO].turns[0].tokens == first.tokens
    assert found[KANGAROO].turns[1].tokens == kangaroo.generate(f"ABC\n{first.text}\nDEF", SETTINGS).tokens


def test_a_conversation_ends_where_the_context_does(pair: Pair) -> None:
    found = answer(pair.load(), Question(1, "a", ("A" * 500, "B")), SETTINGS, {})
    assert [len(found[way].turns) for way in (PLAIN, KANGAROO)] == [1, 1]


def test_the_lines_are_those_of_spec_bench(pair: Pair) -> None:
    """Its speed.py and equal.py read category, and of choices[0] turns, new_tokens, wall_time and accept_lengths."""
    found = answer(pair.load(), QUESTIONS[0], SETTINGS, {})[KANGAROO]
    turns = [replace(turn, draft_steps=list(range(len(turn.lengths)))) for turn in found.turns]  # no other counts
    wanted = replace(found, turns=turns)
    line = json.loads(wanted.line("m-kangaroo"))
    assert {"question_id", "category", "model_id", "choices", "tstamp"} <= line.keys()
    (choice,) = line["choices"]
    assert (line["question_id"], line["category"], choice["index"]) == (1, "writing", 0)
    assert choice["turns"] == [turn.text for turn in wanted.turns]
    assert choice["new_tokens"] == [len(turn.tokens) for turn in wanted.turns]
    assert choice["decoding_steps"] == [len(turn.lengths) for turn in wanted.turns]
    assert choice["accept_lengths"] == wanted.turns[0].lengths + wanted.turns[1].lengths
    assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
    assert choice["per_step_draft_steps"] == wanted.turns[0].draft_steps + wanted.turns[1].draft_steps
    assert choice["wall_time"] == [turn.prefill_seconds + turn.decode_seconds for turn in wanted.turns]
    again = Answer.read(line, wanted.question)
    for turn, other in zip(wanted.turns, again.turns, strict=True):
        assert replace(turn, prefill_seconds=0.0) == replace(other, prefill_seconds=0.0)
        assert math.isclose(turn.prefill_seconds, other.prefill_seconds, abs_tol=1e-9)


def test_a_difference_is_found_with_its_logit_gap(pair: Pair) -> None:
    kangaroo = pair.load()
    prompt = kangaroo.tokenizer("ABC")["input_ids"]
    right = answer(kangaroo, QUESTIONS[0], SETTINGS, {})[PLAIN].turns[0]
    logits = kangaroo.logits(prompt + right.tokens[:5])[-1]
    second = int(logits.topk(2).indices[1])
    wrong = replace(right, tokens=[*right.tokens[:5], second, *right.tokens[6:]])
    found = first_difference(kangaroo, 1, prompt, right, wrong)
    assert (found.turn, found.position, found.plain_token, found.token) == (1, 5, right.tokens[5], second)
    assert found.logit_gap == pytest.approx(float(logits.max() - logits[second]), rel=1e-4)
    short = first_difference(kangaroo, 0, prompt, right, replace(right, tokens=right.tokens[:7]))
    assert (short.position, short.token, short.logit_gap) == (7, None, None)
    said = describe({"way": KANGAROO, "question_id": 81, **vars(found)})
    assert "Question 81, turn 2" in said and "token 6" in said and f"{found.logit_gap:.3g}" in said

    found_by_all = answer(kangaroo, QUESTIONS[0], SETTINGS, {"other": lambda *_: wrong})
    assert found_by_all["other"].differences[0] == replace(found, turn=0)
    assert not found_by_all[KANGAROO].differences


# ---- runs


def begin(out: Path, questions: list[Question] = QUESTIONS, **more: Any) -> Run:
    return Run(out, {"model": "models/m", "seed": 0, **more}, questions)


def texts(run: Run) -> list[Any]:
    return [(each.question, [turn.tokens for turn in each.turns]) for way in run.answers().values() for each in way]


def test_a_killed_run_goes_on(pair: Pair, tmp_path: Path) -> None:
    """A torn line goes, and so does an answer that another way has not given; the others are not made again."""
    kangaroo, run = pair.load(), begin(tmp_path / "a")
    evaluate(kangaroo, SETTINGS, run, {}, math.inf, silent)
    assert [question.question_id for question in run.done] == [1, "two", 3]
    whole, plain = (tmp_path / "a" / f"{way}.jsonl" for way in (KANGAROO, PLAIN))
    before, lines = texts(run), whole.read_text().splitlines(keepends=True)
    for torn in ([lines[0], lines[1][:40]], [lines[0], lines[1][:-30]], [lines[0]]):
        whole.write_text("".join(torn))
        run, done = begin(tmp_path / "a"), []
        evaluate(kangaroo, SETTINGS, run, {}, math.inf, lambda *told: done.append(told))  # noqa: B023
        assert [told[:3] for told in done] == [("answering", 2, 3), ("answering", 3, 3)]
        assert texts(run) == before
        assert whole.read_text().splitlines(keepends=True)[0] == lines[0]
        assert len(plain.read_text().splitlines()) == 3
    earlier = lines[2].replace("per_step_draft_steps", "unknown")
    for torn, sentence in (
        ([lines[0], "nonsense\n", lines[2]], "2: this is no answer"),
        ([lines[0].replace("question_id", "number"), *lines[1:]], "1: the answer is damaged"),
        ([lines[0].replace('"decode_time": [', '"decode_time": [], "other": ['), *lines[1:]], "1: the answer is dama"),
        ([*lines[:2], earlier], "3: an earlier version wrote this answer and did not count draft steps; take a new"),
    ):
        whole.write_text("".join(torn))
        with pytest.raises(KangarooError, match=f"kangaroo.jsonl, line {sentence}"):
            evaluate(kangaroo, SETTINGS, begin(tmp_path / "a"), {}, math.inf, silent)
        assert whole.read_text() == "".join(torn)
    for content in ("", "[1]"):
        (tmp_path / "a" / "run.json").write_text(content)
        with pytest.raises(KangarooError, match=r"run.json is damaged .*; take a new folder"):
            begin(tmp_path / "a")


def test_time_that_is_over_and_more_questions(pair: Pair, tmp_path: Path) -> None:
    kangaroo, run = pair.load(), begin(tmp_path, QUESTIONS[:1])
    evaluate(kangaroo, SETTINGS, run, {}, 0.0, silent)
    assert not run.done and not Report(run, {}).rows
    evaluate(kangaroo, SETTINGS, run, {}, math.inf, silent)
    longer = begin(tmp_path)
    evaluate(kangaroo, SETTINGS, longer, {}, math.inf, silent)
    assert longer.answers()[KANGAROO][0].turns[0].tokens == run.answers()[KANGAROO][0].turns[0].tokens
    assert len(longer.done) == 3


def test_other_settings_need_another_folder(pair: Pair, tmp_path: Path) -> None:
    begin(tmp_path).begin([PLAIN])
    with pytest.raises(KangarooError, match="seed 0, this one has 1; take a new folder"):
        begin(tmp_path, seed=1)


def test_questions_that_do_not_fit(pair: Pair, tmp_path: Path) -> None:
    kangaroo, long = pair.load(), Question(9, "maths", ("A" * 512,))
    run = begin(tmp_path, [*QUESTIONS, long])
    evaluate(kangaroo, SETTINGS, run, {}, math.inf, silent)
    assert (run.left_out, len(run.done)) == (1, 3)
    assert "cannot hold them: 1." in Report(run, {}).markdown([])
    with pytest.raises(KangarooError, match="context of 512 tokens"):
        evaluate(kangaroo, SETTINGS, begin(tmp_path, [long]), {}, math.inf, silent)


# ---- figures


def turn(lengths: list[int], drafted: list[int], seconds: float, loop: bool = False) -> Turn:
    """Two drafts came of every draft step, or one of the last."""
    tokens = [7] * sum(lengths) if loop else list(range(sum(lengths)))
    steps, accepted = [(count + 1) // 2 for count in drafted], [length - 1 for length in lengths]
    return Turn("", tokens, lengths, drafted, steps, accepted, 0.5, seconds, 2 * seconds)


def pair_of(plain: Turn, drafted: Turn, category: str = "a") -> tuple[Answer, Answer]:
    question = Question(0, category, ("x",))
    return Answer(question, [plain]), Answer(question, [drafted])


def test_the_figures_of_a_category() -> None:
    """By hand: two questions of 8 and of 20 tokens, the second one in a loop from its second token on."""
    found = row(
        "a",
        [
            pair_of(turn([1] * 8, [0] * 8, 4.0), turn([3, 1, 4], [2, 0, 5], 2.0)),
            pair_of(turn([1] * 20, [0] * 20, 10.0), turn([1, 5, 5, 5, 4], [4, 4, 4, 4, 4], 5.0, loop=True)),
        ],
    )
    assert (found.questions, found.texts, found.identical, found.new_tokens) == (2, 2, 2, 28)
    assert found.mean_acceptance_length.value == 28 / 8
    assert found.looping_share == round(19 / 28, 4)
    assert found.fresh_acceptance_length.value == (3 + 1 + 4 + 1) / 4
    assert found.num_spec_steps == 7  # vLLM leaves steps without drafts out
    assert (found.num_draft_tokens, found.num_accepted_draft_tokens) == (27, 2 + 3 + 4 * 3 + 3)
    assert found.num_draft_steps == 1 + 3 + 5 * 2
    assert found.acceptance_histogram == [1, 0, 1, 2, 3]
    assert found.acceptance_rate_per_position == [6 / 8, 6 / 8, 5 / 8, 3 / 8]
    assert found.draft_acceptance_rate.value == round(20 / 27, 4)
    assert (found.plain_tokens_per_second.value, found.kangaroo_tokens_per_second.value) == (2, 4)
    assert (found.speedup.value, found.speedup.low, found.speedup.high) == (2, 2, 2)
    assert (found.processor_speedup.value, found.processor_share) == (2, 2)
    low, high = found.mean_acceptance_length.low, found.mean_acceptance_length.high
    assert (low, high) == (round(8 / 3, 4), 4)  # of three kinds of resamples, both ends are a quarter each


def test_what_cannot_be_said() -> None:
    single = row("a", [pair_of(turn([1] * 20, [0] * 20, 1.0), turn([10, 10], [9, 9], 1.0, loop=True))])
    assert single.fresh_acceptance_length == Estimate(None)
    assert single.mean_acceptance_length == Estimate(10.0)
    assert rows([], []) == []


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.95, 0)])
def test_a_disturbed_run_is_named(share: float, count: int, pair: Pair, tmp_path: Path) -> None:
    run = begin(tmp_path)
    evaluate(pair.load(), SETTINGS, run, {}, math.inf, silent)
    report = Report(run, {})
    report.rows[-1] = replace(report.rows[-1], processor_share=share)
    assert report.markdown([]).count(f"had a processor for {share:.0%}") == count


def test_categories_come_in_their_order_and_then_all() -> None:
    pairs = [pair_of(turn([1], [0], 1.0), turn([1], [0], 1.0), category) for category in "bab"]
    found = rows(*zip(*pairs, strict=True))
    assert [(each.category, each.questions) for each in found] == [("b", 2), ("a", 1), ("all", 3)]
    assert [each.category for each in rows(*zip(*pairs[:1], strict=True))] == ["b"]


def test_the_report_holds_every_figure(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path)
    evaluate(pair.load(), SETTINGS, run, {}, math.inf, silent)
    report = Report(run, {"machine": "m"})
    pictures = plots.draw(report.rows, tmp_path)
    report.write(tmp_path, pictures)
    record, page = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    assert (record["machine"], record["answered"], record["differences"]) == ("m", 3, [])
    assert [each["category"] for each in record["categories"]] == ["writing", "maths", "all"]
    assert record["ways"][PLAIN]["over_plain"] == 1 and record["ways"][KANGAROO]["identical"] == 4
    for each in record["categories"]:
        assert f"| {each['category']} | {each['questions']} | {each['mean_acceptance_length']['value']:.2f}" in page
        assert page.count(f"{each['identical']} of {each['texts']}")
    assert len(pictures) == 3
    assert all(file.read_bytes().startswith(b"\x89PNG") and f"({file.name})" in page for file in pictures)
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    assert plots.draw(report.rows, tmp_path) == []


# ---- transformers


def test_transformers_writes_the_same_in_as_many_steps() -> None:
    kangaroo, prompts = Kangaroo.from_pretrained("demo", device="cpu"), bundled_pair().prompts()
    ways, missing = transformers_ways(kangaroo, "demo", None, None)
    question = Question(1, "code", (prompts["functools.py"],))
    fixed = Settings(max_new_tokens=48, num_speculative_tokens=6, draft_confidence_threshold=0.6)
    found = answer(kangaroo, question, fixed, ways)
    assert (list(ways), missing) == ([TRANSFORMERS, ASSISTED], "")
    for way, ours in ((TRANSFORMERS, PLAIN), (ASSISTED, KANGAROO)):
        assert not found[way].differences
        theirs, mine = found[way].turns[0], found[ours].turns[0]
        assert (theirs.text, theirs.lengths, theirs.accepted) == (mine.text, mine.lengths, mine.accepted)
        assert theirs.draft_steps == theirs.drafted


def test_without_an_adapter_there_is_no_assistant(pair: Pair) -> None:
    kangaroo = Kangaroo.from_pretrained(pair.target, device="cpu")
    ways, missing = transformers_ways(kangaroo, pair.target, None, "float16")
    assert (list(ways), "needs an adapter" in missing) == ([TRANSFORMERS], True)
    weight = ways[TRANSFORMERS].model.lm_head.weight
    assert (weight == weight.half().float()).all()


def test_steps_are_read_off_the_passes() -> None:
    """A prompt of ten; three drafts of which two are taken, none, one that is the last token."""
    assert steps_of([(0, 13), (12, 1), (13, 2)], prompt=10, new=6) == ([3, 1, 2], [3, 0, 1], [2, 0, 1])
