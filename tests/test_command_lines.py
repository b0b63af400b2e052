"""Every number on every command line: nonsense ends in a sentence and exit status 2, before any work."""

import inspect
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch
import typer
from triton import knobs
from typer.testing import CliRunner

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model import demo, load
from kangaroo_kernels.model.commands import calibrate, chat, cli, export, generate, generate_data, info, train
from kangaroo_kernels.model.commands import demo as demo_command

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

DURATION = ("0", "-1", "nan", "inf")
COUNT = ("0", "-1")
SHARE = ("-0.1", "1.1", "nan")
TEMPERATURE = ("-1", "nan", "inf")

NONSENSE = {
    **dict.fromkeys(("minutes", "learning_rate", "repetition_penalty"), DURATION),
    **dict.fromkeys(("arch", "exit_layer", "max_new_tokens", "num_speculative_tokens", "top_k", "texts"), COUNT),
    **dict.fromkeys(
        ("steps", "batch_size", "reuse", "sequence_length", "num_attention_heads", "vocabulary", "at_once"), COUNT
    ),
    **dict.fromkeys(("draft_confidence_threshold", "min_p", "total_variation"), SHARE),
    "top_p": ("0", *SHARE),
    "temperature": TEMPERATURE,
    "seed": ("-1",),
    "rows": (*COUNT, "17"),
    "context": ("1", "-1"),
    "min_new_tokens": ("-1", "129"),
    "timeout": ("0", "-1", "nan"),
    "logprobs": ("-1", "21"),
}
"""By option, values that mean nothing there, whatever the command."""

BEFORE = {
    ("gpu_report", "main"): "--smoke --out OUT",
    ("compare_binaries", "main"): "HEAD",
    ("train_demo", "main"): "--preset smoke --out OUT",
    ("cli", "demo"): "demo --json",
    ("cli", "generate"): "generate --model demo --prompt A",
    ("cli", "chat"): "chat --model demo",
    ("cli", "train"): "train --model demo --data README.md --exit-layer 4 --out OUT",
    ("cli", "generate_data"): "generate-data --model demo --prompts README.md --out OUT.jsonl",
    ("cli", "calibrate"): "calibrate --model demo --adapter ADAPTER --prompts PROMPTS",
    ("cli", "export"): "export --model demo --out OUT",
    ("cli", "info"): "info --model demo --adapter ADAPTER",
}
"""What must stand on the command line besides."""


def commands() -> dict[tuple[str, str], Callable[..., Any]]:
    """Every function of a tool or of the package's command that takes options."""
    names = [path.stem for path in TOOLS.glob("*.py") if "import typer" in path.read_text()]
    modules = {name: import_module(name) for name in names}
    modules |= {
        each.__name__: each for each in (demo_command, generate, chat, generate_data, train, calibrate, export, info)
    }
    return {
        ("cli" if holder.__name__.startswith("kangaroo") else module, name): function
        for module, holder in modules.items()
        for name, function in inspect.getmembers(holder, inspect.isfunction)
        if function.__module__ == holder.__name__ and options(function)
        if name == "main" or holder.__name__.startswith("kangaroo")  # others only pass options on
    }


def options(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a command's options."""
    hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    return {
        name: get_args(hint)[0]
        for name, hint in hints.items()
        if get_origin(hint) is Annotated and isinstance(get_args(hint)[1], typer.models.OptionInfo)
    }


def is_number(kind: Any) -> bool:
    return kind in (int, float) or any(is_number(part) for part in get_args(kind))


NUMBERS = [
    pytest.param(name, option, id="-".join((*name, option)))
    for name, function in commands().items()
    for option, kind in options(function).items()
    if is_number(kind)
]


def app_of(module: Any) -> typer.Typer:
    if hasattr(module, "app"):
        app: typer.Typer = module.app
    else:
        app = typer.Typer()
        app.command()(module.main)
    return app


@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_nonsense_is_refused_before_any_work(
    command: tuple[str, str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = cli if command[0] == "cli" else import_module(command[0])

    def work(*arguments: Any, **settings: Any) -> None:
        pytest.fail("work has begun")

    monkeypatch.setattr(load, "load_target", work)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if hasattr(module, "train_pair"):
        monkeypatch.setattr(module, "train_pair", work)
    before = BEFORE.get(command, "").replace("OUT", str(tmp_path / "out"))
    before = before.replace("ADAPTER", str(demo.PAIR / "adapter"))
    flag = f"--{option.replace('_', '-')}"
    for value in NONSENSE[option]:
        done = CliRunner().invoke(app_of(module), [*before.split(), flag, value])
        if command[0] == "cli" and isinstance(done.exception, KangarooError):  # main makes a sentence of it
            code, said = 2, str(done.exception)
        else:
            code, said = done.exit_code, done.stderr
        assert code == 2, (value, done.output)
        assert "Traceback" not in said
        plainly = " ".join(said.replace("│", " ").split())
        assert option in plainly.replace("-", "_"), plainly
        assert done.stdout == ""
    assert not (tmp_path / "out").exists()


REFUSALS = {
    "kernel_report": "TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.",
    "kernel_report --model gpt": "no model is called gpt; there are Vicuna-7B, Llama-3.1-8B, Llama-3.2-1B.",
    "kernel_report --arch 75": "--arch is 75; it must be one of 80, 90.",
    "kernel_report --dtype int8": "--dtype is int8; it must be one of bfloat16, float16, float32.",
    "kernel_report --step dinner": "--step is dinner; it must be one of layer, top-1 head, ",
    "kernel_report --rows 4 --rows 17": "rows are 4, 17; they must be 1 to 16.",
    "compare_binaries HEAD --model gpt": "no model is called gpt; there are ",
    "gpu_report": "this needs a CUDA GPU and there is none here; --smoke --out DIR runs it without one.",
    "gpu_report --only decode,tset": "there is no part called 'tset'; there are environment, tests, ",
    "gpu_report --only pair": "the part pair needs --pair DIR",
    "gpu_report --pair {} --only decode": "--pair DIR the part pair",
    "gpu_report --pair {}": "target does not exist. tools/train_demo.py writes such a pair.",
    "gpu_report --smoke": "--smoke needs --out",
    "gpu_report --smoke --out {}/file/inside": "{}/file/inside cannot be written: Not a directory.",
    "gpu_report --first --only decode": "--first has parts of its own; leave --only and --pair out.",
    "profile_decode --shape GPT-5": "shape 'GPT-5' is unknown; use one of Vicuna-7B, ",
    "profile_decode --shape Vicuna-7B": "Vicuna-7B would take minutes a step on a CPU; leave --shape out to ",
    "profile_decode --context 100000": "context is 100000; this model allows at most ",
    "train_demo --preset nonsense": "--preset is nonsense; there are demo, large, smoke.",
    "train_demo --preset smoke --device abacus": "device 'abacus' is unknown; use 'cpu' or 'cuda'.",
    "train_demo --preset large": "large needs a CUDA GPU and there is none here; --preset smoke needs none.",
    "train_demo --preset smoke --out {}": "{} is a file or not empty; give a new folder with --out.",
    "train_demo --preset smoke --out {}/file": "{}/file is a file or not empty; give a new folder with --out.",
    "tune": "tuning needs a CUDA GPU and there is none here.",
}
"""Command lines and what is said of them; {} is a folder with a file in it."""


@pytest.mark.parametrize(("line", "sentence"), REFUSALS.items())
def test_a_mistake_gets_one_sentence(line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    (tmp_path / "file").touch()
    name, *given = shlex.split(line.format(*[tmp_path] * 2))
    module = import_module(name)
    if hasattr(module, "cut_prompts"):
        monkeypatch.setattr(module, "cut_prompts", lambda *_: pytest.fail("work has begun"))
    done = CliRunner().invoke(app_of(module), given)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"{name}: ")
    assert sentence.format(tmp_path) in done.stderr
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "")]
