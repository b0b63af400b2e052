"""Data for training: what counts as the model's own writing, and what a file must look like."""

import json
from pathlib import Path
from typing import Any

import pytest
from pairs import TURN_TEMPLATE, make_tokenizer

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model.text import load_tokenizer
from kangaroo_kernels.model.training.data import Window, read_windows

OPENAI = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}] * 2}
SHAREGPT = {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cde"}] * 2}


def tokenizer(folder: Path, **more: str) -> Any:
    return load_tokenizer(make_tokenizer(folder, **{"eos_token": "@", "chat_template": TURN_TEMPLATE} | more))


def read(folder: Path, content: str, name: str = "data.jsonl", length: int = 100, **more: str) -> list[Window]:
    file = folder / name
    file.write_text(content)
    chosen = tokenizer(folder, **more)
    return read_windows((file,), chosen, {chosen.eos_token_id}, length)


def foretold(window: Window, tokens: Any) -> str:
    """The text that the learned positions of a window foretell."""
    following = window.tokens.roll(-1)[window.learned]
    return str(tokens.decode(following.tolist()))


@pytest.mark.parametrize("record", [OPENAI, SHAREGPT], ids=["messages", "conversations"])
@pytest.mark.parametrize("form", ["lines", "list", "object"])
def test_only_answers_are_learned(record: dict[str, Any], form: str, tmp_path: Path) -> None:
    records = {"lines": 2, "list": 2, "object": 1}[form]
    content = {
        "lines": json.dumps(record) + "\n\n" + json.dumps(record),
        "list": json.dumps([record, record], indent=1),
        "object": json.dumps(record, indent=1),
    }[form]
    windows = read(tmp_path, content, name="data.jsonl" if form == "lines" else "data.json")
    assert len(windows) == records
    for window in windows:
        assert tokenizer(tmp_path).decode(window.tokens.tolist()) == "<U>ab@<A>cde@<U>ab@<A>cde@"
        assert foretold(window, tokenizer(tmp_path)) == "cde@cde@"


def test_what_follows_the_end_of_a_turn_is_not_learned(tmp_path: Path) -> None:
    (window,) = read(tmp_path, json.dumps(OPENAI), chat_template=TURN_TEMPLATE.replace("@{% endfor", "@=={% endfor"))
    assert foretold(window, tokenizer(tmp_path)) == "cde@cde@"


def test_conversations_without_an_answer_are_left_out(tmp_path: Path) -> None:
    alone = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "a"}], []
    content = "".join(json.dumps({"messages": messages}) + "\n" for messages in (*alone, OPENAI["messages"]))
    (window,) = read(tmp_path, content)
    assert foretold(window, tokenizer(tmp_path)) == "cde@cde@"


@pytest.mark.parametrize("name", ["data.ndjson", "data.JSONL"])
@pytest.mark.parametrize("says", ["gpt", "chatgpt", "Assistant"])
def test_files_of_other_names_and_other_names_of_the_assistant(name: str, says: str, tmp_path: Path) -> None:
    content = json.dumps(SHAREGPT).replace('"gpt"', f'"{says}"')
    (window,) = read(tmp_path, "\ufeff" + content, name=name)
    assert tokenizer(tmp_path).decode(window.tokens.tolist()) == "<U>ab@<A>cde@<U>ab@<A>cde@"
    assert foretold(window, tokenizer(tmp_path)) == "cde@cde@"


def test_a_conversation_may_begin_with_the_assistant(tmp_path: Path) -> None:
    (window,) = read(tmp_path, json.dumps({"messages": [{"role": "assistant", "content": "fg"}, *OPENAI["messages"]]}))
    assert foretold(window, tokenizer(tmp_path)) == "cde@cde@"


def test_an_answer_may_make_one_token_with_what_stands_before_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    file = make_tokenizer(tmp_path, eos_token="@", chat_template=TURN_TEMPLATE) / "tokenizer.json"
    vocab = Tokenizer.from_file(str(file)).get_vocab()
    joining = Tokenizer(models.BPE(vocab | {">c": len(vocab)}, [(">", "c")], unk_token="<unk>"))
    joining.decoder = decoders.Fuse()
    joining.save(str(file))
    (tmp_path / "data.jsonl").write_text(json.dumps(OPENAI))
    chosen = load_tokenizer(tmp_path)
    (window,) = read_windows((tmp_path / "data.jsonl",), chosen, {chosen.eos_token_id}, 100)
    assert foretold(window, chosen) == ">cde@>cde@"


def test_long_conversations_are_cut_and_windows_without_an_answer_dropped(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "a" * 20}, {"role": "assistant", "content": "bc"}]}
    windows = read(tmp_path, json.dumps(record), length=8)
    assert [len(window.tokens) for window in windows] == [6]  # the first 24 tokens hold the question alone
    assert "".join(foretold(window, tokenizer(tmp_path)) for window in windows) == "bc@"


def test_texts_are_joined_by_the_end_of_text(tmp_path: Path) -> None:
    windows = read(tmp_path, '{"text": "abcdef"}\n{"text": "ghij"}', length=8)
    assert [tokenizer(tmp_path).decode(window.tokens.tolist()) for window in windows] == ["abcdef@g", "hij"]
    assert windows[0].learned.all()
    (plain,) = read(tmp_path, "abc", name="a.txt")
    assert tokenizer(tmp_path).decode(plain.tokens.tolist()) == "abc"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\nnot json', r"line 2: no JSON"),
        ('{"text": "a"}\n\n{"question": "a"}', r"line 3: no text and no conversation"),
        ('{"text": "a"}\n[1]', r"line 2: no text"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', r'line 1: turn 1 must be \{"role": "...", "content"'),
        ('{"conversations": [{"from": "human"}]}', r'line 1: turn 1 must be \{"from": "...", "value"'),
        ('[{"text": "a"},\n {"text": 3}]', r"record 2: no text"),
        ('[{"text": "a"},\n nonsense]', r"line 2: no JSON"),
        ('{"text": "a"}\n{"text": "\\ud83d"}', r"line 2 holds a lone surrogate"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', r"line 1 holds a lone surrogate"),
        (
            '{"messages": [{"role": "critic", "content": "a"}]}',
            r"line 1: turn 1 is by 'critic'; it must be by human, gpt",
        ),
        ("[" * 100_000, r"line 1: no JSON"),
        ('{\n"data": [\n]}', r"line 1: no text and no conversation"),
    ],
)
def test_records_that_are_refused(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(KangarooError, match=rf"data.jsonl, {words}"):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "no chat template"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "line 1: the model's chat template refuses it .roles must al",
        ),
        (
            TURN_TEMPLATE.replace("content }}", "content if loop.last else message.content[:2] }}"),
            "changes the earlier",
        ),
        (TURN_TEMPLATE.replace("%}<A>{", "%}<A>think{"), "puts other words before an answer"),
    ],
)
def test_templates_that_are_refused(template: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(KangarooError, match=words):
        read(tmp_path, json.dumps(OPENAI), chat_template=template)
