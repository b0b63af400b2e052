"""Adapters with a head of a low rank of their own, in the place of the target's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import on_the_device
from no_host_reads import iterations_ask_nothing
from pairs import make_adapter, make_target, with_vocabulary

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.target.checkpoint import read_tensors

SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "layers": 3, "heads": 2, "kv_heads": 1}
WAYS = ({}, {"prompt_lookup": True}, {"draft_tree": 6}, {"draft_tree": 6, "prompt_lookup": True})
SAMPLINGS = ({}, {"temperature": 0.9, "seed": 4}, {"temperature": 0.8, "seed": 4, "top_k": 9, "top_p": 0.9})
PROMPT = [7, 3, 5, 11, 2]
RANK = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("head")
    target = make_target(folder / "target", **SIZES, quiet_from=1, quiet=0.2)
    adapter = make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1, draft_head_rank=RANK, std=0.2)
    return target, adapter


NEW_TOKENS = 30


def steps(kangaroo: Kangaroo, prompt: list[int], **settings: Any) -> list[tuple[Any, ...]]:
    """The tokens and numbers of drafts of every step that has room for all drafts.

    In the others the host's loop shares out a tree's rows anew.
    """
    found, last = [], settings["max_new_tokens"] - 1 - settings["num_speculative_tokens"]
    for step in kangaroo.progress(prompt, **settings):
        if len(step.generation.tokens) - len(step.commit.tokens) < last:
            found.append((step.commit.tokens, step.commit.drafted, step.commit.draft_steps))
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("way", WAYS, ids=["chains", "lookup", "tree", "tree and lookup"])
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "few rows"])
def test_both_loops_draft_alike(folders, way, sampling, few, tmp_path):
    target, adapter = folders
    if few:
        adapter = with_vocabulary(adapter, tmp_path / "few", [*range(0, 40, 2)])
    host = Kangaroo.from_pretrained(target, adapter, device="cpu", **way)
    resident = on_the_device(Kangaroo.from_pretrained(target, adapter, device="cpu", **way))
    for prompt in (PROMPT, [9, 4], [9]):
        settings = {"max_new_tokens": NEW_TOKENS, "num_speculative_tokens": 4, **sampling}
        wanted = host.generate(prompt, max_new_tokens=NEW_TOKENS, plain=True, **sampling).tokens
        for each in (host, resident):
            assert each.generate(prompt, draft_confidence_threshold=0.2, **settings).tokens == wanted
        drafted = steps(host, prompt, draft_confidence_threshold=0.2, **settings)
        assert steps(resident, prompt, draft_confidence_threshold=0.2, **settings) == drafted
        assert sum(count for _, count, _ in drafted) > 0


@torch.inference_mode()
def test_the_head_is_that_of_its_factors(folders):
    kangaroo = Kangaroo.from_pretrained(*folders, device="cpu")
    own, text = dict(read_tensors(folders[1])), [*PROMPT, 1, 2, 3]
    adapter = kangaroo.drafter.adapter
    cache = adapter.new_cache()
    cache.reserve(len(text))
    hidden = adapter.run(kangaroo._run_all(text, 1), cache, 0)
    narrow = hidden @ own["draft_head.down.weight"].T
    normed = torch.nn.functional.rms_norm(narrow, (RANK,), own["norm.weight"], adapter.config.llama.rms_norm_eps)
    wanted = normed @ own["draft_head.up.weight"].T
    torch.testing.assert_close(kangaroo.draft_logits(text), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [{}, {"draft_tree": 3}, {"persistent": True}], ids=["chains", "tree", "one launch"])
def test_the_kernels_draft_alike(folders, way, device, monkeypatch):
    """Nothing asks the host; a head of its own drafts step by step where one launch was asked for."""
    settings = {"max_new_tokens": 9, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.2}
    host, kernels = (
        Kangaroo.from_pretrained(*folders, device=device, dtype="float32", kernels=name, **way)
        for name in ("reference", "triton")
    )
    iterations_ask_nothing(monkeypatch)
    for prompt in (PROMPT, [9]):
        assert steps(kernels, prompt, **settings) == steps(host, prompt, **settings) != []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"draft_head_rank": 0}, "unexpected tensor 'draft_head."),
        ({"draft_head_rank": 24}, "draft_head_rank is 24; it must be a whole number from 1 to 23"),
        ({"draft_head_rank": -1}, "draft_head_rank is -1"),
        ({"draft_head_rank": 12}, "has shape"),
    ],
)
def test_what_config_json_must_say(folders, tmp_path, said, words):
    folder = Path(shutil.copytree(folders[1], tmp_path / "adapter"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | said))
    with pytest.raises(KangarooError, match=words):
        Kangaroo.from_pretrained(folders[0], folder, device="cpu")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"draft_head_rank": RANK}, "head of two factors, .* without --draft-head-rank"),
        ({"draft_block": 3}, "block, .* without --draft-block"),
    ],
)
def test_other_engines_refuse_it(folders, tmp_path, parts, words):
    """A stock Llama has one head, and no places."""
    from transformers import AutoModelForCausalLM

    from kangaroo_kernels.model.integrations.assistant import assistant
    from kangaroo_kernels.model.integrations.export import export_drafter

    adapter = make_adapter(tmp_path / "adapter", folders[0], exit_layer=1, **parts)
    with pytest.raises(KangarooError, match=words):
        export_drafter(folders[0], adapter, tmp_path / "out")
    with pytest.raises(KangarooError, match=words):
        assistant(AutoModelForCausalLM.from_pretrained(folders[0]), adapter)
