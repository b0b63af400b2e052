"""Every number on every command line: nonsense ends in a sentence and exit status 2, before any work."""

import inspect
import re
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
from typer.models import OptionInfo
from typer.testing import CliRunner, Result

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model import demo, load
from kangaroo_kernels.model.commands import cli

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

NONSENSE = {
    "minutes learning_rate repetition_penalty": "0 -1 nan inf",
    "arch exit_layer length max_new_tokens num_speculative_tokens parallel tensor_parallel top_k texts": "0 -1",
    "steps batch_size micro_batch_size reuse sequence_length num_attention_heads intermediate_size vocabulary": "0 -1",
    "draft_vocabulary deep_state_size draft_head_rank unrolled_drafts at_once ranks max_prompt_tokens": "0 -1",
    "draft_block": "0 -1 1 16",
    "draft_tree": "-1 16",
    "size": "0 -1 2048",
    "draft_confidence_threshold min_p total_variation": "-0.1 1.1 nan",
    "top_p": "0 -0.1 1.1 nan",
    "temperature": "-1 nan inf",
    "seed queue": "-1",
    "port": "-1 65536",
    "rows": "0 -1 17",
    "per_category": "0 -1",
    "context": "1 -1",
    "min_new_tokens": "-1 129",
    "timeout": "0 -1 nan",
    "logprobs": "-1 21",
}
"""By options, values that mean nothing there, whatever the command."""

BEFORE = {
    "gpu_report": "--smoke --out OUT",
    "compare_binaries": "HEAD",
    "train_demo": "--preset smoke --out OUT",
    "vllm_check": "python --out OUT",
    "demo": "--json",
    "generate": "--model demo --prompt A",
    "chat": "--model demo",
    "train": "--model demo --data README.md --exit-layer 4 --out OUT",
    "generate_data": "--model demo --prompts README.md --out OUT.jsonl",
    "draft_vocabulary": "--model demo --adapter ADAPTER --data README.md",
    "calibrate": "--model demo --adapter ADAPTER --prompts PROMPTS",
    "compile": "--model demo --arch sm_90 --out OUT",
    "export": "--model demo --out OUT",
    "eval": "--model demo --questions bench/domains.jsonl --out OUT",
    "serve": "--model demo --adapter ADAPTER --port 0",
    "experiments": "drafting --out OUT",
    "info": "--model demo --adapter ADAPTER",
    "plan": "--model Vicuna-7B --card H100",
}
"""What must stand on the command line besides."""


def is_number(kind: Any) -> bool:
    return kind in (int, float) or any(is_number(part) for part in get_args(kind))


def numbers(function: Callable[..., Any]) -> list[str]:
    """The options of a command that take one."""
    hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    given = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Annotated}
    return [name for name, (kind, what) in given.items() if isinstance(what, OptionInfo) and is_number(kind)]


TOOL_NAMES = [
    path.stem for path in TOOLS.glob("*.py") if re.search(r"(?s)\nimport typer\n.*\ndef main", path.read_text())
]
COMMANDS = {name: import_module(name).main for name in TOOL_NAMES}
COMMANDS |= {each.name or each.callback.__name__: each.callback for each in cli.app.registered_commands}
NUMBERS = [(name, option) for name, function in COMMANDS.items() for option in numbers(function)]


def call(name: str, *given: str) -> Result:
    """What comes of a tool's command line, or of one of the package's command."""
    app, words = cli.app, [name.replace("_", "-"), *given]
    if name in TOOL_NAMES:
        app, words = typer.Typer(), [*given]
        app.command()(COMMANDS[name])
    return CliRunner().invoke(app, words)


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_nonsense_is_refused_before_any_work(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: Any, **settings: Any) -> None:
        pytest.fail("work has begun")

    monkeypatch.setattr(load, "load_target", work)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if name == "train_demo":
        monkeypatch.setattr("train_demo.train_pair", work)
    before = BEFORE.get(name, "").replace("OUT", str(tmp_path / "out"))
    before = before.replace("ADAPTER", str(demo.PAIR / "adapter"))
    (values,) = (values for options, values in NONSENSE.items() if option in options.split())
    for value in values.split():
        done = call(name, *before.split(), f"--{option.replace('_', '-')}", value)
        code, said = done.exit_code, done.stderr
        if name not in TOOL_NAMES and isinstance(done.exception, KangarooError):  # main makes a sentence of it
            code, said = 2, str(done.exception)
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
    "kernel_report --step dinner": "--step is dinner; it must be one of layer, top-1 head, ",
    "kernel_report --rows 4 --rows 17": "--rows is 17; it must be one of 1, 2, 3, ",
    "compare_binaries HEAD --model gpt": "no model is called gpt; there are ",
    "experiments dinner --out {}": "there is no experiment 'dinner'; there are drafting, ",
    "experiments adapters --out {}": "'adapters' takes several --adapter, any other experiment at most one.",
    "experiments exits --out {}": "exits, forms, ablation train their adapters on --data, which no other ",
    "experiments domains --out {} --data x": "exits, forms, ablation train their adapters on --data",
    "experiments domains --out {} --model nowhere": "nowhere",
    "gpu_report": "this needs a CUDA GPU and there is none here; --smoke --out DIR runs it without one.",
    "gpu_report --only decode,tset": "there is no part called 'tset'; there are environment, tests, ",
    "gpu_report --only pair": "the part pair needs --pair DIR",
    "gpu_report --pair {} --only decode": "--pair DIR the part pair",
    "gpu_report --pair {}": "target does not exist. tools/train_demo.py writes such a pair.",
    "gpu_report --only vllm": "the part vllm needs --vllm PYTHON",
    "gpu_report --vllm {}/none": "{}/none does not exist; give the Python of an environment that has vLLM.",
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
    "vllm_check no/python --out {}": "no/python does not exist; give the Python of an environment that has vLLM.",
    "tune": "tuning needs a CUDA GPU and there is none here.",
}
"""Command lines and what is said of them; {} is a folder with a file in it."""


@pytest.mark.parametrize(("line", "sentence"), REFUSALS.items())
def test_a_mistake_gets_one_sentence(line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    (tmp_path / "file").touch()
    name, *given = shlex.split(line.format(*[tmp_path] * 2))
    if name == "train_demo":
        monkeypatch.setattr("train_demo.cut_prompts", lambda *_: pytest.fail("work has begun"))
    done = call(name, *given)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"{name}: ")
    assert sentence.format(tmp_path) in done.stderr
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "")]
