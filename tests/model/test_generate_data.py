"""The target writes training data: answers that are its own, prompts that it thinks of, and what is left out."""

import json
import os
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import TURN_TEMPLATE, make_target, make_tokenizer

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.text import load_tokenizer
from kangaroo_kernels.model.training import generate_data, teacher
from kangaroo_kernels.model.training.generate_data import Counts, Seen, WritingSettings, write_data
from kangaroo_kernels.model.training.teacher import Teacher

END = 17
"""The token ``@``."""
MOST_OF_A_PROMPT = 96


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_target(tmp_path_factory.mktemp("target"), eos_token_id=END, max_position_embeddings=128, seed=3)
    return make_tokenizer(folder, eos_token="@", chat_template=TURN_TEMPLATE)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 two logits of a random target may be equal, and the order of sums decides."""
    load = Teacher.__init__
    monkeypatch.setattr(Teacher, "__init__", lambda self, folder, device, _dtype: load(self, folder, device))


def settings(target: Path, out: Path, **changes: Any) -> WritingSettings:
    given: dict[str, Any] = {"texts": 6, "max_new_tokens": 12, "at_once": 4, "device": "cpu"} | changes
    return WritingSettings(model=str(target), out=out, **given)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def prompts(folder: Path, questions: list[str]) -> Path:
    file = folder / "prompts.jsonl"
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "old"}] for text in questions]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return file


@pytest.mark.usefixtures("in_float32")
def test_greedy_answers_are_what_the_runtime_decodes(target: Path, tmp_path: Path) -> None:
    questions = ["a", "bc" * 9, "hello", "j"]  # of different lengths, side by side
    counts = write_data(settings(target, tmp_path / "d.jsonl", prompts=(prompts(tmp_path, questions),), texts=4))
    written, kangaroo = lines(tmp_path / "d.jsonl"), Kangaroo.from_pretrained(target, device="cpu")
    assert [line["messages"][0]["content"] for line in written] == questions and counts.texts == 4
    tokenizer, tokens = load_tokenizer(target), 0
    for line in written:
        prompt = tokenizer.apply_chat_template(line["messages"][:1], add_generation_prompt=True, tokenize=False)
        answer = kangaroo.generate(prompt, max_new_tokens=12, plain=True)
        assert line["messages"][1:] == [{"role": "assistant", "content": answer.text}]
        tokens += len(answer.tokens) - (answer.tokens[-1] == END)
    assert counts.tokens == tokens


def test_texts_that_end_leave_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every three tokens; what the others go on with is what they go on with alone."""
    folder = make_target(tmp_path / "target", std=0.3, seed=1)
    prompts = [[7, 9], [3, 1, 4, 1, 5], [2] * 9, [30, 8, 2, 44], [60]]
    writer = Teacher(folder, torch.device("cpu"))
    monkeypatch.setattr(teacher, "STAGE", 3)
    alone = [writer.write([prompt], 20, ())[0] for prompt in prompts]
    stops = {alone[0][4], alone[2][1]}
    ended = [next((at for at, token in enumerate(row) if token in stops), 20) for row in alone]
    assert len({end // 3 for end in ended}) > 2, "the stops end the rows in one stage"
    assert writer.write(prompts, 20, stops) == [row[:end] for row, end in zip(alone, ended, strict=True)]
    monkeypatch.setattr(teacher, "STAGE", 99)
    assert [writer.write([prompt], 20, ())[0] for prompt in prompts] == alone


def test_groups_are_greedy_and_sampled_by_turns(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    write = Teacher.write
    monkeypatch.setattr(Teacher, "write", lambda *given, **how: seen.append(how) or write(*given, **how))
    file = prompts(tmp_path, [f"{letter}bcdefg" for letter in "abcdefghi"])
    counts = write_data(settings(target, tmp_path / "d.jsonl", prompts=(file,), texts=100))
    assert seen == [{}, generate_data.ANSWERING, {}]  # nine prompts in groups of four, and then there are no more
    assert counts.texts + counts.loops + counts.unfit == 9


def test_a_chat_model_asks_itself(target: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(target)
    counts = write_data(settings(target, tmp_path / "d.jsonl"))
    assert counts.texts == len(lines(tmp_path / "d.jsonl")) == 6
    for line in lines(tmp_path / "d.jsonl"):
        question, answer = line["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert 0 < len(tokenizer(question["content"])["input_ids"]) < MOST_OF_A_PROMPT
        assert "@" not in question["content"] + answer["content"]


def test_system_prompts_take_turns(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third line is empty: nothing is said. Every question is asked behind its own system prompt."""
    (tmp_path / "tasks.txt").write_text("ABC\n DEF \n\n")
    asked: list[list[list[int]]] = []
    write = Teacher.write
    monkeypatch.setattr(
        Teacher, "write", lambda self, rows, *given, **how: asked.append(rows) or write(self, rows, *given, **how)
    )
    write_data(settings(target, tmp_path / "d.jsonl", system_prompts=tmp_path / "tasks.txt", max_prompt_tokens=9))
    systems = [{"role": "system", "content": "ABC"}], [{"role": "system", "content": "DEF"}], []
    tokenizer = load_tokenizer(target)
    assert [tokenizer.decode(row) for row in asked[0]] == ["<S>ABC@<U>", "<S>DEF@<U>", "<U>", "<S>ABC@<U>"]
    for line in lines(tmp_path / "d.jsonl"):
        *said, question, answer = line["messages"]
        assert said in systems and (question["role"], answer["role"]) == ("user", "assistant")
        assert len(tokenizer(question["content"])["input_ids"]) < 9
    assert len({str(line["messages"][:-2]) for line in lines(tmp_path / "d.jsonl")}) > 1


def test_texts_are_continued_where_there_is_no_template(target: Path, tmp_path: Path) -> None:
    text = "".join(chr(ord("0") + index % 60) for index in range(300))
    (tmp_path / "a.txt").write_text(text)
    write_data(settings(target, tmp_path / "d.jsonl", prompts=(tmp_path / "a.txt",)))
    for line in lines(tmp_path / "d.jsonl"):
        assert line["text"][:4] in text and len(line["text"]) <= 4 + 12


def test_a_stopped_run_goes_on_as_if_it_had_not(target: Path, tmp_path: Path) -> None:
    whole, part = (settings(target, tmp_path / name, texts=12) for name in ("whole.jsonl", "part.jsonl"))
    write_data(whole)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_data(part, stop)
    group = lines(part.out)
    assert 0 < len(group) < 12
    part.out.write_text(part.out.read_text() + '{"messages": [{"role": "us')  # and its next line was cut short
    write_data(part)
    assert part.out.read_text() == whole.out.read_text()
    assert write_data(part).texts == 12 and part.out.read_text() == whole.out.read_text()


def test_loops_and_near_duplicates_are_dropped(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [[20, 21, 22], [20, 21, 22], [23] * MOST_OF_A_PROMPT, [24, 25]]
    answers = [[30, 31] * 30, [32, 33, 34]]  # a loop, and one that is none
    monkeypatch.setattr(
        Teacher, "write", lambda _self, rows, most, *_, **__: questions if most == MOST_OF_A_PROMPT else answers
    )
    counts = write_data(settings(target, tmp_path / "d.jsonl", texts=1))
    assert replace(counts, seconds=0.0) == Counts(texts=1, tokens=3, near_duplicates=1, unfit=1, loops=1)
    (line,) = lines(tmp_path / "d.jsonl")
    assert [turn["content"] for turn in line["messages"]] == ["GH", "OPQ"]


def test_a_target_that_only_loops_is_given_up(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Teacher, "write", lambda _self, rows, *_, **__: [[30, 31] * 30 for _ in rows])
    (tmp_path / "a.txt").write_text("ABCDEFGH")
    counts = write_data(settings(target, tmp_path / "d.jsonl", prompts=(tmp_path / "a.txt",)))
    assert (counts.texts, counts.loops) == (0, generate_data.BARREN_GROUPS * 4)


def test_no_prompt_is_answered_twice(target: Path, tmp_path: Path) -> None:
    """Three are too long for the context; the run is extended after the second group, whose rest was not needed."""
    questions = ["abc", *["d" * 120] * 3, "efg", "hij", "klm", "nop", "qab"]
    few = settings(target, tmp_path / "d.jsonl", prompts=(prompts(tmp_path, questions),), texts=2)
    assert write_data(few).unfit == 3
    write_data(replace(few, texts=9))
    assert [line["number"] for line in lines(few.out)] == [0, 4, 8]


def test_prompts_of_no_use_are_passed_over(target: Path, tmp_path: Path) -> None:
    """However many of them come first; an answer to nothing is one of them."""
    file = prompts(tmp_path, ["a" * 120] * 10 + ["ab", "cd"])
    nothing = json.dumps({"messages": [{"role": "assistant", "content": "old"}]}) + "\n"
    file.write_text(nothing + file.read_text())
    counts = write_data(settings(target, tmp_path / "d.jsonl", prompts=(file,), at_once=1, texts=2))
    assert counts.unfit + counts.loops + counts.texts == 13 and counts.unfit >= 11


def test_what_counts_as_seen() -> None:
    seen = Seen()
    assert seen.is_new("How do I bake bread with little time at home?")
    assert not seen.is_new("how do I bake bread with little time at HOME?")
    assert not seen.is_new("Please: how do I bake bread with little time at home?")
    assert seen.is_new("How do I bake a cake with three eggs and no sugar?")
    assert seen.is_new("Hi") and not seen.is_new("hi")


def test_minutes_end_the_writing(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that would take as long as the longest so far is not begun when that is longer than what is left."""
    looks = count(0, 10)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(looks)))
    counts = write_data(settings(target, tmp_path / "d.jsonl", texts=10**6, minutes=2))
    assert 4 < counts.texts <= 4 * 4 and counts.seconds <= 120
    assert write_data(settings(target, tmp_path / "e.jsonl", minutes=1e-9)).texts > 0  # one group is always written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": 0}, "texts is 0"),
        ({"at_once": 0}, "at_once is 0"),
        ({"minutes": -1.0}, "minutes"),
        ({"out": Path("data.txt")}, r"must end in \.jsonl"),
        ({"prompts": (Path("gone.txt"),)}, "gone.txt cannot be read"),
        ({"device": "abacus"}, "abacus"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"system_prompts": Path("gone.txt")}, "gone.txt cannot be read"),
        ({"system_prompts": Path(os.devnull)}, "is empty; it must hold a system prompt a line"),
        ({"system_prompts": Path("tasks.txt"), "prompts": (Path("gone.txt"),)}, "leave them or prompts out"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], words: str, target: Path, tmp_path: Path) -> None:
    with pytest.raises(KangarooError, match=words):
        write_data(settings(target, **{"out": tmp_path / "d.jsonl"} | changes))
    assert not (tmp_path / "d.jsonl").exists()


def test_files_that_are_refused(target: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("ab")
    with pytest.raises(KangarooError, match="the prompts have 2 tokens in all; one takes 4"):
        write_data(settings(target, tmp_path / "d.jsonl", prompts=(text,)))
    with pytest.raises(KangarooError, match="partly conversations, partly texts"):
        write_data(settings(target, tmp_path / "d.jsonl", prompts=(text, prompts(tmp_path, ["a"]))))
    foreign = '{"text": "mine"}\n', "mine", json.dumps({"messages": []}), '{"text": "a", "number": 3}\n', '{"te'
    for content in foreign:
        (tmp_path / "d.jsonl").write_text(content)
        with pytest.raises(KangarooError, match="not written here"):
            write_data(settings(target, tmp_path / "d.jsonl"))
        assert (tmp_path / "d.jsonl").read_text() == content
    text.write_text("ab" * 60)
    with pytest.raises(KangarooError, match=r"max_new_tokens is 97, and a prompt takes a third .* holds 128 tokens"):
        write_data(settings(target, tmp_path / "e.jsonl", prompts=(text,), max_new_tokens=97))
    with pytest.raises(KangarooError, match=r"max_new_tokens is 128; the model's context holds 128"):
        write_data(settings(target, tmp_path / "e.jsonl", max_new_tokens=128))
    strict = make_tokenizer(make_target(tmp_path / "strict"), chat_template="{{ raise_exception('never') }}")
    with pytest.raises(KangarooError, match=r"prompts.jsonl, line 1: the model's chat template refuses it .never"):
        write_data(settings(strict, tmp_path / "e.jsonl", prompts=(prompts(tmp_path, ["a"]),)))
    bare = make_tokenizer(make_target(tmp_path / "bare"))
    with pytest.raises(KangarooError, match=r"no chat template.*give texts instead, to generate-data with --prompts"):
        write_data(settings(bare, tmp_path / "e.jsonl"))
