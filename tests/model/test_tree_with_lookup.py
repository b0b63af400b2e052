"""Trees beside prompt lookup, on both loops: plain decoding's text, the same trees, and more of them stand."""

from typing import Any

import pytest
import torch
from drafters import on_the_device
from pairs import make_adapter, make_target
from test_iteration import Forbidden
from test_kangaroo_with_lookup import (
    IDS,
    REPEATING,
    SAMPLINGS,
    SMALL,
    Loops,
    Step,
    after_steps,
    guess,
    load,
    steps,
    text_of,
)

from kangaroo_kernels.contract import Experience
from kangaroo_kernels.model.drafters.tree_with_lookup import TreeWithLookup, sureness
from kangaroo_kernels.model.loop.graphs import GraphRunner
from kangaroo_kernels.model.loop.iteration import Iteration
from kangaroo_kernels.reference.weigh import weigh

CPU = torch.device("cpu")
END = 16
"""Behind it, tokens from the text's end, the host's trees have fewer rounds and share their rows out anew."""


@pytest.fixture(params=[6, 15])
def loops(pair, request) -> Loops:
    return load(*pair, draft_tree=request.param)


def same_text(loops: Loops, prompt: list[int], **settings: Any) -> list[Step]:
    """The steps of both loops up to the text's last tokens; the text is plain decoding's."""
    host, device = (steps(each, prompt, **settings) for each in loops)
    plain = {name: value for name, value in settings.items() if not name.startswith(("num_spec", "draft_conf"))}
    assert text_of(host) == text_of(device) == loops[0].generate(prompt, plain=True, **plain).tokens
    done, alike = 0, []
    for one, other in zip(host, device, strict=False):
        if done > len(text_of(host)) - END:
            break
        assert one == other
        alike.append(one)
        done += len(one[0])
    return alike


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("drafts", [None, 2, 15])
def test_whatever_is_looked_up_changes_nothing(loops, sampling, drafts):
    asked = {"num_speculative_tokens": drafts, "draft_confidence_threshold": 0.2, "max_new_tokens": 60, **sampling}
    for prompt in ([3, 5, 9], [15] * 70):
        plain = loops[0].generate(prompt, max_new_tokens=60, plain=True, **sampling).tokens
        for text in (None, [*prompt, *plain]):
            for each in loops:
                guess(each, text)
            assert sum(drafted for _, drafted, *_ in same_text(loops, prompt, **asked)) > 0


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_both_loops_choose_alike(loops, sampling):
    """With what is really looked up, however short the prompt, and whatever must be sure."""
    drafted = set()
    for prompt in (REPEATING, [3, 5, 9], [7], [15] * 70):
        for threshold in (0.0, 0.3, 0.72):
            asked = {"draft_confidence_threshold": threshold, "max_new_tokens": 60, **sampling}
            drafted |= {count for _, count, *_ in same_text(loops, prompt, **asked)}
    assert max(drafted) == loops[0].drafter.draft_tree


def test_a_short_match_is_a_branch(tmp_path):
    """It is never sure enough to be drafted alone. Of an adapter that knows nothing, no candidate is worth a row."""
    target = make_target(tmp_path / "target", std=0.1, **SMALL | {"vocab_size": 67})
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=1)
    loops = load(target, adapter, draft_tree=8)
    plain = loops[0].generate([3, 5, 9], max_new_tokens=60, plain=True).tokens
    for each in loops:
        guess(each, [3, 5, 9, *plain], lengths=(1,), right=1.0)
    found = same_text(loops, [3, 5, 9], max_new_tokens=60, draft_confidence_threshold=0.1)
    assert {agreed for _, _, agreed, _ in found} == {1}


@pytest.mark.parametrize("matched", range(1, 16))
def test_a_match_is_as_sure_as_weigh_says(matched):
    experience = Experience.none(TreeWithLookup.matches, TreeWithLookup.usual, CPU)
    experience.stood.copy_(torch.arange(len(experience.kinds)) * 0.7)
    experience.tried.copy_(torch.arange(len(experience.kinds)) * 0.9)
    experience.beside.fill_(0.0)
    ours = sureness(experience, torch.tensor([matched]))
    experience.stood.div_(0.95), experience.tried.div_(0.95)  # it forgets a little before it looks
    weighed = weigh(torch.tensor([matched]), torch.zeros(15), 20, 99, experience)
    assert weighed.made.sum() == matched
    torch.testing.assert_close(ours, weighed.sure[:1])
    assert sureness(experience, torch.tensor([0])) == 0


@pytest.mark.parametrize("loop", [0, 1], ids=["host", "device"])
@pytest.mark.parametrize("count", range(1, 9))
def test_the_adapter_has_the_text(loops, count, loop):
    """Whichever drafted: what its cache holds is what a prefill of the same text gives."""
    after_steps(loops[loop], count, loop)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_a_captured_iteration_serves_both(loops, monkeypatch, sampling):
    """One graph, whether a match or a tree is drafted, and whatever is expected of it."""
    first: dict[Any, Any] = {}
    monkeypatch.setattr(GraphRunner, "run", lambda runner, key, work: first.setdefault(key, work)())
    for threshold in (0.3, 0.75, 0.0):
        for prompt in (REPEATING, [3, 5, 9]):
            same_text(loops, prompt, max_new_tokens=40, draft_confidence_threshold=threshold, **sampling)
    assert len(first) == 1


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=IDS[:2])
def test_the_kernels_never_ask_the_host(pair, device, monkeypatch, sampling):
    """And draft what the references draft."""
    ways = {"draft_tree": 5, "prompt_lookup": True}
    kernels = pair.load(device=device, kernels="triton", dtype="float32", **ways)
    forbidden = Forbidden()
    if device.type == "cpu":
        monkeypatch.setattr(Iteration, "run", forbidden.run)
    asked = {"max_new_tokens": 7, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.1, **sampling}
    prompts = [7], [5, 9, 2, 7] * 3
    found = [steps(kernels, prompt, **asked) for prompt in prompts]
    assert forbidden.iterations or device.type != "cpu"
    monkeypatch.undo()
    references = on_the_device(pair.load(device="cpu", **ways))
    assert found == [steps(references, prompt, **asked) for prompt in prompts]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_on_a_gpu_graphs_change_nothing(pair, sampling):
    """Captured or launched kernel by kernel: the same steps, and plain decoding's tokens."""
    ways = {"dtype": "bfloat16", "draft_tree": 15, "prompt_lookup": True}
    captured, launched = (pair.load(graphs=graphs, **ways) for graphs in (True, False))
    for prompt in (REPEATING, [3, 5, 9]):
        for threshold in (0.0, 0.3):
            asked = {"max_new_tokens": 90, "draft_confidence_threshold": threshold, **sampling}
            found = steps(captured, prompt, **asked)
            assert found == steps(launched, prompt, **asked)
            assert text_of(found) == launched.generate(prompt, max_new_tokens=90, plain=True, **sampling).tokens
