"""Every number on every command line: nonsense ends in a sentence and exit status 2, before any work."""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch
import typer
from typer.testing import CliRunner

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model import demo, load
from kangaroo_kernels.model.commands import calibrate, cli, generate, generate_data, info, train
from kangaroo_kernels.model.commands import demo as demo_command

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

DURATION = ("0", "-1", "nan", "inf")
COUNT = ("0", "-1")
SEED = ("-1",)
SHARE = ("-0.1", "1.1", "nan")
TEMPERATURE = ("-1", "nan", "inf")

DECODING = {"num_speculative_tokens": COUNT, "draft_confidence_threshold": SHARE}
NUMBERS: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("compare_binaries", "main"): {"arch": COUNT},
    ("gpu_report", "main"): {"minutes": DURATION},
    ("kernel_report", "main"): {"arch": COUNT, "rows": (*COUNT, "17"), "length": COUNT},
    ("profile_decode", "main"): {"context": ("1", "-1")},
    ("train_demo", "main"): {"minutes": DURATION},
    ("tune", "main"): {"minutes": DURATION},
    ("cli", "demo"): {
        "max_new_tokens": COUNT,
        "rounds": COUNT,
        "temperature": TEMPERATURE,
        "seed": SEED,
        **DECODING,
    },
    ("cli", "generate"): {
        "max_new_tokens": COUNT,
        "exit_layer": COUNT,
        "temperature": TEMPERATURE,
        "top_k": COUNT,
        "top_p": ("0", *SHARE),
        "seed": SEED,
        **DECODING,
    },
    ("cli", "train"): {
        "exit_layer": COUNT,
        "steps": COUNT,
        "minutes": DURATION,
        "batch_size": COUNT,
        "reuse": COUNT,
        "sequence_length": COUNT,
        "num_attention_heads": COUNT,
        "learning_rate": DURATION,
        "total_variation": SHARE,
        "vocabulary": COUNT,
        "seed": SEED,
    },
    ("cli", "generate_data"): {
        "texts": COUNT,
        "max_new_tokens": COUNT,
        "at_once": COUNT,
        "minutes": DURATION,
        "seed": SEED,
    },
    ("cli", "calibrate"): {"max_new_tokens": COUNT},
    ("cli", "info"): {"exit_layer": COUNT},
}
"""By command and option, values that mean nothing there."""

BEFORE = {
    ("gpu_report", "main"): "--smoke --out OUT",
    ("compare_binaries", "main"): "HEAD",
    ("train_demo", "main"): "--preset smoke --out OUT",
    ("cli", "demo"): "demo --json",
    ("cli", "generate"): "generate --model demo --prompt A",
    ("cli", "train"): "train --model demo --data README.md --exit-layer 4 --out OUT",
    ("cli", "generate_data"): "generate-data --model demo --prompts README.md --out OUT.jsonl",
    ("cli", "calibrate"): "calibrate --model demo --adapter ADAPTER --prompts PROMPTS",
    ("cli", "info"): "info --model demo --adapter ADAPTER",
}
"""What must stand on the command line besides."""


def commands() -> dict[tuple[str, str], Callable[..., Any]]:
    """Every function of a tool or of the package's command that takes options."""
    names = [path.stem for path in TOOLS.glob("*.py") if "import typer" in path.read_text()]
    modules = {name: import_module(name) for name in names}
    modules |= {each.__name__: each for each in (demo_command, generate, generate_data, train, calibrate, info)}
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


def test_every_number_is_here() -> None:
    found = {
        name: {option for option, kind in options(function).items() if is_number(kind)}
        for name, function in commands().items()
    }
    assert {name: some for name, some in found.items() if some} == {name: set(some) for name, some in NUMBERS.items()}


def app_of(module: Any) -> typer.Typer:
    if hasattr(module, "app"):
        app: typer.Typer = module.app
    else:
        app = typer.Typer()
        app.command()(module.main)
    return app


@pytest.mark.parametrize(
    ("command", "option"),
    [pytest.param(name, option, id="-".join((*name, option))) for name, some in NUMBERS.items() for option in some],
)
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
    for value in NUMBERS[command][option]:
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
