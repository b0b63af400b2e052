"""Adapters whose confidence was trained: it says how long to draft on every loop, and nothing of the text."""

import json
from typing import Any

import pytest
import torch
from drafters import on_the_device
from no_host_reads import iterations_ask_nothing
from pairs import make_adapter, make_target

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.contract import TrainedConfidence
from kangaroo_kernels.model.backend import REFERENCES, triton_backend
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.drafters.parts import Parts
from kangaroo_kernels.model.head import Head
from kangaroo_kernels.model.sampling import Chooser, Sampling
from kangaroo_kernels.model.shaping import Shaping
from kangaroo_kernels.model.target.checkpoint import read_tensors
from kangaroo_kernels.model.training.adapter_module import TrainableAdapter
from kangaroo_kernels.reference.top1_head import trained_confidence

SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "layers": 3, "heads": 2, "kv_heads": 1}
PROMPT = [7, 3, 5, 11, 2]
ON_THE_DEVICE = ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "seed": 4, "top_k": 9, "top_p": 0.9})
BY_THE_HOST = ({"repetition_penalty": 1.3}, {"temperature": 1.2, "seed": 5, "acceptance": "rejection"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("trained")
    target = make_target(folder / "target", **SIZES, quiet_from=1, quiet=0.2)
    return target, make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1)


def opened(folders: Any, bias: float | None = 0.0, **how: Any) -> Kangaroo:
    """The pair, its adapter's confidence trained to something; as it is where ``bias`` is None."""
    kangaroo = Kangaroo.from_pretrained(*folders, dtype="float32", **how)
    adapter, device = kangaroo.drafter.adapter, kangaroo.target.device
    if bias is not None:
        weight = 0.3 * torch.randn(SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
        trained = TrainedConfidence(weight.to(device), torch.tensor([0.8, bias], device=device))
        adapter.head = adapter.head._replace(trained=trained)
    return kangaroo


def counts(kangaroo: Kangaroo, prompt: list[int] = PROMPT, **settings: Any) -> tuple[Any, ...]:
    result = kangaroo.generate(prompt, **settings)
    return result.tokens, result.stats.drafted, result.stats.accepted_at, result.stats.verification_steps


@pytest.mark.parametrize("sampling", ON_THE_DEVICE, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("gamma", [2, 6])
def test_both_loops_draft_alike(folders, sampling, gamma):
    """Otherwise than without it; the text is plain decoding's."""
    settings = {"num_speculative_tokens": gamma, "draft_confidence_threshold": 0.5, "max_new_tokens": 40, **sampling}
    host, resident = opened(folders, device="cpu"), on_the_device(opened(folders, device="cpu"))
    drafted = counts(host, **settings)
    assert counts(resident, **settings) == drafted
    assert counts(opened(folders, None, device="cpu"), **settings)[1:] != drafted[1:]
    assert drafted[0] == host.generate(PROMPT, max_new_tokens=40, plain=True, **sampling).tokens


def test_the_kernels_draft_alike(folders, device, monkeypatch):
    """In the step-by-step way, also where one launch was asked for; nothing asks the host."""
    settings = {"max_new_tokens": 12, "num_speculative_tokens": 3, "draft_confidence_threshold": 0.5}
    host, *kernels = (
        opened(folders, device=device, **how)
        for how in ({"kernels": "reference"}, {"kernels": "triton"}, {"kernels": "triton", "persistent": True})
    )
    iterations_ask_nothing(monkeypatch)
    monkeypatch.setattr(KangarooDrafter, "draft_all", None)
    wanted = counts(host, **settings)
    assert [counts(each, **settings) for each in kernels] == [wanted] * 2
    assert wanted[1:] != counts(opened(folders, None, device=device, kernels="reference"), **settings)[1:]


@pytest.mark.parametrize("settings", ON_THE_DEVICE + BY_THE_HOST, ids=str)
@pytest.mark.parametrize("loop", ["host", "resident"])
def test_the_threshold_is_compared_with_it(folders, loop, settings):
    """Never sure, a chain ends with its first draft; always sure, with the last that it may have."""
    settings = {"num_speculative_tokens": 4, "max_new_tokens": 30, **settings}

    def drafts(bias: float | None, **more: Any) -> tuple[Any, ...]:
        kangaroo = opened(folders, bias, device="cpu")
        return counts(kangaroo if loop == "host" else on_the_device(kangaroo), **settings | more)

    never, always = (drafts(bias, draft_confidence_threshold=0.5) for bias in (-20.0, 20.0))
    assert never == drafts(None, num_speculative_tokens=1, draft_confidence_threshold=0.0)
    assert always == drafts(None, draft_confidence_threshold=0.0)
    assert always[1] > never[1] > 0


@pytest.mark.parametrize("backend", [REFERENCES, triton_backend()], ids=["reference", "triton"])
@pytest.mark.parametrize("way", ["as it is", "shaped", "min-p", "rejection"])
def test_every_draft_has_it(device, backend, way):
    generator = torch.Generator().manual_seed(0)
    hidden, norm, weight = (torch.randn(size, generator=generator).to(device) for size in ((1, 24), (24,), (40, 24)))
    trained = TrainedConfidence(0.3 * norm, torch.tensor([0.8, -0.5], device=device))
    sampling = Sampling(temperature=0.0 if way == "shaped" else 0.9, min_p=0.1 if way == "min-p" else None)
    if way == "rejection":
        sampling = Sampling(temperature=0.9, acceptance="rejection")
    shaping = Shaping(repetition_penalty=1.2) if way == "shaped" else Shaping()
    chooser = Chooser(sampling, backend, shaping=shaping, text=[3, 4])
    heads = Head(norm, weight, 1e-5, trained=trained), Head(norm, weight, 1e-5)
    if way == "rejection":
        ours, plain = (chooser.draft_with_distribution(hidden, head, 2)[0] for head in heads)
    else:
        ours, plain = (chooser.draft(hidden, head, 2) for head in heads)
    assert torch.equal(ours.token, plain.token)
    torch.testing.assert_close(ours.confidence, trained_confidence(hidden, plain.confidence, trained, 1e-5))
    assert abs(float(ours.confidence) - float(plain.confidence)) > 0.01


@pytest.mark.parametrize("rank", [0, 16])
@torch.inference_mode()
def test_it_is_read_from_the_adapter_as_it_was_trained(folders, rank, tmp_path):
    """The runtime's confidence is the trained module's, whatever the head."""
    parts = {"draft_head_rank": rank, "trained_confidence": True}
    adapter = make_adapter(tmp_path / "adapter", folders[0], exit_layer=1, copy_layer=1, **parts)
    kangaroo = Kangaroo.from_pretrained(folders[0], adapter, device="cpu")
    drafter, text = kangaroo.drafter, [*PROMPT, 1, 2]
    module = TrainableAdapter(drafter.adapter.config.llama, 64, Parts(**parts))
    module.load_state_dict(dict(read_tensors(adapter)))
    exit_hidden, cache = kangaroo._run_all(text, 1), drafter.adapter.new_cache()
    cache.reserve(len(text))
    hidden, logits = drafter.adapter.run(exit_hidden, cache, 0), kangaroo.draft_logits(text)
    probabilities = logits.softmax(-1).amax(-1)
    wanted = module.confidences(module(exit_hidden[None])[0][0], probabilities)
    chooser = Chooser(Sampling())
    ours = torch.cat([chooser.draft(row, drafter.adapter.head, 0).confidence for row in hidden.split(1)])
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert (ours - probabilities).abs().max() > 0.05
    assert drafter.adapter.config.parameters == sum(each.numel() for each in module.parameters())


def test_trees_refuse_it_and_other_engines_leave_it_out(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    from kangaroo_kernels.model.integrations.assistant import assistant
    from kangaroo_kernels.model.integrations.export import export_drafter

    trained, plain = (
        make_adapter(tmp_path / name, folders[0], exit_layer=1, copy_layer=1, trained_confidence=name == "trained")
        for name in ("trained", "plain")
    )
    with pytest.raises(KangarooError, match="trained confidence is that of the likeliest token alone"):
        Kangaroo.from_pretrained(folders[0], trained, device="cpu", draft_tree=4)
    for each in (trained, plain):
        export_drafter(folders[0], each, tmp_path / f"{each.name} drafter")
    one, other = (dict(read_tensors(tmp_path / f"{each.name} drafter")) for each in (trained, plain))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    found = [assistant(model, each)(torch.tensor([PROMPT])).logits for each in (trained, plain)]
    assert torch.equal(*found)


@pytest.mark.parametrize("said", [1, "yes", None])
def test_what_config_json_must_say(folders, tmp_path, said):
    adapter = make_adapter(tmp_path / "adapter", folders[0], exit_layer=1, trained_confidence=True)
    values = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(values | {"trained_confidence": said}))
    with pytest.raises(KangarooError, match=r"trained_confidence is .*; it must be true or false"):
        Kangaroo.from_pretrained(folders[0], adapter, device="cpu")
