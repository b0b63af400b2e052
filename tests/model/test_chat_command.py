"""``kangaroo chat``: through pipes and in a terminal, its commands, mistakes, Ctrl-C."""

import builtins
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pairs import CHAT_TEMPLATE, make_adapter, make_target, make_tokenizer
from rich.console import Console

from kangaroo_kernels import Kangaroo, Settings
from kangaroo_kernels.model.commands import chat, cli, options

COMMAND = [sys.executable, "-c", "from kangaroo_kernels.model.commands.cli import main; main()"]
QUESTIONS = ("HI", "WHO ARE YOU")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target with a chat template and a context that answers can fill, and an adapter."""
    folder = tmp_path_factory.mktemp("chat")
    target = make_target(folder / "target", quiet_from=2, quiet=0.2, max_position_embeddings=120)
    make_tokenizer(target, chat_template=CHAT_TEMPLATE)
    return target, make_adapter(folder / "adapter", target, exit_layer=2, copy_layer=2)


@pytest.fixture
def talk(folders: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command over lines of stdin: its exit code, stdout and stderr."""

    def run(stdin: bytes, *more: str) -> tuple[int, str, str]:
        arguments = ["--model", str(folders[0]), *(more or ("--adapter", str(folders[1]))), "--max-new-tokens", "20"]
        monkeypatch.setattr(sys, "argv", ["kangaroo", "chat", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return int(exit_info.value.code or 0), *capsys.readouterr()

    return run


def answers(folders: tuple[Path, Path], system: str | None = None) -> list[str]:
    """What the API answers to the questions."""
    kangaroo = Kangaroo.from_pretrained(*folders, device="cpu")
    messages = [] if system is None else [{"role": "system", "content": system}]
    given = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        given.append(kangaroo.chat(messages, max_new_tokens=20).text)
        messages.append({"role": "assistant", "content": given[-1]})
    return given


@pytest.mark.parametrize("plain", [False, True])
def test_lines_in_answers_out(talk, folders, plain):
    code, out, err = talk("\n\n".join(QUESTIONS).encode(), *(("--plain",) if plain else ()))
    assert (code, out) == (0, "".join(answer + "\n" for answer in answers(folders)))
    first, second = err.splitlines()
    assert first.startswith("20 tokens, ")
    assert "cached" in second
    assert ("verification step" in first) is not plain


def test_the_system_prompt(talk, folders):
    wanted = "".join(answer + "\n" for answer in answers(folders, "BE KIND"))
    by_option = talk("\n".join(QUESTIONS).encode(), "--plain", "--system", "BE KIND")
    by_command = talk("\n".join(["/system BE KIND", *QUESTIONS]).encode())
    assert by_option[:2] == by_command[:2] == (0, wanted)


def test_bytes_that_are_no_text(talk):
    """The lines before it are answered."""
    code, out, err = talk(b"HI\n\xff\n", "--plain")
    assert code == options.USER_ERROR
    assert len(out) > 1
    assert "line 2 of stdin is not UTF-8" in err


def test_mistakes_are_found_before_the_first_line(talk, pair, folders, monkeypatch):
    refused = talk(b"HI\n", "--exit-layer", "2")
    assert (refused[0], refused[1]) == (options.USER_ERROR, "")
    assert "exit_layer was given without an adapter" in refused[2]
    refused = talk(b"HI\n", "--plain", "--model", str(pair.target))
    assert (refused[0], refused[1]) == (options.USER_ERROR, "")
    assert "no chat template" in refused[2]


@pytest.fixture
def conversation(folders: Any) -> chat.Chat:
    """A conversation whose notes are kept in a text."""
    kangaroo = Kangaroo.from_pretrained(*folders, device="cpu")
    notes = Console(file=io.StringIO(), width=200)
    return chat.Chat(kangaroo.session(), Settings(max_new_tokens=10), notes)


def notes_of(conversation: chat.Chat) -> str:
    return conversation.notes.file.getvalue()


def test_commands(conversation, tmp_path, capsys):
    file = tmp_path / "said.json"
    for line in ("/system BE KIND", "HI", f"/save {file}", "/nonsense", "/save", f"/save {tmp_path}", "/help"):
        assert conversation.say(line)
    saved = json.loads(file.read_text())
    answer = capsys.readouterr().out.rstrip("\n")
    assert [tuple(message.values()) for message in saved] == [
        ("system", "BE KIND"),
        ("user", "HI"),
        ("assistant", answer),
    ]
    notes = notes_of(conversation)
    for words in ("/nonsense is no command", "needs the name", f"{tmp_path} cannot be written", "Ctrl-C", "3 messages"):
        assert words in notes
    assert conversation.say("/reset")
    assert conversation.conversation == saved[:1]
    assert conversation.say("/system")
    assert conversation.conversation == []
    assert not conversation.say("/quit")


def test_a_context_that_is_full(conversation, capsys):
    """An answer that fills it says so; a question that does not fit is taken back, and /reset helps."""
    assert conversation.say("A" * 107)
    assert "the model's context is full; /reset begins" in notes_of(conversation)
    said = list(conversation.messages)
    assert len(said) == 2
    assert conversation.say("B" * 30)
    assert "the model's context holds 120. The message was taken back" in notes_of(conversation)
    assert conversation.messages == said
    conversation.say("/reset")
    assert conversation.say("A" * 114)  # the prompt alone fills it
    assert "0 tokens" in notes_of(conversation)
    assert conversation.messages == []
    capsys.readouterr()
    assert conversation.say("HI")
    assert capsys.readouterr().out.strip() == conversation.messages[1]["content"] != ""


def test_colours_show_the_origin(conversation):
    conversation.colored = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    conversation.say("HI")
    shown = conversation.colored.file.getvalue()
    assert "\x1b[32m" in shown  # drafted
    assert "\x1b[1;33m" in shown  # the target's own


def test_a_terminal(monkeypatch, capsys):
    """Ctrl-C takes a line away, Ctrl-D ends, empty lines are nothing."""
    typed: Iterator[Any] = iter(["HI", KeyboardInterrupt(), "  ", " YOU ", EOFError()])

    def say(prompt: str) -> str:
        said = next(typed)
        if isinstance(said, BaseException):
            raise said
        return said

    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr(builtins, "input", say)
    assert list(chat.lines()) == ["HI", "YOU"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path):
    target = make_target(tmp_path / "endless", layers=2, max_position_embeddings=30000)
    make_tokenizer(target, chat_template=CHAT_TEMPLATE)
    arguments = ["chat", "--model", str(target), "--plain", "--max-new-tokens", "29000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen([*COMMAND, *arguments], **pipes) as process:
        try:
            process.stdin.write(b"HI\n")
            begun = process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(f"/save {tmp_path / 'said.json'}\n".encode(), timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert b"; interrupted." in err
    saved = json.loads((tmp_path / "said.json").read_text())
    assert saved[1]["content"] == (begun + out).decode().removesuffix("\n")
