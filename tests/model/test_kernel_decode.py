"""The whole decode through the Triton kernels (in the interpreter where there is no GPU): the references' tokens."""

import pytest
import torch
from drafters import in_one_launch
from no_host_reads import no_host_reads
from pairs import make_adapter, make_target, with_vocabulary

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.loop.iteration import Iteration

SAMPLINGS = (
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": 2**64 - 1, "top_k": 9},
    {"temperature": 1.2, "seed": 5, "top_p": 0.8},
    {"temperature": 0.9, "seed": 6, "top_k": 20, "top_p": 0.7},
)
IDS = [",".join(f"{name}={value}" for name, value in sampling.items()) or "greedy" for sampling in SAMPLINGS]
PROMPT = [7, 3, 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small enough for the interpreter: no size is a multiple of a tile, heads are grouped, projections have biases."""
    folder = tmp_path_factory.mktemp("kernels")
    sizes = {"hidden_size": 40, "intermediate_size": 56, "layers": 3, "heads": 4, "kv_heads": 2}
    target = make_target(folder / "target", **sizes, attention_bias=True, mlp_bias=True, quiet_from=1, quiet=0.2)
    return target, make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1)


@pytest.fixture(scope="module")
def pairs(folders, device):
    """The same checkpoint on the kernels and on the references."""
    return {
        name: Kangaroo.from_pretrained(*folders, device=device, dtype="float32", kernels=name)
        for name in ("triton", "reference")
    }


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_kernels_give_the_references_tokens(pairs, sampling):
    wanted = pairs["reference"].generate(PROMPT, max_new_tokens=7, plain=True, **sampling)
    plain = pairs["triton"].generate(PROMPT, max_new_tokens=7, plain=True, **sampling)
    drafted = pairs["triton"].generate(
        PROMPT, max_new_tokens=7, num_speculative_tokens=2, draft_confidence_threshold=0.2, **sampling
    )
    assert plain.tokens == drafted.tokens == wanted.tokens
    assert drafted.stats.accepted > 0


def test_kernels_draft_what_the_references_draft(pairs):
    settings = {"max_new_tokens": 8, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.3}
    counts = [pairs[name].generate(PROMPT, **settings).stats for name in ("triton", "reference")]
    assert counts[0].accepted_at == counts[1].accepted_at
    assert counts[0].drafted == counts[1].drafted > 0


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=IDS[:3])
def test_a_head_of_some_tokens(pairs, folders, device, tmp_path, monkeypatch, sampling):
    """Step by step and in one launch: plain decoding's tokens, and the references' drafts."""
    adapter = with_vocabulary(folders[1], tmp_path / "adapter", range(0, 67, 2))
    ours, theirs = (
        Kangaroo.from_pretrained(folders[0], adapter, device=device, dtype="float32", kernels=name)
        for name in ("triton", "reference")
    )
    settings = {"max_new_tokens": 7, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.2, **sampling}
    wanted = theirs.generate(PROMPT, **settings)
    assert wanted.tokens == pairs["reference"].generate(PROMPT, max_new_tokens=7, plain=True, **sampling).tokens
    run = Iteration.run

    def alone(iteration, reach):
        with no_host_reads():
            run(iteration, reach)

    if device.type == "cpu":
        monkeypatch.setattr(Iteration, "run", alone)
    for each in (ours, in_one_launch(ours)):
        drafted = each.generate(PROMPT, **settings)
        assert drafted.tokens == wanted.tokens
        assert (drafted.stats.drafted, drafted.stats.accepted_at) == (wanted.stats.drafted, wanted.stats.accepted_at)


def test_rejection_sampling_runs_on_kernels(pairs):
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 1, "acceptance": "rejection"}
    assert pairs["triton"].generate(PROMPT, **settings).tokens == pairs["reference"].generate(PROMPT, **settings).tokens


def test_a_stop_token_ends_it(pairs):
    text = pairs["reference"].generate(PROMPT, max_new_tokens=12, plain=True).tokens
    stopped = pairs["triton"].generate(PROMPT, max_new_tokens=12, stop=[text[5]], draft_confidence_threshold=0.0)
    assert stopped.tokens == text[: text.index(text[5]) + 1]
    assert stopped.finish_reason == "stop"


def test_a_long_prompt_is_the_references_work(pairs):
    """More rows than the kernels take: the prefill. Its cache is what the kernels go on from."""
    prompt = [(5 * index) % 67 for index in range(40)]
    runs = [pairs[name].generate(prompt, max_new_tokens=4).tokens for name in ("triton", "reference")]
    assert runs[0] == runs[1]


def test_an_adapter_with_an_mlp_drafts_alike_on_every_loop(folders, device, tmp_path):
    """Led by the host, by the stage kernels, and by all of them in one; without its MLP it drafts otherwise."""
    target, bare = folders
    with_mlp = make_adapter(tmp_path / "adapter", target, exit_layer=1, copy_layer=1, mlp=True)
    settings = {"max_new_tokens": 8, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.2}

    def counts(adapter, **how):
        kangaroo = Kangaroo.from_pretrained(target, adapter, device=device, dtype="float32", **how)
        result = kangaroo.generate(PROMPT, **settings)
        return result.tokens, result.stats.drafted, result.stats.accepted_at

    host = counts(with_mlp, kernels="reference")
    assert counts(with_mlp, kernels="triton") == counts(with_mlp, kernels="triton", persistent=True) == host
    assert counts(bare, kernels="reference")[0] == host[0] and counts(bare, kernels="reference") != host


def test_half_precision(folders, device):
    kangaroo = Kangaroo.from_pretrained(*folders, device=device, dtype="float16", kernels="triton")
    settings = {"max_new_tokens": 6, "draft_confidence_threshold": 0.0, "num_speculative_tokens": 2}
    assert (
        kangaroo.generate(PROMPT, **settings).tokens == kangaroo.generate(PROMPT, max_new_tokens=6, plain=True).tokens
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_on_a_gpu_tokens_are_plain_tokens_to_the_bit(folders, dtype, sampling, threshold):
    kangaroo = Kangaroo.from_pretrained(*folders, dtype=dtype)
    plain = kangaroo.generate(PROMPT, max_new_tokens=200, plain=True, **sampling).tokens
    for gamma in (1, 5, 15):
        drafted = kangaroo.generate(
            PROMPT,
            max_new_tokens=200,
            num_speculative_tokens=gamma,
            draft_confidence_threshold=threshold,
            **sampling,
        )
        assert drafted.tokens == plain


def test_what_cannot_run_is_said(folders, monkeypatch):
    from triton import knobs

    with pytest.raises(KangarooError, match="kernels 'cutlass' are unknown; use one of triton, reference"):
        Kangaroo.from_pretrained(*folders, kernels="cutlass")
    with pytest.raises(KangarooError, match="bfloat16 products wrong"):
        Kangaroo.from_pretrained(*folders, device="cpu", dtype=torch.bfloat16, kernels="triton")
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(KangarooError, match="set TRITON_INTERPRET=1"):
        Kangaroo.from_pretrained(*folders, device="cpu", kernels="triton")
