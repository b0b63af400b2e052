"""``kangaroo compile``: afterwards a decode finds every kernel that it launches, and mistakes end in a sentence."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from compiling import ROOT
from pairs import make_adapter, with_vocabulary
from typer.testing import CliRunner

from kangaroo_kernels.model.ahead import blank_pair, works_for
from kangaroo_kernels.model.commands.cli import app

DECODE = """
import json
import sys

sys.path += ["tools", "tools/gpu_kit"]
import standin  # the place of a GPU: it launches, and the references compute

# isort: split
from kangaroo_kernels import Kangaroo
from kangaroo_kernels.launch_config import chained

target, adapter = sys.argv[1:3]
long = {"num_speculative_tokens": 3, "draft_confidence_threshold": 0.0}
by_host = {"logprobs": 1}, {"repetition_penalty": 1.1}, {"acceptance": "rejection"}
ways = [{}, {"plain": True}, long, *(long | each for each in by_host)]
for on, how in json.loads(sys.argv[3]):
    kangaroo = Kangaroo.from_pretrained(target, adapter, dtype="float16", **how)
    for way in ways:
        for sampling in ({}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}):
            for text in ("ab", "ab" * 90):
                with chained(on):
                    kangaroo.generate(text, max_new_tokens=4, **way, **sampling)
    with chained(on):  # of a text so long a launch of its own merges the splits of sixteen rows
        kangaroo.generate("ab" * 1100, max_new_tokens=2, **long | {"num_speculative_tokens": 15})
print(json.dumps([sorted(set(standin.compiled)), standin.found]))
"""


def run(*command: Any, **environment: str) -> str:
    """What a program prints that does not interpret Triton."""
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    line = [sys.executable, *map(str, command)]
    done = subprocess.run(line, cwd=ROOT, env=here, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


CHAINS, TREE, PERSISTENT = {"draft_tree": 0, "prompt_lookup": False}, {"prompt_lookup": False}, {"persistent": True}
LOOKUP = {"draft_tree": 0, "prompt_lookup": True}
LOADS = [(False, PERSISTENT), (True, LOOKUP), (True, {}), (False, CHAINS), (False, {}), (False, LOOKUP)]
TREES = [(False, TREE), (True, TREE)]
"""Whether launches are chained, and how an adapter drafts; another order than the one compiled in."""


def tree_adapter(folder, target):
    """Drafts trees beside lookup by itself, of some tokens alone."""
    own = {"draft_tree": 7, "prompt_lookup": True}
    whole = make_adapter(folder / "whole", target, exit_layer=2, copy_layer=2, **own)
    return with_vocabulary(whole, folder / "some", range(3, 40))


def deep_adapter(folder, target):
    """Has a deep state."""
    return make_adapter(folder / "deep", target, exit_layer=2, copy_layer=2, deep_state_size=20)


def block_adapter(folder, target):
    """Has a head of a low rank and a trained confidence besides."""
    parts = {"draft_block": 15, "draft_head_rank": 20, "trained_confidence": True}
    return make_adapter(folder / "block", target, exit_layer=2, copy_layer=2, **parts)


@pytest.mark.parametrize(
    ("make", "loads"),
    [
        (tree_adapter, TREES + LOADS),
        (deep_adapter, LOADS[1:3] + LOADS[4:]),
        (block_adapter, [(True, {}), (False, PERSISTENT)]),
    ],
)
def test_a_decode_finds_every_kernel(pair, tmp_path, make, loads):
    """Of the model only config.json is there when its kernels are compiled, and no weight of the adapter."""
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 4096}))
    adapter = make(tmp_path, target)
    alone = [tmp_path / "configs" / folder.name for folder in (target, adapter)]
    for folder, source in zip(alone, (target, adapter), strict=True):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors", "tokenizer*"))
    cache, used = tmp_path / "cache", tmp_path / "used"
    command = ["-m", "kangaroo_kernels.model", "compile", "--dtype", "float16", "--arch", "sm_90", "--out", cache]
    command += ["--model", alone[0], "--adapter", alone[1]]
    assert f"{cache} holds the kernels for sm_90; " in run(*command)
    settings = {"TRITON_CACHE_DIR": str(cache), "STANDIN": "compute", "STANDIN_USED": str(used)}
    compiled, found = json.loads(run("-c", DECODE, target, adapter, json.dumps(loads), **settings))
    assert compiled == []
    assert len(found) > 40
    assert "attention_merge_kernel" in found
    assert "; 0 of them are new." in run(*command)


def test_trees_may_be_asked_for(pair):
    """Beside chains, which are always there."""
    chains, trees = ([work.name for work in works_for([blank_pair(*pair, draft_tree=rows)], 80)] for rows in (None, 4))
    assert set(trees) - set(chains) == {"trees", "trees led by the host", "trees, lookup"}
    assert not set(chains) - set(trees)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--arch", "sm_75"], "architecture 'sm_75' is unknown; it must be sm_80 (an A100) or later, as sm_90."),
        (["--arch", "hopper"], "architecture 'hopper' is unknown"),
        ([], "there is no GPU here to compile for; name its architecture, as in --arch sm_90."),
        (["--arch", "sm_90", "--model", "demo", "--adapter", "x"], "--adapter goes with one --model, got 2"),
        (["--arch", "sm_90", "--exit-layer", "2"], "exit_layer was given without an adapter"),
        (["--arch", "sm_90", "--draft-tree", "4"], "draft_tree needs an adapter; give one, or leave draft_tree out."),
        (["--arch", "sm_90"], "TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it."),
    ],
)
def test_mistakes_end_in_a_sentence(monkeypatch, pair, tmp_path, words, sentence):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(app, ["compile", "--model", str(pair.target), "--out", str(tmp_path / "out"), *words])
    assert sentence in str(done.exception)
    assert not (tmp_path / "out").exists()
