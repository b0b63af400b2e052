"""``kangaroo compile``: afterwards a decode finds every kernel that it launches, and mistakes end in a sentence."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from compiling import ROOT
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

target, adapter = sys.argv[1:]
long = {"num_speculative_tokens": 3, "draft_confidence_threshold": 0.0}
ways = [{}, {"plain": True}, long, {"repetition_penalty": 1.1, **long}, {"acceptance": "rejection", **long}]
lookup, chains, persistent = {"prompt_lookup": True}, {"draft_tree": 0}, {"persistent": True}
loads = (False, persistent), (True, lookup), (True, {}), (False, chains), (False, {}), (False, lookup)
for on, how in loads:  # another order than the one compiled in; by itself the adapter drafts trees
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


def test_a_decode_finds_every_kernel(pair, tmp_path):
    """Of the model only config.json is there when its kernels are compiled, and no weight of the adapter."""
    configs, target, adapter = [], tmp_path / "target", tmp_path / "trees"
    for folder, source, more in ((target, pair.target, {}), (adapter, pair.adapter, {"draft_tree": 7})):
        shutil.copytree(source, folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 4096} | more))
        configs.append(tmp_path / "configs" / folder.name)
        configs[-1].mkdir(parents=True)
        shutil.copy(folder / "config.json", configs[-1])
    cache, used = tmp_path / "cache", tmp_path / "used"
    command = ["-m", "kangaroo_kernels.model", "compile", "--dtype", "float16", "--arch", "sm_90", "--out", cache]
    command += ["--model", configs[0], "--adapter", configs[1]]
    assert f"{cache} holds the kernels for sm_90; " in run(*command)
    settings = {"TRITON_CACHE_DIR": str(cache), "STANDIN": "compute", "STANDIN_USED": str(used)}
    compiled, found = json.loads(run("-c", DECODE, target, adapter, **settings))
    assert compiled == []
    assert len(found) > 40
    assert "attention_merge_kernel" in found
    assert "; 0 of them are new." in run(*command)


def test_trees_may_be_asked_for(pair):
    """Beside chains, which are always there."""
    chains, trees = ([work.name for work in works_for([blank_pair(*pair, draft_tree=rows)], 80)] for rows in (None, 4))
    assert set(trees) - set(chains) == {"trees", "trees led by the host"}
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
