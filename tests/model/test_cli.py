"""The command as a user meets it: output, JSON, mistakes, Ctrl-C."""

import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Pair
from pairs import make_target, make_tokenizer

from kangaroo_kernels import Kangaroo, __version__
from kangaroo_kernels.model.commands import cli, options, show, train
from kangaroo_kernels.model.evaluation import compare
from kangaroo_kernels.model.training import trainer

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


@pytest.mark.parametrize(
    "command", ["", "demo", "generate", "chat", "generate-data", "train", "calibrate", "export", "info"]
)
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
        (["--prompt", "A", "--kv-dtype", "int8"], "kv_dtype 'int8' is not supported"),
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


def test_data_and_an_adapter_that_generates(run: Run, pair: Pair, tmp_path: Path) -> None:
    """The recipe: the model writes data, an adapter learns from it and from a text, and decodes."""
    text, data, held_out, out = (tmp_path / name for name in ("a.txt", "d.jsonl", "held.txt", "my adapter"))
    for file in (text, held_out):
        file.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 20)
    few = ["--texts", 4, "--max-new-tokens", 12, "--at-once", 4]
    written = run("generate-data", "--model", pair.target, "--out", data, "--prompts", text, held_out, *few)
    assert written.code == 0 and f"{data} holds 4 texts; this run wrote 48 tokens in " in written.out
    assert "writing 100%" in written.err  # there is no terminal
    files = ["--data", data, text, "--held-out", held_out]
    limits = ["--steps", 2, "--batch-size", 2, "--sequence-length", 16]
    command = ["train", "--model", pair.target, *files, "--exit-layer", 2, "--out", out, *limits]
    trained = run(*command)
    assert trained.code == 0
    assert "training 50%, step 1, loss " in trained.err and "training 100%, step 2, loss " in trained.err
    use = shlex.split(trained.out.splitlines()[-1].removeprefix("Use it: kangaroo "))
    assert run(*use, "--max-new-tokens", 8, "--prompt", "A").code == 0
    again = run(*command)
    assert again.code == 2 and "already holds an adapter of 2 steps; raise --steps" in again.err
    longer = run(*command, "--steps", 3, "--json")
    assert json.loads(longer.out)["settings"]["data"] == 2 and json.loads(longer.out)["steps"] == 3


def test_a_poor_adapter_is_not_saved_without_a_word() -> None:
    assert "agrees with the model on 4% of the held-out tokens" in train.warn({"agreement": 0.04, "speedup": 1.1})
    by_heart = train.warn({"agreement": 0.5, "agreement_on_learned_windows": 0.77})
    assert "77% of the tokens that it learned from, and on 50% of held-out ones: it knows" in by_heart
    assert "slower with this adapter (0.90x plain)" in train.warn({"agreement": 0.5, "speedup": 0.9})
    assert train.warn({"agreement": 0.5, "agreement_on_learned_windows": 0.6, "speedup": 1.1}) == ""
    assert train.warn({"agreement": 0.5, "speedup": 1.1}) == train.warn({"agreement": 0.5}) == ""


def test_a_stopped_training_says_where(run: Run, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = trainer.AdapterTraining.update
    monkeypatch.setattr(
        trainer.AdapterTraining, "update", lambda *given: signal.raise_signal(signal.SIGINT) or update(*given)
    )
    (tmp_path / "a.txt").write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 20)
    out = tmp_path / "adapter"
    stopped = run("train", "--model", pair.target, "--data", tmp_path / "a.txt", "--exit-layer", 2, "--out", out)
    assert stopped.code == 130
    assert f"{out} keeps the run after step 1. The same command goes on from there." in stopped.err


def test_a_log_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line of a stage, the last one, and one whenever ten seconds have passed."""
    clock = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    log = show.Log()
    for done in range(2, 9):
        log("training", done, 8, f"step {done}")
        clock += 4
    assert capsys.readouterr().err.splitlines() == [
        "training 25%, step 2",
        "training 62%, step 5, 12 s left",
        "training 100%, step 8",
    ]


def test_options_are_repeated_for_each_file() -> None:
    given = ["--model", "m", "--data", "a", "b", "c", "--out", "o", "--held-out", "h", "--data", "d", "e"]
    assert list(train.repeat_options(given, {"--data", "--held-out"})) == [
        *("--model", "m", "--data", "a", "--data", "b", "--data", "c"),
        *("--out", "o", "--held-out", "h", "--data", "d", "--data", "e"),
    ]


@pytest.mark.parametrize("full", [True, False])
def test_a_full_memory_is_no_fault_in_memory(run: Run, pair: Pair, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """The one gets a sentence, the other keeps its traceback."""
    error = RuntimeError("CUDA out of memory." if full else "CUDA error: an illegal memory access was encountered")

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Kangaroo, "progress", failing)
    if full:
        outcome = run(*generate_arguments(pair, "--prompt", "class"))
        assert outcome.code == 2 and "there is not enough memory for this (CUDA out of memory)" in outcome.err
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run(*generate_arguments(pair, "--prompt", "class"))
