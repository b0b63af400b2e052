"""The command as a user meets it: output, JSON, mistakes, Ctrl-C."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Pair
from pairs import make_target, make_tokenizer

from kangaroo_kernels import Kangaroo, __version__
from kangaroo_kernels.model.commands import cli, options, train
from kangaroo_kernels.model.evaluation import compare

PROMPT = "ABCabc"
COMMAND = [sys.executable, "-c", "from kangaroo_kernels.model.commands.cli import main; main()"]


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


class Terminal(io.StringIO):
    """A stdin that somebody sits at."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; ``stdin=None`` is a terminal."""

    def run_command(*arguments: object, stdin: bytes | None = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kangaroo", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return Outcome(int(exit_info.value.code or 0), *capsys.readouterr())

    return run_command


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that has room for far more tokens than a test waits for."""
    folder = tmp_path_factory.mktemp("endless")
    return make_tokenizer(make_target(folder, layers=2, max_position_embeddings=30000))


def generate_arguments(pair: Pair, *more: object) -> list[object]:
    return ["generate", "--model", pair.target, "--adapter", pair.adapter, "--max-new-tokens", 24, *more]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let Ctrl-C come after ``count`` steps of a decode."""
    progress = Kangaroo.progress

    def interrupted(*arguments: Any, **settings: Any) -> Iterator[Any]:
        for index, step in enumerate(progress(*arguments, **settings)):
            if index == count:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(Kangaroo, "progress", interrupted)


@pytest.mark.parametrize("command", ["", "demo", "generate", "chat", "train", "calibrate", "export", "info"])
def test_help_shows_an_example(run: Run, command: str) -> None:
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "Usage:" in out
    assert f"$ kangaroo {command}" in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"kangaroo-kernels {__version__}\n", "")


def test_the_command_line_is_there_before_torch() -> None:
    code = "import sys, kangaroo_kernels.model.commands.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prompt_file_and_stdin_give_the_text_of_generate(run: Run, pair: Pair, tmp_path: Path) -> None:
    wanted = pair.load().generate(PROMPT, max_new_tokens=24).text
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    arguments = generate_arguments(pair)
    outcomes = [
        run(*arguments, "--prompt", PROMPT, stdin=b"not read"),
        run(*arguments, "--prompt-file", file, stdin=b"not read"),
        run(*arguments, stdin=PROMPT.encode()),
        run(*arguments, "--plain", "--prompt", PROMPT),
    ]
    assert [outcome.code for outcome in outcomes] == [0] * 4
    assert [outcome.out for outcome in outcomes] == [wanted] * 4
    assert all(outcome.err.startswith("\n24 tokens in ") for outcome in outcomes)


def test_settings_reach_the_decode(run: Run, pair: Pair) -> None:
    settings = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3, "num_speculative_tokens": 2}
    settings |= {"draft_confidence_threshold": 0.1, "acceptance": "rejection", "stop": "z"}
    settings |= {"min_p": 0.01, "repetition_penalty": 1.1, "min_new_tokens": 3, "timeout": 1000.0, "logprobs": 2}
    more = {"logit_bias": {9: -2, 30: 1.5}, "ignore_eos": True}
    wanted = pair.load().generate(PROMPT, max_new_tokens=24, **settings, **more)
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    options += ["--logit-bias", "9=-2", "--logit-bias", "30=1.5", "--ignore-eos"]
    answer = json.loads(run(*generate_arguments(pair, "--prompt", PROMPT, "--json", *options)).out)
    assert answer["tokens"] == wanted.tokens
    assert [entry["logprob"] for entry in answer["logprobs"]] == [entry.logprob for entry in wanted.logprobs]
    assert answer["finish_reason"] == wanted.finish_reason
    assert answer["stats"]["drafted"] == wanted.stats.drafted


def test_json_holds_the_generation(run: Run, pair: Pair) -> None:
    code, out, err = run(*generate_arguments(pair, "--prompt", PROMPT, "--json"))
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert set(answer) == {"text", "tokens", "finish_reason", "seed", "logprobs", "stats"}
    assert len(answer["tokens"]) == answer["stats"]["new_tokens"] == 24
    assert answer["finish_reason"] == "length"


def test_compare_says_identical(run: Run, pair: Pair) -> None:
    code, out, err = run(*generate_arguments(pair, "--prompt", PROMPT, "--compare"))
    assert code == 0
    assert out == pair.load().generate(PROMPT, max_new_tokens=24).text
    assert "identical: yes" in err
    answer = json.loads(run(*generate_arguments(pair, "--prompt", PROMPT, "--compare", "--json")).out)
    assert answer["comparison"]["identical"] is True
    assert answer["comparison"]["speedup"] > 0


def test_a_difference_is_an_exit_code(run: Run, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    different = compare.Comparison(
        "the prompt", 1.0, 1.0, 1.0, False, pair.load().generate("A", max_new_tokens=2).stats, 0
    )
    monkeypatch.setattr(compare, "compare", lambda *_, **__: different)
    arguments = generate_arguments(pair, "--prompt", PROMPT, "--compare")
    code, _, err = run(*arguments)
    assert code == options.NOT_IDENTICAL
    assert "identical: no" in err
    assert run(*arguments, "--temperature", 1, "--acceptance", "rejection").code == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "A", "--prompt-file", "B"], "--prompt and --prompt-file exclude each other"),
        (["--prompt-file", "no/such/file"], "prompt file no/such/file cannot be read: No such file or directory."),
        (["--prompt", "A", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "A", "--top-p", "nan"], "top_p is nan"),
        (["--prompt", "A", "--logit-bias", "3"], "--logit-bias is '3'; it must be ID=NUMBER"),
        (["--prompt", "A", "--logprobs", "3"], "--logprobs are printed with --json alone"),
        (["--prompt", "A", "--num-speculative-tokens", "99"], "num_speculative_tokens is 99"),
        (["--prompt", "A", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "A", "--exit-layer", "4"], "exit_layer is 4"),
        (["--prompt", "A", "--device", "tpu"], "device 'tpu' is unknown"),
        (["--prompt", "A", "--dtype", "int8"], "dtype 'int8' is not supported"),
        (["--prompt", "A", "--acceptance", "always"], "acceptance is 'always'"),
        (["--prompt", "A", "--model", "./no-such-folder"], "model folder './no-such-folder' does not exist."),
        (["--prompt", "A", "--adapter", "./no-such-folder"], "adapter folder './no-such-folder' does not exist."),
        (["--prompt", "A", "--plain", "--compare"], "--plain and --compare exclude each other"),
        (["--prompt", "\udcff"], "--prompt is not UTF-8 text"),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, pair: Pair, options: list[str], sentence: str) -> None:
    code, out, err = run(*generate_arguments(pair, *options))
    assert (code, out) == (2, "")
    assert err.startswith(f"kangaroo: {sentence}")
    assert err.count("\n") == 1


def test_without_an_adapter_prompt_lookup_drafts(run: Run, pair: Pair) -> None:
    arguments = ("generate", "--model", pair.target, "--prompt", "ABCDABCDABC", "--json")
    alone, plain = json.loads(run(*arguments).out), json.loads(run(*arguments, "--plain").out)
    assert alone["tokens"] == plain["tokens"]
    assert alone["stats"]["drafted"] > 0 == plain["stats"]["drafted"]


def test_mistakes_with_files_and_stdin(run: Run, pair: Pair, tmp_path: Path) -> None:
    assert "stdin is not UTF-8 text" in run(*generate_arguments(pair), stdin=b"\xff").err
    file = tmp_path / "latin"
    file.write_bytes(b"\xe9")
    assert f"prompt file {file} is not UTF-8 text" in run(*generate_arguments(pair, "--prompt-file", file)).err
    assert "no prompt was given" in run(*generate_arguments(pair), stdin=None).err


def test_text_that_the_terminal_cannot_show(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe on Windows has cp1252."""
    folder = make_tokenizer(make_target(tmp_path))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {"<unk>": 0} | {chr(0x1F600 + index): index for index in range(1, 67)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = ["generate", "--model", folder, "--plain", "--prompt", "\U0001f605", "--max-new-tokens", 3]
    wanted = Kangaroo.from_pretrained(folder).generate("\U0001f605", max_new_tokens=3, plain=True).text
    for encoding in ("utf-8", "cp1252"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        assert run(*arguments).code == 0
        sys.stdout.flush()
        assert written.getvalue() == wanted.encode(encoding, "backslashreplace")


def test_a_byte_order_mark_is_no_text(run: Run, pair: Pair) -> None:
    arguments = generate_arguments(pair)
    assert run(*arguments, stdin=b"\xef\xbb\xbf" + PROMPT.encode()).out == run(*arguments, stdin=PROMPT.encode()).out


def test_a_random_seed_is_told(run: Run, pair: Pair) -> None:
    arguments = generate_arguments(pair, "--prompt", PROMPT, "--temperature", 1)
    _, out, err = run(*arguments, "--seed", "random")
    seed = err.split("The seed was ")[1].rstrip(".\n")
    assert run(*arguments, "--seed", seed).out == out
    assert run(*arguments, "--seed", "much").code == 2


def test_usage_errors_have_their_exit_code(run: Run) -> None:
    assert run("generate", "--prompt", "A").code == 2
    assert run("generate", "--model", "m", "--max-new-tokens", "many").code == 2
    assert run("no-such-command").code == 2


def test_ctrl_c_keeps_the_json(run: Run, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 3)
    code, out, _ = run(*generate_arguments(pair, "--prompt", PROMPT, "--json", "--plain"))
    answer = json.loads(out)
    assert code == options.INTERRUPTED
    assert answer["finish_reason"] == "interrupted"
    assert len(answer["tokens"]) == answer["stats"]["new_tokens"] == 3


@pytest.fixture
def endless_process(endless: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A decode that goes on and on; a test that fails leaves neither it nor its pipes behind."""
    arguments = ["generate", "--model", str(endless), "--plain", "--prompt", PROMPT, "--max-new-tokens", "29000"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_ctrl_c_keeps_the_text(endless_process: "subprocess.Popen[bytes]") -> None:
    process = endless_process
    assert process.stdout is not None
    begun = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == options.INTERRUPTED
    assert begun + out
    assert err.decode().endswith("interrupted.\n")
    assert err.count(b"\n") == 2


def test_a_closed_pipe_ends_quietly(endless_process: "subprocess.Popen[bytes]") -> None:
    process = endless_process
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.wait(timeout=60)


def test_info_as_table_and_as_json(run: Run, pair: Pair) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert __version__ in out
    assert "Triton kernels on a GPU, PyTorch references on a CPU" in " ".join(out.split())
    assert "plain step bytes" in run("info", "--model", pair.target).out
    answer = json.loads(run("info", "--model", pair.target, "--adapter", pair.adapter, "--json").out)
    assert set(answer) == {"versions", "devices", "operations", "supported", "model"}
    assert answer["model"]["exit_layer"] == 2
    assert json.loads(run("info", "--json").out)["model"] is None
    assert run("info", "--adapter", pair.adapter).code == 2


def test_export_says_how_its_folder_is_used(run: Run, pair: Pair, tmp_path: Path) -> None:
    arguments = ["export", "--model", pair.target, "--adapter", pair.adapter]
    code, out, err = run(*arguments, "--out", tmp_path / "drafter")
    assert (code, err) == (0, "")
    settings = json.loads(out.partition("--speculative-config '")[2].partition("'")[0])
    assert settings == {"method": "draft_model", "model": str(tmp_path / "drafter"), "num_speculative_tokens": 6}
    code, out, err = run(*arguments, "--out", tmp_path / "whole", "--transformers")
    assert (code, err) == (0, "")
    assert f"custom_generate='{tmp_path / 'whole'}', trust_remote_code=True" in out
    code, out, err = run(*arguments, "--out", tmp_path / "whole")
    assert (code, out) == (2, "")
    assert err == f"kangaroo: {tmp_path / 'whole'} is not empty; give a new folder.\n"


def test_train_writes_an_adapter_that_generates(run: Run, pair: Pair, tmp_path: Path) -> None:
    data = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "held.txt"]
    for file in data:
        file.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 20)
    files = ["--data", data[0], data[1], "--held-out", data[2]]
    size = ["--steps", 2, "--batch-size", 2, "--sequence-length", 16]
    out = tmp_path / "adapter"
    trained = run("train", "--model", pair.target, *files, "--exit-layer", 2, "--out", out, *size, "--json")
    report = json.loads(trained.out)
    assert trained.code == 0
    assert report["settings"]["data"] == 2
    assert report["settings"]["held_out"] == 1
    arguments = ["generate", "--model", pair.target, "--adapter", out, "--max-new-tokens", 8, "--prompt", "A"]
    assert run(*arguments, "--compare").code == 0
    again = run("train", "--model", pair.target, *files, "--exit-layer", 2, "--out", out, *size)
    assert again.code == 2
    assert "already holds an adapter" in again.err


def test_options_are_repeated_for_each_file() -> None:
    given = ["--model", "m", "--data", "a", "b", "c", "--out", "o", "--held-out", "h", "--data", "d", "e"]
    assert list(train.repeat_options(given, {"--data", "--held-out"})) == [
        *("--model", "m", "--data", "a", "--data", "b", "--data", "c"),
        *("--out", "o", "--held-out", "h", "--data", "d", "--data", "e"),
    ]
